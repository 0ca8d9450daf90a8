"""One file from a URL: it goes on where an earlier call was killed, and only bytes with the right hash get its name.

huggingface_hub has given up resuming (each download writes to a name of its own), which after a kill costs up to 5 GB a
shard of a large checkpoint. Here the part has one name, is continued with a range request, and is hashed when whole.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import NamedTuple

import httpx

from qat.errors import UserError
from qat.storage import storage_fault

CHUNK = 1 << 22
PART = ".qat-part"
RETRIES = 5
_WAIT_SECONDS = 1.0
_GONE_ON = (408, 429, 500, 502, 503, 504)


class RemoteFile(NamedTuple):
    """A file of a repository.

    Attributes:
        name: Path in it.
        size: Bytes.
        digest: SHA-256 where `large`, else Git's blob id (SHA-1 over a header and the content), hexadecimal.
        large: Kept outside of Git by the hub (weights).
    """

    name: str
    size: int
    digest: str
    large: bool


class Refused(Exception):
    """The server answered with a status that trying again does not change."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"HTTP {status}")


def file_digest(path: Path, file: RemoteFile, tick: Callable[[int], None] | None = None) -> str:
    """Hash a local file as the hub hashes it.

    Args:
        path: The local file.
        file: Says by which rule.
        tick: Called with the bytes of every chunk.
    """
    digest = hashlib.sha256() if file.large else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
            if tick is not None:
                tick(len(chunk))
    return digest.hexdigest()


def download(
    client: httpx.Client,
    url: str,
    headers: Mapping[str, str],
    file: RemoteFile,
    target: Path,
    tick: Callable[[int], None],
    stop: Event,
) -> None:
    """Bring a file to `target`; the part of an earlier call is continued.

    Args:
        client: Follows redirects (an `Authorization` header does not leave its origin).
        url: Where it is.
        headers: Of every request.
        file: Size and hash that it must have.
        target: Its place; appears when the file is whole and right.
        tick: Called with the bytes that are there or have come.
        stop: Set by others to end this.

    Raises:
        UserError: The content is not what the hub says it is, the disk is full, or the connection keeps breaking.
        Refused: The server refuses.
    """
    part = target.with_name(target.name + PART)
    part.parent.mkdir(parents=True, exist_ok=True)
    tick(_size(part))
    failures = 0
    while _size(part) < file.size:
        before = _size(part)
        try:
            _stream(client, url, headers, part, file.size, tick, stop)
            fault: Exception | None = None
        except (httpx.TransportError, httpx.StreamError) as error:
            fault = error
        except OSError as error:
            raise storage_fault(error, part) from error
        if stop.is_set():
            return
        failures = 0 if _size(part) > before else failures + 1
        if failures > RETRIES:
            raise UserError(
                "The connection keeps breaking.",
                where=url,
                value=f"{type(fault).__name__}: {fault}" if fault else "the server sends nothing",
                remedy="call again: it goes on where it is",
            ) from fault
        if failures:
            time.sleep(_WAIT_SECONDS * failures)
    _require_digest(part, file)
    _settle(part, target)


def _stream(
    client: httpx.Client,
    url: str,
    headers: Mapping[str, str],
    part: Path,
    size: int,
    tick: Callable[[int], None],
    stop: Event,
) -> None:
    """Append what is missing; a server that ignores the range begins anew."""
    start = _size(part)
    # Without this some servers compress small files and then ignore ranges.
    wanted = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    with client.stream("GET", url, headers=wanted) as response:
        if response.status_code in _GONE_ON:
            raise httpx.RemoteProtocolError(f"HTTP {response.status_code}")
        if response.status_code not in (200, 206):
            raise Refused(response.status_code)
        if start and response.status_code == 200:
            tick(-start)
            start = 0
        with part.open("r+b" if start else "wb") as out:
            out.seek(start)
            # As they come: collected to larger pieces, what was collected is lost when the connection breaks.
            for chunk in response.iter_bytes():
                chunk = chunk[: size - start]
                out.write(chunk)
                start += len(chunk)
                tick(len(chunk))
                if stop.is_set() or start >= size:
                    break
            out.flush()
            os.fsync(out.fileno())


def _require_digest(part: Path, file: RemoteFile) -> None:
    found = file_digest(part, file)
    if found != file.digest:
        part.unlink()
        raise UserError(
            "A file came with other bytes than the hub has; it is removed.",
            where=file.name,
            value=f"{found}, not {file.digest}",
            remedy="call again; if it stays so, something between here and the hub changes files",
        )


def _settle(part: Path, target: Path) -> None:
    try:
        os.replace(part, target)
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise storage_fault(error, target) from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
