"""The header of one safetensors file, from a stranger: everything checked, every fault a finding, no tensor read.

A file is `<8-byte little-endian header length><JSON header><tensor bytes>`; the header gives each tensor's dtype, shape
and place. The rules are the safetensors library's (`SafeTensors::read_metadata`), which names the first fault only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from typing import NamedTuple, TypeGuard

from qat.export.doctor.findings import Finding, Severity, examples
from qat.export.doctor.safe_json import JsonBomb, JsonFault, parse_json

#: Bits of one element, for every dtype that safetensors 0.8 knows.
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_DIMENSIONS = 16
_MAX_EXTENT = 2**63 - 1

REFUSED = "Every reader of safetensors refuses the file: the checkpoint cannot be loaded."
WRITE_AGAIN = "Fetch or write the file again."


class TensorInfo(NamedTuple):
    """One tensor as its file's header describes it.

    Attributes:
        name: Its name.
        dtype: safetensors' name of the dtype.
        shape: Its shape.
        shard: Name of its file in the checkpoint folder.
        start: First byte, counted from the start of the file.
        end: The byte behind its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int

    @property
    def elements(self) -> int:
        """Number of stored elements; a packed NVFP4 weight holds two values in one."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


class Shard(NamedTuple):
    """One safetensors file.

    Attributes:
        name: Its name in the checkpoint folder.
        tensors: Its usable tensors in the order of their bytes.
        metadata: Its `__metadata__`; None where it has none.
        findings: What is wrong with it.
    """

    name: str
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str] | None
    findings: tuple[Finding, ...]


def read_shard(descriptor: int, name: str) -> Shard:
    """Read the header of one open safetensors file.

    A tensor that cannot be read (impossible entry, bytes outside the file) is a finding and left out of the result.
    """
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
        what = f"{size} bytes on disk, a header of {length} bytes announced"
        too_long = size >= 8 and length > _MAX_HEADER_BYTES
        code = "header_too_large" if too_long else "header_beyond_file"
        return Shard(name, (), None, (_refused(code, name, what),))
    try:
        header, repeated = parse_json(os.pread(descriptor, length, 8))
    except JsonFault as fault:
        code = "json_bomb" if isinstance(fault, JsonBomb) else "header_invalid"
        return Shard(name, (), None, (_refused(code, name, f"The header is not usable JSON: {fault}"),))
    if not isinstance(header, dict):
        return Shard(name, (), None, (_refused("header_invalid", name, "The header is no JSON object"),))
    findings: list[Finding] = []
    if repeated:
        problem = f"The header names twice: {examples(repeated)}"
        consequence = "Readers disagree about which of the two counts: one loads other bytes than another."
        findings.append(Finding("header_repeated_name", Severity.ERROR, name, problem, consequence, WRITE_AGAIN))
    metadata, about_metadata = _metadata(name, header)
    tensors, faults = _tensors(name, header, 8 + length)
    findings += (*about_metadata, *faults, *_layout_findings(name, tensors, 8 + length, size))
    inside = tuple(tensor for tensor in tensors if tensor.end <= size and _size_fits(tensor))
    return Shard(name, inside, metadata, tuple(findings))


def _tensors(shard: str, header: dict[str, object], data: int) -> tuple[list[TensorInfo], list[Finding]]:
    """The well-formed entries in the order of their bytes, and one finding per kind of malformed ones."""
    tensors: list[TensorInfo] = []
    faulty: dict[str, list[str]] = {"tensor_entry_invalid": [], "tensor_dtype_unknown": [], "tensor_size_wrong": []}
    for name, entry in header.items():
        fault, tensor = _tensor(shard, name, entry, data)
        if fault:
            faulty[fault].append(name)
        if tensor is not None:
            tensors.append(tensor)
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end, tensor.name))
    what = {
        "tensor_entry_invalid": "Entries without a usable dtype, shape or place",
        "tensor_dtype_unknown": "Tensors of a dtype that safetensors does not have",
        "tensor_size_wrong": "Tensors whose bytes do not fit their dtype and shape",
    }
    return tensors, [
        _refused(code, shard, f"{what[code]}: {examples(names)}") for code, names in faulty.items() if names
    ]


def _tensor(shard: str, name: str, entry: object, data: int) -> tuple[str, TensorInfo | None]:
    """One entry: the code of its fault or an empty string, and the tensor where its bytes can be placed."""
    if not isinstance(entry, dict) or not isinstance(dtype := entry.get("dtype"), str):
        return "tensor_entry_invalid", None
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (_extents(shape, _MAX_DIMENSIONS) and _extents(offsets, 2) and len(offsets) == 2):
        return "tensor_entry_invalid", None
    begin, end = offsets
    if begin > end:
        return "tensor_entry_invalid", None
    tensor = TensorInfo(name, dtype, tuple(shape), shard, data + begin, data + end)
    if dtype not in DTYPE_BITS:
        return "tensor_dtype_unknown", tensor
    return "" if _size_fits(tensor) else "tensor_size_wrong", tensor


def _size_fits(tensor: TensorInfo) -> bool:
    return tensor.elements * DTYPE_BITS.get(tensor.dtype, 0) == 8 * tensor.nbytes


def _extents(value: object, most: int) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(extent) is int and 0 <= extent <= _MAX_EXTENT for extent in value)
    )


def _layout_findings(shard: str, tensors: list[TensorInfo], data: int, size: int) -> Iterator[Finding]:
    """Compare neighbours: safetensors wants every byte behind the header to belong to exactly one tensor."""
    overlapping: list[str] = []
    behind_holes: list[str] = []
    position = data
    for tensor in tensors:
        if tensor.start < position and tensor.nbytes:
            overlapping.append(tensor.name)
        elif tensor.start > position:
            behind_holes.append(tensor.name)
        position = max(position, tensor.end)
    if overlapping:
        problem = f"Tensors share bytes with the one before them: {examples(overlapping)}"
        yield _refused("tensors_overlap", shard, problem)
    if behind_holes:
        yield _refused("tensors_hole", shard, f"Bytes that belong to no tensor lie before: {examples(behind_holes)}")
    if position > size:
        cut = [tensor.name for tensor in tensors if tensor.end > size]
        problem = f"{size} bytes on disk, {position} announced; cut off: {examples(cut)}"
        yield _refused("shard_truncated", shard, problem)
    elif position < size:
        yield _refused("shard_trailing_bytes", shard, f"{size - position} bytes follow the last tensor")


def _metadata(shard: str, header: dict[str, object]) -> tuple[dict[str, str] | None, list[Finding]]:
    """Take the metadata out of the header; None where there is none or it is unusable."""
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        return None, [_format_finding(shard, "has no metadata")]
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problem = "`__metadata__` is no mapping of strings to strings"
        return None, [_refused("metadata_invalid", shard, problem)]
    found = metadata.get("format")
    return metadata, [] if found == "pt" else [_format_finding(shard, f"says format {found!r}")]


def _format_finding(shard: str, found: str) -> Finding:
    return Finding(
        "metadata_format",
        Severity.NOTE,
        shard,
        f"The header {found}; PyTorch's files say 'pt'",
        "Some releases of Transformers refuse files without the format or take them for another framework's.",
        "`--fix` writes it.",
    )


def _refused(code: str, shard: str, problem: str) -> Finding:
    return Finding(code, Severity.ERROR, shard, problem, REFUSED, WRITE_AGAIN)
