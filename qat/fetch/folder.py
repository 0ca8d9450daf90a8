"""A base in a folder: is it whole, are its bytes the right ones, and a copy of it elsewhere.

For machines without a network: `qat fetch --out DIR` writes a folder to carry, with its hashes beside it, and
`qat fetch --from DIR` checks what arrived.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.errors import UserError
from qat.fetch.download import RemoteFile, file_digest
from qat.fetch.hub import SPARE, allowed
from qat.progress import progress_bar
from qat.storage import storage_fault, write_atomic
from qat.train.base import resolve_base

if TYPE_CHECKING:
    from qat.recipe.schema import BaseBlock

SUMS = "SHA256SUMS"
"""Hashes of a folder's files, as `sha256sum` writes them."""
_SUM = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<name>.+)")
_HEADER_LIMIT = 100_000_000


class Checked(NamedTuple):
    """A folder that holds a whole checkpoint.

    Attributes:
        folder: It.
        files: Names of those that belong to it; others are ignored.
        bytes: Of all of them.
        hashed: How many were compared with a hash.
        by: Where the hashes came from, in words.
    """

    folder: Path
    files: list[str]
    bytes: int
    hashed: int
    by: str

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return {**self._asdict(), "folder": str(self.folder)}


def check_folder(folder: Path, block: BaseBlock) -> Checked:
    """Check a checkpoint that lies in a folder.

    Args:
        folder: It.
        block: Says the family that it must be of.

    Returns:
        What was found and compared. Without hashes beside it a folder is checked for completeness alone.

    Raises:
        UserError: It is of another family, incomplete, cut short, or its bytes are not those that its hashes name.
    """
    if not folder.is_dir():
        raise UserError("There is no such folder.", where="--from", value=str(folder))
    resolve_base(block.model_copy(update={"model": str(folder.resolve()), "revision": None}))
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and allowed(path.name))
    for name in names:
        if name.endswith(".safetensors"):
            _require_whole(folder / name)
    _require_indexed(folder)
    hashes, by = _hashes(folder, names)
    total = sum((folder / name).stat().st_size for name in hashes)
    with progress_bar("checking, MB", max(1, total // 1_000_000)) as bar:
        done = 0
        for name, expected in hashes.items():
            found = file_digest(folder / name, expected)
            if found != expected.digest:
                raise UserError(
                    "A file has other bytes than its hash says.",
                    where=str(folder / name),
                    value=f"{found}, not {expected.digest}",
                    remedy="carry it again",
                )
            done += (folder / name).stat().st_size
            bar.update(done // 1_000_000)
    size = sum((folder / name).stat().st_size for name in names)
    return Checked(folder, names, size, len(hashes), by)


def place(source: Path, names: Iterable[str], out: Path) -> Path:
    """Bring a checkpoint's files to another folder, by hard links where that is possible, and write their hashes.

    Args:
        source: Folder of the files (links in it are followed).
        names: Which of them.
        out: The new folder; files of the same content are kept.

    Returns:
        `out`.

    Raises:
        UserError: The disk is full or cannot be written.
    """
    names = list(names)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_fault(error, out) from error
    total = sum((source / name).stat().st_size for name in names)
    sums = []
    with progress_bar(f"to {out.name}, MB", max(1, total // 1_000_000)) as bar:
        done = 0
        for name in names:
            digest = _place_one((source / name).resolve(), out / name)
            sums.append(f"{digest}  {name}\n")
            done += (source / name).stat().st_size
            bar.update(done // 1_000_000)
    write_atomic(out / SUMS, "".join(sums))
    return out


def _place_one(source: Path, target: Path) -> str:
    """Link or copy one file; returns its SHA-256."""
    if target.exists() and target.samefile(source):
        return _sha256(target)
    part = target.with_name(f".{target.name}.part")
    try:
        part.unlink(missing_ok=True)
        try:
            os.link(source, part)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
            _require_space(target.parent, source.stat().st_size)
            shutil.copyfile(source, part)
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        digest = _sha256(part)
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise storage_fault(error, target) from error
    return digest


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + SPARE > free:
        raise UserError(
            "There is too little space on the disk for a copy.",
            where=str(folder),
            value=f"{needed / 1e9:.1f} GB to come and {SPARE / 1e9:.1f} GB to spare, {free / 1e9:.1f} GB free",
            remedy="free some, or name a folder on the disk where the files are: links need no space",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and the size that the file must have by it."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _HEADER_LIMIT:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            "A weight file is no safetensors file.", where=str(path), value=str(error), remedy="carry it again"
        ) from error
    return header, 8 + length + max(ends, default=0)


def _require_whole(path: Path) -> None:
    _, wanted = _header(path)
    size = path.stat().st_size
    if size != wanted:
        raise UserError(
            "A weight file is cut short." if size < wanted else "A weight file is longer than its header says.",
            where=str(path),
            value=f"{size:,} of {wanted:,} bytes",
            remedy="carry it again",
        )


def _require_indexed(folder: Path) -> None:
    """Every tensor that the index names stands in the file that it names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    named: dict[str, list[str]] = {}
    for tensor, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
        named.setdefault(name, []).append(tensor)
    for name, tensors in named.items():
        missing = set(tensors) - set(_header(folder / name)[0])
        if missing:
            raise UserError(
                f"A weight file lacks {len(missing)} tensors that the index names in it.",
                where=str(folder / name),
                value=min(missing),
                remedy="index and weights are of different downloads: carry both again",
            )


def _hashes(folder: Path, names: list[str]) -> tuple[dict[str, RemoteFile], str]:
    """The hash of each file, from `SHA256SUMS` or from what `hf download --local-dir` left."""
    sums = folder / SUMS
    if sums.is_file():
        found = {}
        for number, line in enumerate(sums.read_text(encoding="utf-8").splitlines(), 1):
            match = _SUM.fullmatch(line)
            if match is None:
                raise UserError("A line is no hash and name.", where=f"{sums}:{number}", value=line[:100])
            found[match["name"].removeprefix("./")] = RemoteFile(match["name"], 0, match["digest"], True)
        lacking = sorted(set(names) - set(found))
        gone = sorted(name for name in found if allowed(name) and name not in names)
        if lacking or gone:
            raise UserError(
                "The folder and its hashes name different files.",
                where=str(sums),
                value=f"without a hash: {lacking[:3]}; missing: {gone[:3]}",
                remedy="carry the folder again, with its hashes",
            )
        return {name: found[name] for name in names}, SUMS
    traces = folder / ".cache" / "huggingface" / "download"
    if traces.is_dir():
        return _traced(traces, names), "what the download noted (.cache/huggingface)"
    return {}, "nothing: no hashes lie beside the files, so that only sizes and headers were checked"


def _traced(traces: Path, names: list[str]) -> dict[str, RemoteFile]:
    """Of each `<name>.metadata` the second line: SHA-256 of a large file, Git's blob id of a small one."""
    found = {}
    for name in names:
        trace = traces / f"{name}.metadata"
        if trace.is_file():
            lines = trace.read_text(encoding="utf-8").splitlines()
            if len(lines) > 1 and re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", lines[1]):
                found[name] = RemoteFile(name, 0, lines[1], len(lines[1]) == 64)
    return found
