"""Which experts the calibration reached, and what helps where it did not.

An expert that saw almost nothing has had no say in its layer's activation range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.train.routing import chosen_experts, routed_experts

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


def remedy(experts: Sequence[ExpertTokens], read: int, available: int) -> str | None:
    """Say what would give starved experts enough tokens.

    Args:
        experts: Of all layers.
        read: Conversations that calibration read.
        available: Conversations of the training set.

    Returns:
        One sentence; None where no expert is starved. The number of conversations is in proportion to the tokens of
        the rarest expert that was reached at all.
    """
    starved = [count for layer in experts for count in layer.starved.values()]
    if not starved:
        return None
    unreached = starved.count(0)
    rarest = min((count for count in starved if count), default=None)
    said = f"{unreached} experts were never reached: add conversations of other kinds. " if unreached else ""
    if rarest is None:
        return said.strip()
    wanted = math.ceil(read * TOO_FEW_TOKENS / rarest)
    if wanted <= available:
        return f"{said}Set quant.calibration.samples to about {wanted} (now {read})."
    return (
        f"{said}About {wanted} conversations would reach the rarest; there are {available}: add data, or use them all."
    )


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
    for name, module in routed_experts(model).items():
        counts[name] = torch.zeros(int(module.num_experts), dtype=torch.long)  # type: ignore[arg-type]
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
        count.add_(chosen_experts(arguments, named).reshape(-1).cpu().bincount(minlength=len(count)))

    return hook
