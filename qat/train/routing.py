"""Where the router sends tokens, and how often an arm sends them elsewhere than the persona.

A router works in BF16 in every preset, but its input comes from quantized layers below: what is counted is the router
of the whole chain as it is served. A changed choice is not a rounding error of a few percent, it is another expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from qat.quant.experts import projections
from qat.quant.names import unwrapped

if TYPE_CHECKING:
    from torch import nn

Choices = dict[str, list[Tensor]]
"""Layer -> one tensor for each forward: experts of each token, int16 (tokens, k); padding included."""


class RouterStability(NamedTuple):
    """How many expert choices an arm makes otherwise than the persona, on the same tokens.

    Attributes:
        changed: Share of the (token, slot) pairs whose expert the persona did not choose for that token, all layers.
        layers: The same by layer, in the network's order.
        tokens: Tokens compared in each layer.
    """

    changed: float
    layers: dict[str, float]
    tokens: int


def routed_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Find fused experts by the plain model's names, under adapters too; empty for a dense model."""
    return {unwrapped(name): module for name, module in model.named_modules() if projections(module) is not None}


def chosen_experts(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """Read the router's choice from the call `forward(hidden_states, top_k_index, top_k_weights)` of fused experts.

    Returns:
        int64 (tokens, k).
    """
    index: Tensor = named["top_k_index"] if "top_k_index" in named else arguments[1]
    return index


@contextmanager
def record_choices(model: nn.Module) -> Iterator[Choices]:
    """Keep the experts that every token is sent to while the block runs, in two bytes each.

    Args:
        model: With fused experts; a dense one gives an empty record.

    Yields:
        The record; it grows with every forward.
    """
    record: Choices = {}
    handles: list[Any] = []
    for name, module in routed_experts(model).items():
        kept = record[name] = []
        handles.append(module.register_forward_pre_hook(_keeper(kept), with_kwargs=True))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def compare_choices(persona: Choices, arm: Choices, counted: list[Tensor]) -> RouterStability | None:
    """Compare two records of the same forwards.

    Args:
        persona: Of the BF16 persona.
        arm: Of the arm.
        counted: For each forward which tokens count, bool (tokens,).

    Returns:
        The shares; None for a dense model.
    """
    if not persona:
        return None
    changed: dict[str, int] = {}
    pairs = 0
    for layer, forwards in persona.items():
        changed[layer] = pairs = 0
        for own, others, mask in zip(forwards, arm[layer], counted, strict=True):
            ours, theirs = own[mask], others[mask]
            kept = (theirs.unsqueeze(-1) == ours.unsqueeze(-2)).any(dim=-1)
            changed[layer] += int((~kept).sum())
            pairs += kept.numel()
    slots = next(iter(persona.values()))[0].shape[-1]
    return RouterStability(
        changed=sum(changed.values()) / (pairs * len(changed)),
        layers={layer: count / pairs for layer, count in changed.items()},
        tokens=pairs // slots,
    )


def _keeper(kept: list[Tensor]) -> Any:
    def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        kept.append(chosen_experts(arguments, named).to("cpu", torch.int16))

    return hook
