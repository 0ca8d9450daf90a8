from __future__ import annotations

import os
import subprocess

import pytest

from tests.unit.house.repository import LINKED, ROOT


@pytest.mark.parametrize("name", LINKED)
def test_link_is_relative_and_points_beside_the_package(name: str) -> None:
    link = ROOT / "qat" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == (ROOT / name).resolve()
    assert (link / "__init__.py").is_file()


def test_no_other_links_in_the_package() -> None:
    assert sorted(path.name for path in (ROOT / "qat").rglob("*") if path.is_symlink()) == sorted(LINKED)


def test_git_carries_the_links_as_links() -> None:
    """Mode 120000: a checkout on another machine gets the link, not a file holding its text."""
    command = ["git", "-C", str(ROOT), "ls-files", "--stage", "--", *(f"qat/{name}" for name in LINKED)]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not a git checkout with tracked links")
    modes = {line.split("\t")[1]: line.split()[0] for line in listed.stdout.splitlines()}
    assert modes == {f"qat/{name}": "120000" for name in LINKED}
