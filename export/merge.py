"""The weights of a checkpoint as modules, and each module's effective weight: base plus adapters, in order.

A module is what the network multiplies by in one call: a linear's `weight`, or one projection of all routed experts of
a layer. On disk every expert has tensors of its own; in memory (and in adapters and `quant_state.safetensors`) the
experts of a layer are one tensor of shape (experts, out, in). The effective weight is always computed on that whole
tensor: a matrix product of another shape may round differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qat.errors import UserError
from qat.export.shards import TORCH_DTYPES, TensorEntry
from qat.quant.effective import effective_weight
from qat.quant.packed import through_nvfp4
from qat.train.base import training_device

_EXPERT_WEIGHT = re.compile(r"(?P<experts>.+\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)\.weight")


class Module(NamedTuple):
    """One weight of the network and the tensors that hold it on disk.

    Attributes:
        name: Its name in adapters' and quantizers' terms: `….mixer.in_proj`, `….mixer.experts.up_proj`.
        tensors: The checkpoint's tensors: one for a linear; for routed experts one per expert in order, or two where
            gate and up are one weight in memory (`gate_up_proj`: expert 0's gate, its up, expert 1's gate, …).
        shape: (out, in), or (experts, out, in).
        dtype: safetensors' name of the dtype.
    """

    name: str
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_experts(self) -> bool:
        """Whether this is a projection of all routed experts of a layer."""
        return len(self.shape) == 3


class LowRank(NamedTuple):
    """What one adapter adds to one module: `scale * b @ a`.

    Attributes:
        a: (rank, in), or (experts, rank, in).
        b: (out, rank), or (experts, out, rank).
        scale: alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA.
    """

    a: Tensor
    b: Tensor
    scale: float


def find_modules(entries: Mapping[str, TensorEntry], where: Path) -> dict[str, Module]:
    """Find the modules of a checkpoint from its tensor names and shapes.

    Args:
        entries: The checkpoint's tensors.
        where: The checkpoint, for messages.

    Returns:
        Modules by name, in the order in which the checkpoint holds them.

    Raises:
        UserError: The experts of a layer are not numbered 0 … n-1 or differ in shape or dtype.
    """
    experts: dict[str, dict[int, str]] = {}
    modules: dict[str, Module] = {}
    for tensor, entry in entries.items():
        match = _EXPERT_WEIGHT.fullmatch(tensor)
        if match:
            experts.setdefault(f"{match['experts']}.{match['projection']}", {})[int(match["expert"])] = tensor
        elif tensor.endswith(".weight") and len(entry.shape) == 2:
            name = tensor.removesuffix(".weight")
            modules[name] = Module(name, (tensor,), entry.shape, entry.dtype)
    for name, numbered in experts.items():
        parent, _, projection = name.rpartition(".")
        if projection == "up_proj" and f"{parent}.gate_proj" in experts:
            continue
        parts = [numbered]
        if projection == "gate_proj":
            name, parts = f"{parent}.gate_up_proj", [numbered, experts.get(f"{parent}.up_proj", {})]
        modules[name] = _experts_module(name, parts, entries, where)
    return modules


def _experts_module(name: str, parts: list[dict[int, str]], entries: Mapping[str, TensorEntry], where: Path) -> Module:
    count = len(parts[0])
    if any(set(numbered) != set(range(count)) for numbered in parts):
        raise UserError(
            "The experts of a layer are not numbered without gaps.",
            where=f"{where}: {name}",
            value="; ".join(str(sorted(numbered)) for numbered in parts),
        )
    tensors = tuple(numbered[expert] for expert in range(count) for numbered in parts)
    kinds = {(entries[tensor].dtype, entries[tensor].shape) for tensor in tensors}
    if len(kinds) != 1 or len(entries[tensors[0]].shape) != 2:
        raise UserError(
            "The experts of a layer differ in shape or dtype.", where=f"{where}: {name}", value=sorted(kinds)
        )
    dtype, (out_features, in_features) = kinds.pop()
    return Module(name, tensors, (count, len(parts) * out_features, in_features), dtype)


def load_weight(module: Module, read: Callable[[str], Tensor]) -> Tensor:
    """Gather a module's weight from its tensors; shape and dtype as the module says."""
    if not module.is_experts:
        return read(module.tensors[0])
    weight = torch.empty(module.shape, dtype=TORCH_DTYPES[module.dtype])
    for piece, tensor in zip(pieces(module, weight), module.tensors, strict=True):
        piece.copy_(read(tensor))
    return weight


def pieces(module: Module, weight: Tensor) -> Tensor:
    """View a module's weight as the tensors on disk, in their order: (tensors, out of one tensor, in)."""
    return weight.view(len(module.tensors), -1, module.shape[-1])


def effective(
    module: Module, read: Callable[[str], Tensor], deltas: Iterable[LowRank], *, packed: bool = False
) -> Tensor:
    """Compute a module's effective weight: every adapter in order, one rounding to the weight's dtype for each.

    On a GPU, where there is one, as in training: its sums run in another order than a CPU's, and now and then (in one
    of 3.3 million values tried) round otherwise.

    Args:
        module: The module.
        read: Reads one tensor of the base checkpoint by name.
        deltas: What each adapter adds, first the adapter that was trained first.
        packed: The adapters were trained on the module in NVFP4: they are added to what that unpacks to.

    Returns:
        The weight that the forward uses (before quantization), in the base's shape and dtype, on the CPU.

    Raises:
        UserError: The result is not finite.
    """
    weight = load_weight(module, read)
    if packed:
        weight = through_nvfp4(weight)
    for delta in deltas:
        w, a, b = (tensor.to(training_device()) for tensor in (weight, delta.a, delta.b))
        weight = effective_weight(w, a, b, delta.scale)
    weight = weight.cpu()
    if not torch.isfinite(weight).all():
        raise UserError(
            "A weight is not finite after the adapters were applied.",
            where=module.name,
            remedy="The training has diverged or the base is damaged: train again from a whole base.",
        )
    return weight
