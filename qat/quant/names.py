"""Names of modules and parameters: in memory, under PEFT's wrappers, and in the checkpoint.

Transformers 5 loads a Nemotron-H checkpoint (`backbone.layers.1.mixer.experts.0.up_proj.weight`) under other names
(`model.layers.1.mixer.experts.up_proj`, all experts in one tensor) and writes it back under the old ones. Everything
that qat stores uses the checkpoint's names; fused experts go by the name of the fused parameter
(`backbone.layers.1.mixer.experts.up_proj`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from qat.errors import UserError

# model_type -> (prefix in memory, prefix in the checkpoint)
_PREFIXES = {
    "nemotron_h": ("model.", "backbone."),
    "qwen3": ("model.", "model."),
    "qwen3_moe": ("model.", "model."),
    "llama": ("model.", "model."),
}
MODEL_TYPES = tuple(_PREFIXES)
"""The model types whose names are known."""

#: Modules whose weights a server multiplies in one call (vLLM's `qkv_proj`, `gate_up_proj`): they need one scale.
FUSED_WHEN_SERVED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

_PEFT_PREFIX = "base_model.model."
_FUSED_EXPERTS = re.compile(r"(?P<experts>.+\.experts)\.(?P<projection>gate_up_proj|up_proj|down_proj)")


class ExpertTensor(NamedTuple):
    """One expert's share of a fused parameter.

    Attributes:
        name: The checkpoint's tensor.
        expert: Index along the first dimension of the fused parameter.
        half: None for all rows; 0 or 1 for the first or second half of the rows (`gate_up_proj` holds gate, then up).
    """

    name: str
    expert: int
    half: int | None


def unwrapped(name: str) -> str:
    """Take PEFT's additions out of a module's or parameter's name.

    Args:
        name: For example `base_model.model.model.layers.0.mixer.in_proj.base_layer`.

    Returns:
        The name in the plain model: `model.layers.0.mixer.in_proj`.
    """
    return ".".join(part for part in name.removeprefix(_PEFT_PREFIX).split(".") if part != "base_layer")


def checkpoint_name(name: str, model_type: str) -> str:
    """Translate a name in memory (wrapped by PEFT or not) to the checkpoint's.

    Args:
        name: Of a module or parameter.
        model_type: `config.json`'s.

    Returns:
        The checkpoint's name; a fused expert parameter keeps its fused name.

    Raises:
        UserError: The model type is unknown.
    """
    memory, disk = _prefixes(model_type)
    name = unwrapped(name)
    return disk + name.removeprefix(memory) if name.startswith(memory) else name


def memory_name(name: str, model_type: str) -> str:
    """Translate a checkpoint's name to the plain model's, the inverse of `checkpoint_name`.

    Args:
        name: Of a module, of a fused expert parameter, or of a tensor that is not one expert's.
        model_type: `config.json`'s.

    Returns:
        The name in the model as Transformers builds it.

    Raises:
        UserError: The model type is unknown.
    """
    memory, disk = _prefixes(model_type)
    return memory + name.removeprefix(disk) if name.startswith(disk) else name


def expert_tensors(name: str, experts: int) -> list[ExpertTensor]:
    """List the checkpoint's tensors that together are one fused expert parameter.

    Args:
        name: Checkpoint name of the fused parameter, `….experts.up_proj`.
        experts: Number of experts.

    Returns:
        One tensor per expert, two for `gate_up_proj`; in the order of the fused parameter's rows.

    Raises:
        ValueError: The name is no fused expert parameter's.
    """
    match = _FUSED_EXPERTS.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} names no fused expert parameter")
    projection = match["projection"]
    halves = ((0, "gate_proj"), (1, "up_proj")) if projection == "gate_up_proj" else ((None, projection),)
    return [
        ExpertTensor(f"{match['experts']}.{expert}.{part}.weight", expert, half)
        for expert in range(experts)
        for half, part in halves
    ]


def is_fused_experts(name: str) -> bool:
    """Whether a name is that of a parameter which holds all routed experts of a layer."""
    return _FUSED_EXPERTS.fullmatch(name) is not None


def sharing_groups(modules: Iterable[str]) -> list[list[str]]:
    """Find the modules that a server fuses, so that one tensor scale has to serve all of them.

    Args:
        modules: Module names of one kind (memory or checkpoint).

    Returns:
        Groups of two or more names, members in the order q, k, v or gate, up; groups in the order of their first
        member's appearance.
    """
    by_parent: dict[str, set[str]] = {}
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        by_parent.setdefault(parent, set()).add(leaf)
    groups = []
    for parent, leaves in by_parent.items():
        for family in FUSED_WHEN_SERVED:
            members = [f"{parent}.{leaf}" for leaf in family if leaf in leaves]
            if len(members) > 1:
                groups.append(members)
    return groups


def _prefixes(model_type: str) -> tuple[str, str]:
    try:
        return _PREFIXES[model_type]
    except KeyError:
        raise UserError(
            "The module names of this model type are not known.",
            where="config.json: model_type",
            value=model_type,
            remedy=f"Use a model of type {', '.join(MODEL_TYPES)}.",
        ) from None
