"""The files of the repository as git would carry them: tracked, or new and not ignored."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LINKED = ("calibration", "data", "export", "patches", "serve")


@cache
def repository_files() -> tuple[Path, ...]:
    """Regular files (links left out), absolute and sorted."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, check=True, capture_output=True).stdout.decode()
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    paths = sorted({ROOT / name for name in listed.split("\0") if name})
    return tuple(path for path in paths if path.is_file() and not path.is_symlink())


def python_files() -> tuple[Path, ...]:
    return tuple(path for path in repository_files() if path.suffix == ".py")


def read_text(path: Path) -> str | None:
    """The file's text, or None where it is not UTF-8 (weights, pictures)."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
