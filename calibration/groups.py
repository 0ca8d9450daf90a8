"""The groups of weights whose sensitivity is measured, and what each takes in each format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qat.quant import BLOCK
from qat.quant.linears import linears
from qat.quant.presets import FP8, NVFP4, W4A16
from qat.train.base import weight_files
from qat.train.shapes import Weight, network_weights

_FLOAT32 = 4
_SCALES = {NVFP4: 2 * _FLOAT32, W4A16: _FLOAT32, FP8: 2 * _FLOAT32}
"""Bytes of the scalar scales beside one weight on disk."""


class Group(NamedTuple):
    """Weights that are quantized together.

    Attributes:
        name: `12.experts`, `9.mamba.in_proj` (layer and part); of all layers, the part alone.
        modules: The checkpoint's names.
        weights: Their shapes.
    """

    name: str
    modules: list[str]
    weights: list[Weight]

    @property
    def parameters(self) -> int:
        """Numbers in these weights."""
        return sum(weight.numbers for weight in self.weights)

    def bytes(self, kind: str) -> int:
        """Size on disk, scales included.

        Args:
            kind: `bf16` or one of `qat.quant.presets.FORMATS`.
        """
        if kind == "bf16":
            return 2 * self.parameters
        tensors = sum(weight.matrices * (2 if weight.name.endswith("gate_up_proj") else 1) for weight in self.weights)
        if kind == FP8:
            return self.parameters + tensors * _SCALES[kind]
        return self.parameters // 2 + self.parameters // BLOCK + tensors * _SCALES[kind]


def servable_groups(config: Mapping[str, Any]) -> list[Group]:
    """Divide a network into the smallest groups that may have a format of their own.

    Each layer's attention, each projection of Mamba, all routed experts of a layer, its shared experts, its dense
    feed-forward, its latent projections.

    Args:
        config: The model's `config.json`.
    """
    return _grouped(
        config, lambda layer, role, leaf: f"{layer}.{role}.{leaf}" if role == "mamba" else f"{layer}.{role}"
    )


def kinds_of_groups(config: Mapping[str, Any]) -> list[Group]:
    """Divide a network by kind of layer: attention, Mamba in and out, experts up and down, and so on.

    Args:
        config: The model's `config.json`.
    """
    return _grouped(config, lambda layer, role, leaf: role if role == "attention" else f"{role}.{leaf}")


def fixed_bytes(base: Path, groups: list[Group]) -> int:
    """Bytes of a checkpoint's tensors that are in none of the groups.

    Args:
        base: Folder of the BF16 checkpoint, safetensors.
        groups: With weights in BF16.
    """
    total = 0
    for file in weight_files(base):
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        total += file.stat().st_size - 8 - header
    return total - sum(group.bytes("bf16") for group in groups)


def _grouped(config: Mapping[str, Any], name_of: Any) -> list[Group]:
    shapes = {weight.name: weight for weight in network_weights(config)}
    groups: dict[str, Group] = {}
    for linear in linears(config):
        name = name_of(linear.layer, linear.role, linear.name.rpartition(".")[2])
        group = groups.setdefault(name, Group(name, [], []))
        group.modules.append(linear.name)
        group.weights.append(shapes[linear.name])
    return list(groups.values())
