"""What a training is asked to do and what it did."""

from __future__ import annotations

from typing import Any, NamedTuple


class Plan(NamedTuple):
    """How long a training runs and when it looks around.

    Attributes:
        label: What the progress bar says.
        order: Batches of row numbers, for the whole training.
        tokens: Positions whose prediction counts, `replies` or `all`.
        steps: Optimizer steps.
        eval_every: Optimizer steps between validations; one comes before the first and one after the last step.
        patience: Validations without a new best after which training stops; 0 never stops.
        metric: Key of `validate` whose least value is the best.
        seed: Of torch's generators.
        fingerprint: Of all inputs: which checkpoints may be gone on from. How many processes share the work is none.
        gradient_checkpointing: Compute each layer's tensors again in the backward instead of keeping them.
    """

    label: str
    order: list[list[int]]
    tokens: str
    steps: int
    eval_every: int
    patience: int
    metric: str
    seed: int
    fingerprint: str
    gradient_checkpointing: bool = False


class LoopResult(NamedTuple):
    """What a training did.

    Attributes:
        steps: Optimizer steps done in all.
        best_step: The step whose factors are kept; 0 stands for the untrained factors.
        best: Its validation metric.
        first: The validation metric before the first step.
        stopped_early: Patience ran out.
        resumed_from: The step that this process went on from, or None.
        deleted: Checkpoints that were deleted before the start, with the reason.
        seconds: Time of all processes that worked on it.
        peak_rss_mb: Peak resident memory of this process, MB.
        guard: Counts of what the last watched step reached; None where this process watched none.
        processes: How many shared the work, in the last process that worked on it.
        sharded: Whether each of those held a part of every layer, and not the whole base.
    """

    steps: int
    best_step: int
    best: float
    first: float
    stopped_early: bool
    resumed_from: int | None
    deleted: list[str]
    seconds: float
    peak_rss_mb: float
    guard: dict[str, Any] | None
    processes: int = 1
    sharded: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return self._asdict()
