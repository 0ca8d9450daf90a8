"""Proof that an export is what the forward uses: every tensor is read again and compared by another path.

The writer goes from float weights through its own byte layout; the check goes back: the safetensors library reads both
checkpoints, the stored codes and scales are unpacked and compared with `fake_quant_weight` of the effective weight,
which is what training ran, and with a fresh quantization byte for byte. Nothing of the writer's plan is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qat.export.adapter import Adapter, packed_below, read_adapter
from qat.export.config import read_config
from qat.export.merge import Module, effective, find_modules
from qat.export.report import ExportMismatch, VerifyReport
from qat.export.shards import TensorEntry, chunks, read_entries
from qat.progress import Progress
from qat.quant import fp8, nvfp4
from qat.quant.presets import FP8, NVFP4, W4A16
from qat.quant.state import ModuleState, QuantState

_MAX_FAULTS = 20
# The tensors of a weight in each format, by the last part of their names.
_SUFFIXES = {
    NVFP4: ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    W4A16: ("weight", "weight_scale", "weight_scale_2"),
    FP8: ("weight", "weight_scale", "input_scale"),
}
# amax / this: the largest magnitude of the codes times that of the block scales, where there are any.
_INPUT_DIVISOR = {NVFP4: 6.0 * 448.0, FP8: 448.0}


def verify_export(
    out: Path,
    base: Path,
    adapters: Sequence[Path],
    quant_state: Path | None,
    *,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare an exported checkpoint with base, adapters and quantizer state.

    Args:
        out: The exported folder.
        base: The checkpoint that it was made from.
        adapters: As they were given to `export_checkpoint`, in order.
        quant_state: As it was given to `export_checkpoint`; None for a merged BF16 export.
        progress: Told the percentage of the base's bytes that are dealt with.

    Returns:
        The counts, with `differing_bytes == 0` and `differing_values == 0`.

    Raises:
        UserError: A file is missing, truncated or damaged, or an input does not fit the base.
        ExportMismatch: Tensors are missing, surplus, not finite or differ; it carries the report.
    """
    base_entries, out_entries = read_entries(base), read_entries(out)
    modules = find_modules(base_entries, base)
    model_type = read_config(base)["model_type"]
    read_adapters = [read_adapter(folder, modules, model_type) for folder in adapters]
    scales = QuantState.load(quant_state).modules if quant_state else {}
    tally = _Tally()
    packed = {tensor: state.format for name, state in scales.items() for tensor in modules[name].tensors}
    _compare_names(base_entries, out_entries, packed, tally)
    total, done = sum(entry.nbytes for entry in base_entries.values()), 0
    with _Reader(base_entries) as read_base, _Reader(out_entries) as read_out:
        below = set(packed_below(read_adapters, adapters))
        changed = {name for adapter in read_adapters for name in adapter.factors} | set(scales) | below
        in_modules = {tensor for name in changed for tensor in modules[name].tensors}
        for name, entry in base_entries.items():
            if name not in in_modules:
                _compare_copy(name, entry, out_entries, tally)
                done += entry.nbytes
                _tell(progress, done, total)
        for name in sorted(changed):
            _compare_module(modules[name], read_adapters, scales.get(name), read_base, read_out, tally, name in below)
            done += sum(base_entries[tensor].nbytes for tensor in modules[name].tensors)
            _tell(progress, done, total)
    report = tally.report()
    if report.faults:
        raise ExportMismatch(str(out), report)
    return report


class _Tally:
    """Counts on the way to a `VerifyReport`."""

    def __init__(self) -> None:
        self.packed = self.merged = self.copied = 0
        self.compared_bytes = self.differing_bytes = self.differing_values = 0
        self.faults: list[str] = []

    def fault(self, line: str) -> None:
        if len(self.faults) < _MAX_FAULTS:
            self.faults.append(line)

    def compare(self, name: str, stored: Tensor | None, expected: Tensor) -> None:
        """Compare dtype, shape and bytes; what is missing or has another form differs in all its bytes."""
        size = expected.numel() * expected.element_size()
        self.compared_bytes += size
        if stored is None or stored.dtype != expected.dtype or stored.shape != expected.shape:
            found = "missing" if stored is None else f"{stored.dtype} {tuple(stored.shape)}"
            self.differing_bytes += size
            self.fault(f"{name}: {found} instead of {expected.dtype} {tuple(expected.shape)}")
            return
        differing = int((_as_bytes(stored) != _as_bytes(expected)).sum())
        if differing:
            self.differing_bytes += differing
            self.fault(f"{name}: {differing} of {size} bytes differ")

    def report(self) -> VerifyReport:
        return VerifyReport(
            self.packed,
            self.merged,
            self.copied,
            self.compared_bytes,
            self.differing_bytes,
            self.differing_values,
            tuple(self.faults),
        )


class _Reader:
    """Read tensors by name through the safetensors library; each file is opened once."""

    def __init__(self, entries: dict[str, TensorEntry]) -> None:
        self._entries = entries
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> _Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __call__(self, name: str) -> Tensor:
        path = self._entries[name].file
        if path not in self._open:
            self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        tensor: Tensor = self._open[path].get_tensor(name)
        return tensor

    def get(self, name: str) -> Tensor | None:
        """Read a tensor that may be missing."""
        return self(name) if name in self._entries else None


def _compare_names(
    base: dict[str, TensorEntry], out: dict[str, TensorEntry], packed: dict[str, str], tally: _Tally
) -> None:
    expected = set(base) - set(packed)
    for tensor, kind in packed.items():
        expected.update(f"{tensor.removesuffix('weight')}{suffix}" for suffix in _SUFFIXES[kind])
    for name in sorted(expected - set(out)):
        tally.fault(f"{name}: missing")
    for name in sorted(set(out) - expected):
        tally.fault(f"{name}: neither in the base nor a scale of a packed weight")


def _compare_copy(name: str, entry: TensorEntry, out: dict[str, TensorEntry], tally: _Tally) -> None:
    tally.copied += 1
    tally.compared_bytes += entry.nbytes
    stored = out.get(name)
    if stored is None:
        tally.differing_bytes += entry.nbytes
        return
    if (stored.dtype, stored.shape) != (entry.dtype, entry.shape):
        tally.differing_bytes += entry.nbytes
        tally.fault(f"{name}: {stored.dtype} {stored.shape} instead of {entry.dtype} {entry.shape}")
        return
    differing = sum(_differing(one, other) for one, other in zip(chunks(entry), chunks(stored), strict=True))
    if differing:
        tally.differing_bytes += differing
        tally.fault(f"{name}: {differing} of {entry.nbytes} bytes differ")


def _compare_module(
    module: Module,
    adapters: Sequence[Adapter],
    scales: ModuleState | None,
    read_base: _Reader,
    read_out: _Reader,
    tally: _Tally,
    packed: bool,
) -> None:
    deltas = (adapter.factors[module.name].load() for adapter in adapters if module.name in adapter.factors)
    weight = effective(module, read_base, deltas, packed=packed)
    per_expert = len(module.tensors) // module.shape[0] if module.is_experts else 1
    for number, (tensor, piece) in enumerate(_tensors_of(module, weight)):
        if scales is None:
            tally.merged += 1
            tally.compare(tensor, read_out.get(tensor), piece)
            continue
        amax = scales.weight_amax[number // per_expert] if module.is_experts else scales.weight_amax
        _compare_packed(tensor.removesuffix(".weight"), piece, scales._replace(weight_amax=amax), read_out, tally)


def _compare_packed(name: str, weight: Tensor, scales: ModuleState, read_out: _Reader, tally: _Tally) -> None:
    """Compare the tensors of one weight (out, in) with a fresh quantization, and what they unpack to with the forward.

    Args:
        name: The module's name on disk.
        weight: Its effective weight.
        scales: Its ranges, both ().
        read_out: The export.
        tally: Counts up.
    """
    tally.packed += 1
    suffixes = _SUFFIXES[scales.format]
    stored = {suffix: read_out.get(f"{name}.{suffix}") for suffix in suffixes}
    amax = scales.weight_amax
    fresh = fp8.quantize_weight(weight, amax) if scales.format == FP8 else nvfp4.quantize_weight(weight, amax)
    expected = [*fresh]
    if scales.input_amax is not None:
        expected.append(scales.input_amax.float() / _INPUT_DIVISOR[scales.format])
    for suffix, tensor in zip(suffixes, expected, strict=True):
        tally.compare(f"{name}.{suffix}", stored[suffix], tensor)
    for suffix in suffixes[1:]:
        scale = stored[suffix]
        if scale is not None and not bool((torch.isfinite(scale.float()) & (scale.float() > 0)).all()):
            tally.fault(f"{name}.{suffix}: a scale is zero, negative or not finite")
    found = [stored[suffix] for suffix in suffixes[: len(fresh)]]
    codes = [tensor for tensor in found if tensor is not None]
    if len(codes) < len(fresh) or codes[0].shape != fresh.weight.shape:
        return
    if scales.format == FP8:
        unpacked = fp8.dequantize(fp8.PackedFp8(*codes), weight.dtype)
        forward = fp8.fake_quant_weight(weight, amax)
    else:
        unpacked = nvfp4.dequantize(nvfp4.Packed(*codes), weight.dtype)
        forward = nvfp4.fake_quant_weight(weight, amax)
    differing = int((unpacked != forward).sum())
    if differing:
        tally.differing_values += differing
        tally.fault(f"{name}.weight: {differing} of {weight.numel()} weights differ from the forward's")


def _tensors_of(module: Module, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not module.is_experts:
        yield module.tensors[0], weight
        return
    per_expert = len(module.tensors) // module.shape[0]
    for expert in range(module.shape[0]):
        names = module.tensors[expert * per_expert : (expert + 1) * per_expert]
        yield from zip(names, weight[expert].chunk(per_expert, dim=0), strict=True)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _differing(one: bytes, other: bytes) -> int:
    if one == other:
        return 0
    return sum(a != b for a, b in zip(one, other, strict=True))


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress.update(100 * done // max(total, 1))
