"""What becomes of each tensor of the base: packed to NVFP4, merged, or copied; first as a plan, then as bytes.

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
from qat.quant.names import sharing_groups
from qat.quant.nvfp4 import BLOCK, quantize_weight, tensor_scale
from qat.quant.presets import Preset
from qat.quant.state import ModuleState, QuantState

_WEIGHT_DTYPES = ("BF16", "F16", "F32")


class Base(NamedTuple):
    """An opened base checkpoint: headers read and checked, no tensor in memory."""

    folder: Path
    entries: dict[str, TensorEntry]
    modules: dict[str, Module]

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
            NVFP4 cannot hold; an amax of the wrong shape; scales that differ within a group that the server computes
            as one.
    """
    unknown = sorted(set(state.modules) - set(base.modules))
    if unknown:
        raise UserError(
            "The quantizer state names modules that the base does not have.",
            where=str(base.folder),
            value=f"{len(unknown)} modules, first: {unknown[0]}",
            remedy="Give the base checkpoint that the model was calibrated on.",
        )
    forgotten = sorted(set(Preset(state.preset).quantized_modules(config)) - set(state.modules) - set(state.excluded))
    if forgotten:
        raise UserError(
            f"The quantizer state has no scales for modules that the preset {state.preset} quantizes.",
            value=f"{len(forgotten)} modules, first: {forgotten[0]}",
            remedy="Calibrate again, or exclude the modules by name.",
        )
    both = sorted(set(state.modules) & set(state.excluded))
    if both:
        raise UserError("The quantizer state excludes modules that it has scales for.", value=", ".join(both[:3]))
    for name, scales in state.modules.items():
        module = base.modules[name]
        if module.dtype not in _WEIGHT_DTYPES or module.shape[-1] % BLOCK:
            raise UserError(
                f"The weight cannot be packed: NVFP4 needs {', '.join(_WEIGHT_DTYPES)} and rows in blocks of {BLOCK}.",
                where=name,
                value=f"{module.dtype}, shape {module.shape}",
                remedy="Exclude the module in the preset.",
            )
        _check_amax(name, "weight_amax", scales.weight_amax, module.shape[:1] if module.is_experts else ())
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
    weight = effective(module, base.read, deltas)
    if step.state is None:
        yield from zip(module.tensors, pieces(module, weight), strict=True)
        return
    input_scale = tensor_scale(step.state.input_amax)
    # One tensor of the disk at a time: the float32 work space of 128 experts at once would be many times the module.
    amaxes = tensor_amaxes(module, step.state)
    for tensor, piece, amax in zip(module.tensors, pieces(module, weight), amaxes, strict=True):
        packed = quantize_weight(piece, amax)
        yield tensor, packed.weight
        yield f"{tensor}_scale", packed.weight_scale
        yield f"{tensor}_scale_2", packed.weight_scale_2
        yield f"{tensor.removesuffix('.weight')}.input_scale", input_scale


def tensor_amaxes(module: Module, state: ModuleState) -> Tensor:
    """Spread a module's weight amax over its tensors on disk: shape (tensors,), float32."""
    amax = state.weight_amax.float().reshape(-1)
    return amax.repeat_interleave(len(module.tensors) // amax.numel())


def packed_specs(tensor: str, shape: Sequence[int]) -> tuple[TensorSpec, ...]:
    """Describe the four tensors that replace one packed weight of shape (out, in)."""
    out_features, in_features = shape
    return (
        tensor_spec(tensor, torch.uint8, (out_features, in_features // 2)),
        tensor_spec(f"{tensor}_scale", torch.float8_e4m3fn, (out_features, in_features // BLOCK)),
        tensor_spec(f"{tensor}_scale_2", torch.float32, ()),
        tensor_spec(f"{tensor.removesuffix('.weight')}.input_scale", torch.float32, ()),
    )


def _module_step(module: Module, state: ModuleState | None) -> Step:
    shape = (module.shape[-2] * (module.shape[0] if module.is_experts else 1) // len(module.tensors), module.shape[-1])
    outputs: list[TensorSpec] = []
    for tensor in module.tensors:
        outputs += packed_specs(tensor, shape) if state else [tensor_spec(tensor, TORCH_DTYPES[module.dtype], shape)]
    return Step(module.tensors, tuple(outputs), module, state)


def _check_amax(module: str, name: str, amax: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(amax.shape) != shape:
        raise UserError(
            "A scale of the quantizer state has the wrong shape.",
            where=f"{module}.{name}",
            value=f"{tuple(amax.shape)}, expected {shape}",
        )


def _same(one: ModuleState, other: ModuleState) -> bool:
    return torch.equal(one.weight_amax, other.weight_amax) and torch.equal(one.input_amax, other.input_amax)
