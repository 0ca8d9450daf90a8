"""What a user installs: built from the tree as it stands, looked at file by file."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.unit.house.repository import LINKED, ROOT, repository_files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the repository, made without a network."""
    copy = tmp_path_factory.mktemp("copy")
    for path in repository_files():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for name in LINKED:
        (copy / "qat" / name).symlink_to(f"../{name}")
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_module_and_data_file_as_real_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {info.filename: info for info in archive.infolist()}
    assert not [name for name, info in inside.items() if stat.S_ISLNK(info.external_attr >> 16)]
    expected = {"qat/py.typed"}
    for path in repository_files():
        parts = path.relative_to(ROOT).parts
        if parts[0] in {"qat", *LINKED}:
            expected.add("/".join(parts if parts[0] == "qat" else ("qat", *parts)))
    assert expected - set(inside) == set(), "name it under [tool.setuptools.package-data]"
    stray = {name.split("/")[0] for name in inside} - {"qat", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}
    assert stray == set(), "a top-level package beside qat would collide with users' folders"


def test_wheel_runs_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Unpacked as an installer would, `qat validate` finds its recipes, persona and suites."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "qat", "validate", "annie_tiny"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
