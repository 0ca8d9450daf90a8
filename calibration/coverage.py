"""Which experts the calibration reached.

An expert that saw almost nothing has had no say in its layer's activation range.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

TOO_FEW_TOKENS = 32
"""An expert with fewer routed tokens than this is reported."""


class ExpertTokens(NamedTuple):
    """Tokens that the router sent to the experts of one layer.

    Attributes:
        layer: Path of the experts in the model.
        tokens: One count per expert.
    """

    layer: str
    tokens: list[int]

    @property
    def starved(self) -> dict[int, int]:
        """Expert -> tokens, for those below `TOO_FEW_TOKENS`."""
        return {expert: count for expert, count in enumerate(self.tokens) if count < TOO_FEW_TOKENS}


@contextmanager
def count_expert_tokens(model: nn.Module) -> Iterator[list[ExpertTokens]]:
    """Count routed tokens per expert while the block runs.

    Args:
        model: Fused experts are found by their `num_experts` and a 3-D `down_proj`; others are not counted.

    Yields:
        A list that is filled when the block ends; empty for a dense model.
    """
    import torch

    counts: dict[str, Tensor] = {}
    handles: list[Any] = []
    for name, module in model.named_modules():
        if getattr(getattr(module, "down_proj", None), "ndim", 0) == 3 and hasattr(module, "num_experts"):
            counts[name] = torch.zeros(module.num_experts, dtype=torch.long)
            handles.append(module.register_forward_pre_hook(_counter(counts[name]), with_kwargs=True))
    found: list[ExpertTokens] = []
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found += [ExpertTokens(name, count.tolist()) for name, count in counts.items()]


def _counter(count: Tensor) -> Any:
    def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        # transformers' fused experts: forward(hidden_states, top_k_index, top_k_weights)
        index = named["top_k_index"] if "top_k_index" in named else arguments[1]
        count.add_(index.reshape(-1).cpu().bincount(minlength=len(count)))

    return hook
