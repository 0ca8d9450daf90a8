"""Safetensors checkpoints, read one tensor at a time and written at offsets that are known before the first byte.

A shard is `<8-byte little-endian header length><JSON header><tensor bytes>`. Shapes and dtypes of a whole export follow
from the base's headers alone, so every header can be written first and each tensor goes to its place when it is ready:
memory holds one module, never a shard, and the file system refuses a full disk before any work is done.

Tensors of the base that stay as they are move as raw bytes: no dtype is interpreted, none can be changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from qat.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CHUNK_BYTES = 16 << 20

#: safetensors' names of the dtypes that an export may have to compute with.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_DOWNLOAD_AGAIN = "Fetch or write the checkpoint again; this file is not whole."


class TensorEntry(NamedTuple):
    """Where one tensor lies: `offset` counts from the start of `file`, both sizes in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorSpec(NamedTuple):
    """A tensor that is going to be written; `dtype` is safetensors' name of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def tensor_spec(name: str, dtype: torch.dtype, shape: Sequence[int]) -> TensorSpec:
    """Describe a tensor of a torch dtype."""
    return TensorSpec(name, DTYPE_NAMES[dtype], tuple(shape), prod(shape) * dtype.itemsize)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of one safetensors file.

    Returns:
        Every tensor of the file, in the order of its bytes.

    Raises:
        UserError: The file is missing, truncated, has trailing bytes or is no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise UserError(
                    "The safetensors file is truncated or is no safetensors file: its header does not fit into it.",
                    where=str(path),
                    value=f"{size} bytes, header of {length} bytes announced",
                    remedy=_DOWNLOAD_AGAIN,
                )
            header = json.loads(file.read(length))
        entries = {
            name: TensorEntry(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
            for name, entry in header.items()
            if name != "__metadata__"
            for begin, end in [entry["data_offsets"]]
        }
    except FileNotFoundError:
        raise UserError("A file of the checkpoint is missing.", where=str(path), remedy=_DOWNLOAD_AGAIN) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "The header of the safetensors file cannot be read.",
            where=str(path),
            value=str(error),
            remedy=_DOWNLOAD_AGAIN,
        ) from error
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[0])))
    end = 8 + length
    for entry in entries.values():
        if entry.offset != end or entry.nbytes < 0:
            raise UserError(
                "The tensors of the safetensors file overlap or leave holes.", where=str(path), remedy=_DOWNLOAD_AGAIN
            )
        end += entry.nbytes
    if end != size:
        raise UserError(
            f"The safetensors file {'is truncated' if size < end else 'has bytes behind its last tensor'}.",
            where=str(path),
            value=f"{size} bytes on disk, {end} announced in the header",
            remedy=_DOWNLOAD_AGAIN,
        )
    return entries


def weight_files(folder: Path) -> dict[str, list[str]]:
    """Name the weight files of a checkpoint folder and the tensors that its index expects in each.

    Returns:
        File name to tensor names, in the order of the file names; an empty list where there is no index.

    Raises:
        UserError: The folder has no safetensors, several unindexed ones, or a broken index.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files: dict[str, list[str]] = {name: [] for name in sorted(set(weight_map.values()))}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                "The index of the checkpoint cannot be read.", where=str(index), value=repr(error)
            ) from error
        for tensor, name in weight_map.items():
            if Path(name).name != name:
                raise UserError("The index names a file outside the checkpoint.", where=str(index), value=name)
            files[name].append(tensor)
        return files
    found = sorted(path.name for path in folder.glob("*.safetensors")) if folder.is_dir() else []
    if SINGLE_NAME in found:
        return {SINGLE_NAME: []}
    raise UserError(
        "The folder holds no checkpoint in safetensors form." if not found else f"{INDEX_NAME} is missing.",
        where=str(folder),
        value=", ".join(found) or None,
        remedy=f"Give a folder with {SINGLE_NAME}, or with shards and {INDEX_NAME}; pickled weights are not read.",
    )


def chunks(entry: TensorEntry) -> Iterator[bytes]:
    """Yield the raw bytes of one tensor in pieces of at most `CHUNK_BYTES`."""
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        left = entry.nbytes
        while left:
            piece = file.read(min(CHUNK_BYTES, left))
            if not piece:
                raise UserError(
                    "The safetensors file became shorter while it was read.",
                    where=str(entry.file),
                    remedy=_DOWNLOAD_AGAIN,
                )
            left -= len(piece)
            yield piece


def read_tensor(entry: TensorEntry) -> Tensor:
    """Read one tensor into memory that it owns.

    Raises:
        UserError: Its dtype is none that an export computes with.
    """
    if entry.dtype not in TORCH_DTYPES:
        raise UserError("A tensor has a dtype that cannot be computed with.", where=str(entry.file), value=entry.dtype)
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
    buffer = bytearray(entry.nbytes)
    start = 0
    for piece in chunks(entry):
        buffer[start : start + len(piece)] = piece
        start += len(piece)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """Find every tensor of a checkpoint folder and check all headers.

    Returns:
        Tensors by name, in the order of files and bytes, so that a pass over them reads the disk forwards.

    Raises:
        UserError: No safetensors, a broken or incomplete index, a missing, truncated or damaged file.
    """
    entries: dict[str, TensorEntry] = {}
    for file_name, expected in weight_files(folder).items():
        header = read_header(folder / file_name)
        missing = sorted(set(expected) - set(header))
        if missing:
            raise UserError(
                "The index names tensors that their file does not hold.",
                where=str(folder / file_name),
                value=f"{len(missing)} missing, first: {missing[0]}",
                remedy=_DOWNLOAD_AGAIN,
            )
        wanted = set(expected) if expected else set(header)
        entries.update({name: entry for name, entry in header.items() if name in wanted})
    return entries


class _Place(NamedTuple):
    file: str
    offset: int
    nbytes: int


class ShardWriter:
    """Write a set of tensors, announced beforehand, in any order into one or more safetensors files.

    One file is called `model.safetensors`; several get the usual numbered names and an index. Within a file tensors are
    laid out by falling dtype size, then name, as the safetensors library does, so that each is aligned to its dtype.

    Args:
        folder: An existing folder.
        specs: Every tensor that will be written. Consecutive ones share a shard.
        max_shard_bytes: Limit of the tensor bytes in one file; a larger single tensor gets a file of its own.
    """

    def __init__(self, folder: Path, specs: Sequence[TensorSpec], max_shard_bytes: int) -> None:
        self._folder = folder
        self._places: dict[str, _Place] = {}
        self._missing = {spec.name for spec in specs}
        self._stack = ExitStack()
        self._descriptors: dict[str, int] = {}
        shards = split_into_shards(specs, max_shard_bytes)
        names = shard_names(len(shards))
        self.files: list[str] = list(names)
        with ExitStack() as on_error:
            on_error.callback(self._stack.close)
            for name, shard in zip(names, shards, strict=True):
                self._create(name, shard)
            on_error.pop_all()
        self.index: dict[str, object] | None = None
        if len(shards) > 1:
            weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
            total = sum(spec.nbytes for spec in specs)
            self.index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; its size must be the announced one."""
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self.write_bytes(name, [flat.view(torch.uint8).numpy().data] if flat.numel() else [])

    def write_bytes(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write one tensor from its raw bytes."""
        place = self._places[name]
        done = 0
        for piece in pieces:
            view = memoryview(piece)
            if done + len(view) > place.nbytes:
                raise RuntimeError(f"{name}: more than the announced {place.nbytes} bytes")
            _write_all(self._descriptors[place.file], view, place.offset + done)
            done += len(view)
        if done != place.nbytes:
            raise RuntimeError(f"{name}: {done} bytes written, {place.nbytes} announced")
        self._missing.remove(name)

    def finish(self) -> None:
        """Force every file to the disk; every announced tensor must have been written."""
        if self._missing:
            raise RuntimeError(f"{len(self._missing)} announced tensors were not written: {sorted(self._missing)[:3]}")
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)

    def _create(self, name: str, shard: Sequence[TensorSpec]) -> None:
        ordered = sorted(shard, key=lambda spec: (-_item_size(spec), spec.name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for spec in ordered:
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [start, start + spec.nbytes],
            }
            start += spec.nbytes
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)
        descriptor = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._stack.callback(os.close, descriptor)
        self._descriptors[name] = descriptor
        # Reserving the space shows a full disk now, not after an hour of packing.
        os.posix_fallocate(descriptor, 0, 8 + len(encoded) + start)
        _write_all(descriptor, memoryview(len(encoded).to_bytes(8, "little") + encoded), 0)
        offset = 8 + len(encoded)
        for spec in ordered:
            self._places[spec.name] = _Place(name, offset, spec.nbytes)
            offset += spec.nbytes


def split_into_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Cut a sequence of tensors greedily into consecutive groups of at most `max_shard_bytes` bytes each."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """Give the file names that Hugging Face checkpoints use for `count` shards."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _item_size(spec: TensorSpec) -> int:
    dtype = TORCH_DTYPES.get(spec.dtype)
    return dtype.itemsize if dtype is not None else spec.nbytes // max(prod(spec.shape), 1)


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


def file_sha256(path: Path) -> str:
    """Hash a file in pieces; the hexadecimal digest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
