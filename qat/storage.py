"""Files that are whole or not there, and the lock of a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
from pathlib import Path

from qat.errors import UserError

LOCK = "lock"


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing: temporary name in the same folder, fsync, rename, fsync of the folder.

    Raises:
        UserError: The disk is full or the folder cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise storage_fault(error, path) from error
        raise


def write_json(path: Path, value: object) -> None:
    """`write_atomic` of indented JSON; NaN and infinities are refused, they are not JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def storage_fault(error: OSError, path: Path) -> UserError:
    """The one message for a full or unwritable disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError("the disk is full", where=str(path), remedy="free some space and call again: the run resumes")
    return UserError("cannot write", where=str(path), value=error.strerror or str(error))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(folder: Path) -> int:
    """An open descriptor that holds the folder's lock; the kernel frees it with the process, however that ends."""
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise storage_fault(error, path) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise storage_fault(error, path) from error
        raise UserError(
            "another process is working in this run",
            where=str(folder),
            value=f"process {holder}",
            remedy="wait for it, stop it, or give this one another name with --run",
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def release_lock(descriptor: int) -> None:
    """Free what `take_lock` gave."""
    os.close(descriptor)
