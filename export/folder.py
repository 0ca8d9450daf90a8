"""A folder that appears whole or not at all: written beside its place under another name, synced, renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qat.errors import UserError
from qat.storage import storage_fault

#: Every finished export holds this file; a folder without it is never replaced.
REPORT_NAME = "export.json"

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder to write into; it becomes `target` when the block ends without an exception.

    The folder is `.<name>.partial` beside the target. It is removed when the block fails; what a killed process left is
    removed by the next call. An export that stands at `target` already is replaced in the end.

    Raises:
        UserError: Another process is writing this target, the target holds something else than an export, the disk is
            full, or the place cannot be written.
    """
    target = Path(os.path.abspath(target))
    _require_replaceable(target)
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError("The folder of the export cannot be written.", where=str(target), value=str(error)) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("Another process is exporting to the same folder.", where=str(target)) from None
        try:
            _empty(partial)
            _finish_replacement(target)
            yield partial
            sync_tree(partial)
            _replace(partial, target)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _FULL:
                raise storage_fault(error, target) from error
            raise
    finally:
        os.close(lock)


def require_space(target: Path, needed: int) -> None:
    """Refuse an export that cannot fit before any work is done.

    Args:
        target: Where the export will stand.
        needed: Its size in bytes. An export that is being replaced stays until the new one is whole, so it counts as
            used.

    Raises:
        UserError: The file system has less than `needed` bytes free.
    """
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(
            "There is not enough free disk space for the export.",
            where=str(target),
            value=f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            remedy="Free space or choose another folder.",
        )


def sync_tree(folder: Path) -> None:
    """Force every file and folder below `folder` to the disk."""
    for root, _, files in os.walk(folder):
        for path in (*(Path(root) / name for name in files), Path(root)):
            _sync(path)


def _require_replaceable(target: Path) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if target.is_dir() and not target.is_symlink() and ((target / REPORT_NAME).is_file() or not any(target.iterdir())):
        return
    raise UserError(
        "The target exists and is no export; it is not overwritten.",
        where=str(target),
        remedy="Choose another folder or remove this one.",
    )


def _replace(partial: Path, target: Path) -> None:
    if target.exists():
        # No folder can be renamed over one that is not empty: the old one steps aside between two renames.
        old = _aside(target)
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)
    else:
        partial.rename(target)
    _sync(target.parent)


def _finish_replacement(target: Path) -> None:
    """Tidy up after a process that was killed while it replaced an export: bring the old one back, or drop it."""
    old = _aside(target)
    if old.exists() and target.exists():
        shutil.rmtree(old)
    elif old.exists():
        old.rename(target)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
