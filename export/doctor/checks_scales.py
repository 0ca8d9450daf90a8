"""Checks of the scales: one set for every quantized weight, of the right dtype and shape, finite, in range, and shared.

Scalar scales are a few bytes each and always read; the block scales (`check_blocks`) are as many as one in sixteen
weights and read only when asked for.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping

import torch

from qat.export.doctor.findings import Finding, Severity, examples
from qat.export.doctor.folder import CheckpointView, opened
from qat.export.doctor.header import TensorInfo
from qat.export.doctor.precision import MIXED, Claim, WeightModule, claims, weight_modules
from qat.quant import BLOCK
from qat.quant.names import sharing_groups
from qat.quant.nvfp4 import E2M1_MAX, E4M3_MAX

_EXPORT_AGAIN = "Export again; the tensors cannot be repaired without the weights that they were made from."
_CALIBRATE = "Calibrate again with samples that reach every module, and export again."

#: Largest magnitudes (amax) that trained weights and activations have; outside, the scale is a wrong one.
_AMAX_RANGES = {"weight": (1e-6, 1e4), "input": (1e-6, 1e6)}
#: A tensor whose largest block scale is this far below E4M3's largest wastes the scales' range on nothing.
_UNUSED_RANGE = 64
_SCALAR_FORMATS = {"F32": "<f", "F16": "<e", "F64": "<d"}
_KV_SCALES = ("k_scale", "v_scale")


def check_scales(view: CheckpointView, base: CheckpointView | None) -> Iterator[Finding]:
    """Check the scales by headers, and the values of those that are single numbers.

    Args:
        view: The checkpoint.
        base: Not needed: scales are judged by themselves.

    Yields:
        Findings.
    """
    del base
    modules = weight_modules(view)
    claim = next(iter(claims(view)), None)
    quantized = {name: module for name, module in modules.items() if module.is_quantized}
    yield from _orphans(view, quantized)
    yield from _layout(quantized, claim)
    scalars = read_scalars(view, (info for module in quantized.values() for info in module.scales.values()))
    cache = {name: info for name, info in view.tensors.items() if name.rpartition(".")[2] in _KV_SCALES}
    scalars |= read_scalars(view, cache.values())
    yield from _values(scalars, quantized)
    yield from _sharing(scalars, quantized)
    yield from _cache_scales(cache, claim, modules)


def check_blocks(view: CheckpointView, base: CheckpointView | None) -> Iterator[Finding]:
    """Check every block scale of the NVFP4 weights; memory holds one weight's.

    Args:
        view: The checkpoint.
        base: Not needed.

    Yields:
        Findings.
    """
    del base
    invalid: list[str] = []
    zero: list[str] = []
    small: list[str] = []
    for module in weight_modules(view).values():
        info = module.scales.get("weight_scale")
        if module.precision != "NVFP4" or info is None or info.dtype != "F8_E4M3" or not info.elements:
            continue
        scale = view.load(info.name).float()
        if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
            invalid.append(module.name)
        elif 2 * int((scale == 0).sum()) > scale.numel():
            zero.append(module.name)
        elif float(scale.max()) * _UNUSED_RANGE < E4M3_MAX:
            small.append(module.name)
    if invalid:
        problem = f"Block scales that are NaN or negative: {examples(invalid)}"
        consequence = 'vLLM takes NaN for a scale that "was never loaded" and stops; negative ones flip signs.'
        yield Finding("block_scale_value", Severity.ERROR, "weight_scale", problem, consequence, _EXPORT_AGAIN)
    if zero:
        problem = f"More than half of the block scales are zero: {examples(zero)}"
        consequence = "These weights are served as zeros."
        yield Finding("block_scale_zero", Severity.ERROR, "weight_scale", problem, consequence, _EXPORT_AGAIN)
    if small:
        problem = f"The largest block scale uses less than 1/{_UNUSED_RANGE} of the range: {examples(small)}"
        consequence = "The tensor scale was taken from a far larger weight: small blocks are rounded to zero."
        yield Finding("block_scale_range", Severity.WARNING, "weight_scale", problem, consequence, _CALIBRATE)


def read_scalars(view: CheckpointView, infos: Iterable[TensorInfo]) -> dict[str, float]:
    """Read tensors of a single number; others, and dtypes that are no floats, are left out.

    Every file is opened once and read forwards: a checkpoint of 6,000 quantized experts has 12,000 of them.
    """
    by_shard: dict[str, list[TensorInfo]] = {}
    for info in infos:
        if info.elements == 1 and info.dtype in ("BF16", *_SCALAR_FORMATS):
            by_shard.setdefault(info.shard, []).append(info)
    values: dict[str, float] = {}
    for shard, found in by_shard.items():
        try:
            with opened(view.folder, shard) as descriptor:
                for info in sorted(found, key=lambda info: info.start):
                    values[info.name] = _decode(info.dtype, os.pread(descriptor, info.nbytes, info.start))
        except (OSError, struct.error):
            continue  # cut off meanwhile; reading has reported what it could not open
    return values


def _decode(dtype: str, raw: bytes) -> float:
    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    return float(struct.unpack(_SCALAR_FORMATS[dtype], raw)[0])


def _orphans(view: CheckpointView, quantized: Mapping[str, WeightModule]) -> Iterator[Finding]:
    orphans = []
    for name in view.tensors:
        module, _, leaf = name.rpartition(".")
        if leaf in ("weight_scale", "weight_scale_2", "input_scale") and module not in quantized:
            orphans.append(name)
    if orphans:
        yield Finding(
            "scale_orphan",
            Severity.ERROR,
            "tensors",
            f"Scales without a quantized weight beside them: {examples(orphans)}",
            "The server has no place for them and stops, or takes an unquantized weight for a packed one.",
            _EXPORT_AGAIN,
        )


def _layout(quantized: Mapping[str, WeightModule], claim: Claim | None) -> Iterator[Finding]:
    missing: list[str] = []
    wrong: dict[str, list[str]] = {"scale_dtype": [], "scale_shape": []}
    for name, module in quantized.items():
        algorithm = claim.algorithm if claim else ""
        if algorithm == MIXED and claim:
            algorithm = claim.layers.get(name, "")
        for leaf, dtype, shapes in _expected(module, algorithm):
            info = module.scales.get(leaf)
            if info is None:
                missing.append(f"{name}.{leaf}")
            elif info.dtype != dtype:
                wrong["scale_dtype"].append(f"{info.name} is {info.dtype}, not {dtype}")
            elif info.shape not in shapes:
                wrong["scale_shape"].append(f"{info.name} is {list(info.shape)}, not {list(shapes[0])}")
    if missing:
        consequence = "vLLM multiplies by memory that nothing was written to, or stops."
        problem = f"Quantized weights lack scales: {examples(missing)}"
        yield Finding("scale_missing", Severity.ERROR, "tensors", problem, consequence, _EXPORT_AGAIN)
    for code, found in wrong.items():
        if found:
            consequence = "The server refuses the tensor, or reads its bytes as other numbers."
            yield Finding(code, Severity.ERROR, "tensors", examples(found), consequence, _EXPORT_AGAIN)


def _expected(module: WeightModule, algorithm: str) -> Iterator[tuple[str, str, tuple[tuple[int, ...], ...]]]:
    """The scales that must stand beside a weight: name, dtype, allowed shapes."""
    scalar = ((), (1,))
    if module.precision == "NVFP4":
        *rows, packed = module.weight.shape
        yield "weight_scale", "F8_E4M3", ((*rows, -(-2 * packed // BLOCK)),)
        yield "weight_scale_2", "F32", scalar
        if algorithm == "NVFP4":
            yield "input_scale", "F32", scalar
    elif algorithm == "FP8":
        yield "weight_scale", "F32", scalar
        yield "input_scale", "F32", scalar


def _values(scalars: Mapping[str, float], quantized: Mapping[str, WeightModule]) -> Iterator[Finding]:
    invalid = [f"{name} = {value!r}" for name, value in scalars.items() if not 0 < value < math.inf]
    if invalid:
        yield Finding(
            "scale_value",
            Severity.ERROR,
            "tensors",
            f"Scales that are zero, negative or not finite: {examples(invalid)}",
            "The module's output is zero, NaN or infinite. A zero input scale: calibration never reached the module.",
            _CALIBRATE,
        )
    outside = []
    for name, value in scalars.items():
        module, _, leaf = name.rpartition(".")
        if leaf in _KV_SCALES or module not in quantized or not 0 < value < math.inf:
            continue
        largest = E4M3_MAX * (E2M1_MAX if quantized[module].precision == "NVFP4" else 1.0)
        low, high = _AMAX_RANGES["input" if leaf == "input_scale" else "weight"]
        if not low <= value * largest <= high:
            outside.append(f"{name} = {value:.3g} (amax {value * largest:.3g})")
    if outside:
        consequence = "Values are rounded to zero, or cut off: no trained module has such a scale."
        problem = f"Scales out of range: {examples(outside)}"
        yield Finding("scale_range", Severity.WARNING, "tensors", problem, consequence, _CALIBRATE)


def _sharing(scalars: Mapping[str, float], quantized: Mapping[str, WeightModule]) -> Iterator[Finding]:
    """Compare the scales of weights that vLLM computes as one; it keeps one scale of them."""
    weights: list[str] = []
    inputs: list[str] = []
    for group in sharing_groups(name for name, module in quantized.items() if module.precision == "NVFP4"):
        if _unequal(scalars, group, "weight_scale_2"):
            weights.append("/".join((group[0], *(name.rpartition(".")[2] for name in group[1:]))))
        if _unequal(scalars, group, "input_scale"):
            inputs.append("/".join((group[0], *(name.rpartition(".")[2] for name in group[1:]))))
    experts: dict[str, list[str]] = {}
    for name in quantized:
        parent, found, rest = name.partition(".experts.")
        if found:
            # Gate and up have one input.
            leaf = rest.rpartition(".")[2].replace("gate_proj", "up_proj")
            experts.setdefault(f"{parent}.experts.*.{leaf}", []).append(name)
    unlike = [name for name, group in experts.items() if _unequal(scalars, group, "input_scale")]
    if weights:
        yield Finding(
            "scale_not_shared",
            Severity.ERROR,
            "weight_scale_2",
            f"Weights that the server computes as one have different tensor scales: {examples(weights)}",
            "vLLM keeps one of them (the largest; the gate's in experts) and reads the other weights scaled wrongly.",
            "Share the amax of q, k, v and of gate, up right after calibration, and export again.",
        )
    if inputs:
        yield Finding(
            "scale_input_not_shared",
            Severity.WARNING,
            "input_scale",
            f"Weights that the server computes as one have different input scales: {examples(inputs)}",
            "vLLM quantizes the input once, with the largest: activations are rounded otherwise than in calibration.",
            "Share the input scale of the group, and export again.",
        )
    if unlike:
        yield Finding(
            "scale_experts_input",
            Severity.WARNING,
            "input_scale",
            f"The experts of a layer have different input scales: {examples(unlike)}",
            "vLLM's kernels take the largest for all of them: activations are rounded otherwise than in calibration.",
            "Share the input scale over the experts of a layer, and export again.",
        )


def _unequal(scalars: Mapping[str, float], modules: Iterable[str], leaf: str) -> bool:
    return len({scalars[key] for module in modules if (key := f"{module}.{leaf}") in scalars}) > 1


def _cache_scales(
    cache: Mapping[str, TensorInfo], claim: Claim | None, modules: Mapping[str, WeightModule]
) -> Iterator[Finding]:
    announced = claim.kv_cache if claim else ""
    if cache and not announced:
        yield Finding(
            "kv_scale_ignored",
            Severity.WARNING,
            claim.place if claim else "tensors",
            f"Scales of a quantized KV cache, which no file announces: {examples(cache)}",
            "The server keeps the cache in the model's precision; the scales are not used.",
            "Name the cache's format (`kv_cache_quant_algo`, `kv_cache_scheme`), or remove the scales.",
        )
    attention = {name.rpartition(".")[0] for name in modules if name.endswith(".k_proj")}
    if not announced or not attention:
        return
    if not cache:
        problem = f"The KV cache is {announced} and has no scales"
        consequence = "vLLM takes 1.0: right for caches calibrated with a constant amax, clipping above 448 otherwise."
        place = claim.place if claim else "tensors"
        yield Finding("kv_scale_default", Severity.NOTE, place, problem, consequence, "Nothing, where 1.0 is meant.")
        return
    lacking = []
    for parent in sorted(attention):
        absent = [
            leaf for leaf in _KV_SCALES if not {f"{parent}.{leaf}", f"{parent}.{leaf[0]}_proj.{leaf}"} & cache.keys()
        ]
        if absent:
            lacking.append(f"{parent} ({' and '.join(absent)})")
    if lacking:
        problem = f"Attention layers without their scales of the KV cache: {examples(lacking)}"
        consequence = "vLLM takes 1.0, or the other scale of the pair, where the other layers have a calibrated one."
        yield Finding("kv_scale_missing", Severity.WARNING, "tensors", problem, consequence, _CALIBRATE)
