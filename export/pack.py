"""What becomes of each tensor of the base: packed to NVFP4 or FP8, merged, or copied; first as a plan, then as bytes.

The plan follows from headers alone. It fixes every output tensor's name, dtype and shape, hence the size of the export.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.errors import UserError
from qat.export.adapter import Adapter
from qat.export.merge import Module, effective, pieces
from qat.export.shards import TORCH_DTYPES, ShardWriter, TensorEntry, TensorSpec, chunks, read_tensor, tensor_spec
from qat.quant import fp8, nvfp4
from qat.quant.names import sharing_groups
from qat.quant.nvfp4 import BLOCK
from qat.quant.presets import FP8
from qat.quant.state import ModuleState, QuantState

_WEIGHT_DTYPES = ("BF16", "F16", "F32")


class Base(NamedTuple):
    """An opened base checkpoint: headers read and checked, no tensor in memory.

    Attributes:
        folder: Where it lies.
        entries: Its tensors.
        modules: Its modules.
        packed: Modules that stand for what is left of them after NVFP4, as in the training on a packed base.
    """

    folder: Path
    entries: dict[str, TensorEntry]
    modules: dict[str, Module]
    packed: frozenset[str] = frozenset()

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        return read_tensor(self.entries[name])


class Step(NamedTuple):
    """One module that is merged or packed, or one tensor that is copied.

    Attributes:
        sources: The base's tensors that it replaces.
        outputs: The tensors that are written.
        module: None for a copy.
        state: The scales to pack with; None for a module that is merged only.
    """

    sources: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    module: Module | None = None
    state: ModuleState | None = None


def make_plan(base: Base, adapters: Sequence[Adapter], state: QuantState | None) -> list[Step]:
    """Decide what is written for every tensor of the base, in the base's order.

    Raises:
        UserError: An adapter or the quantizer state does not fit the base (see `check_state`).
    """
    touched = {name for adapter in adapters for name in adapter.factors} | set(state.modules if state else ())
    touched |= base.packed
    by_tensor = {tensor: base.modules[name] for name in sorted(touched) for tensor in base.modules[name].tensors}
    done: set[str] = set()
    plan: list[Step] = []
    for tensor, entry in base.entries.items():
        module = by_tensor.get(tensor)
        if module is None:
            plan.append(Step((tensor,), (TensorSpec(tensor, entry.dtype, entry.shape, entry.nbytes),)))
        elif module.name not in done:
            done.add(module.name)
            plan.append(_module_step(module, state.modules.get(module.name) if state else None))
    return plan


def check_state(base: Base, state: QuantState, config: Mapping[str, Any]) -> None:
    """Check that the quantizers' state can be packed into this base and served.

    Raises:
        UserError: A module that the base lacks, or that the preset quantizes and the state forgets; a weight that
            its format cannot hold; an amax of the wrong shape; scales that differ within a group that the server
            computes as one.
    """
    unknown = sorted(set(state.modules) - set(base.modules))
    if unknown:
        raise UserError(
            "The quantizer state names modules that the base does not have.",
            where=str(base.folder),
            value=f"{len(unknown)} modules, first: {unknown[0]}",
            remedy="Give the base checkpoint that the model was calibrated on.",
        )
    wanted = state.precision().formats(config)
    forgotten = sorted(set(wanted) - set(state.modules) - set(state.excluded))
    if forgotten:
        raise UserError(
            f"The quantizer state has no scales for modules that the preset {state.preset} quantizes.",
            value=f"{len(forgotten)} modules, first: {forgotten[0]}",
            remedy="Calibrate again, or exclude the modules by name.",
        )
    other = [name for name, module in state.modules.items() if wanted.get(name, module.format) != module.format]
    if other:
        raise UserError(
            f"The quantizer state has modules in another format than the preset {state.preset} asks for.",
            where=other[0],
            value=f"{state.modules[other[0]].format}, not {wanted[other[0]]}",
            remedy="Calibrate again.",
        )
    both = sorted(set(state.modules) & set(state.excluded))
    if both:
        raise UserError("The quantizer state excludes modules that it has scales for.", value=", ".join(both[:3]))
    for name, scales in state.modules.items():
        module = base.modules[name]
        block = 1 if scales.format == FP8 else BLOCK
        if module.dtype not in _WEIGHT_DTYPES or module.shape[-1] % block:
            raise UserError(
                f"The weight cannot be packed: it must be {', '.join(_WEIGHT_DTYPES)}, with rows in blocks of {block}.",
                where=name,
                value=f"{module.dtype}, shape {module.shape}",
                remedy="Exclude the module in the preset.",
            )
        _check_amax(name, "weight_amax", scales.weight_amax, module.shape[:1] if module.is_experts else ())
        if scales.input_amax is not None:
            _check_amax(name, "input_amax", scales.input_amax, ())
    for group in sharing_groups(state.modules):
        if not all(_same(state.modules[group[0]], state.modules[name]) for name in group[1:]):
            raise UserError(
                "Weights that the server computes as one have different scales.",
                where=", ".join(group),
                remedy="Share the amax of the group right after calibration: these scales would be merged.",
            )


def write_tensors(base: Base, plan: Sequence[Step], adapters: Sequence[Adapter], writer: ShardWriter) -> Iterator[int]:
    """Write every tensor of the plan; memory holds one module.

    Yields:
        After each step the number of source bytes that it has dealt with.
    """
    for step in plan:
        if step.module is None:
            writer.write_bytes(step.sources[0], chunks(base.entries[step.sources[0]]))
        else:
            for name, tensor in module_tensors(step, base, adapters):
                writer.write(name, tensor)
        yield sum(base.entries[source].nbytes for source in step.sources)


def module_tensors(step: Step, base: Base, adapters: Sequence[Adapter]) -> Iterator[tuple[str, Tensor]]:
    """Compute a merged or packed module's tensors as they stand in the export, by name."""
    module = step.module
    if module is None:
        raise ValueError("a copied tensor has no module")
    deltas = (adapter.factors[module.name].load() for adapter in adapters if module.name in adapter.factors)
    weight = effective(module, base.read, deltas, packed=module.name in base.packed)
    if step.state is None:
        yield from zip(module.tensors, pieces(module, weight), strict=True)
        return
    # One tensor of the disk at a time: the float32 work space of 128 experts at once would be many times the module.
    amaxes = tensor_amaxes(module, step.state)
    for tensor, piece, amax in zip(module.tensors, pieces(module, weight), amaxes, strict=True):
        scales = ModuleState(amax, step.state.input_amax, step.state.format)
        for suffix, packed in packed_weight(piece, scales).items():
            yield f"{tensor.removesuffix('weight')}{suffix}", packed


def packed_weight(weight: Tensor, scales: ModuleState) -> dict[str, Tensor]:
    """Pack one weight.

    Args:
        weight: (out, in).
        scales: Its ranges, both ().

    Returns:
        The tensors of the checkpoint by the last part of their names, in the order of `packed_specs`.
    """
    arithmetic = fp8 if scales.format == FP8 else nvfp4
    packed: dict[str, Tensor] = arithmetic.quantize_weight(weight, scales.weight_amax)._asdict()
    if scales.input_amax is not None:
        packed["input_scale"] = arithmetic.tensor_scale(scales.input_amax)
    return packed


def tensor_amaxes(module: Module, state: ModuleState) -> Tensor:
    """Spread a module's weight amax over its tensors on disk: shape (tensors,), float32."""
    amax = state.weight_amax.float().reshape(-1)
    return amax.repeat_interleave(len(module.tensors) // amax.numel())


def packed_specs(tensor: str, shape: Sequence[int], state: ModuleState) -> tuple[TensorSpec, ...]:
    """Describe the tensors that replace one packed weight of shape (out, in)."""
    out_features, in_features = shape
    specs = [
        tensor_spec(tensor, torch.uint8, (out_features, in_features // 2)),
        tensor_spec(f"{tensor}_scale", torch.float8_e4m3fn, (out_features, in_features // BLOCK)),
        tensor_spec(f"{tensor}_scale_2", torch.float32, ()),
    ]
    if state.format == FP8:
        specs = [
            tensor_spec(tensor, torch.float8_e4m3fn, (out_features, in_features)),
            tensor_spec(f"{tensor}_scale", torch.float32, ()),
        ]
    if state.input_amax is not None:
        specs.append(tensor_spec(f"{tensor.removesuffix('.weight')}.input_scale", torch.float32, ()))
    return tuple(specs)


def _module_step(module: Module, state: ModuleState | None) -> Step:
    shape = (module.shape[-2] * (module.shape[0] if module.is_experts else 1) // len(module.tensors), module.shape[-1])
    outputs: list[TensorSpec] = []
    for tensor in module.tensors:
        outputs += (
            packed_specs(tensor, shape, state) if state else [tensor_spec(tensor, TORCH_DTYPES[module.dtype], shape)]
        )
    return Step(module.tensors, tuple(outputs), module, state)


def _check_amax(module: str, name: str, amax: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(amax.shape) != shape:
        raise UserError(
            "A scale of the quantizer state has the wrong shape.",
            where=f"{module}.{name}",
            value=f"{tuple(amax.shape)}, expected {shape}",
        )


def _same(one: ModuleState, other: ModuleState) -> bool:
    inputs = (one.input_amax, other.input_amax)
    if one.format != other.format or (inputs[0] is None) != (inputs[1] is None):
        return False
    same_input = inputs[0] is None or inputs[1] is None or torch.equal(inputs[0], inputs[1])
    return same_input and torch.equal(one.weight_amax, other.weight_amax)
