"""What is tried, fixed before any of it was run, and the recipe of each training.

One BF16 persona a base; then every way of training (adapter, all weights) x preset x objective x learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qat.recipe.schema import Recipe

BASES = ("tiny", "small")
TRAINS = ("adapter", "all")
PRESETS = ("nvidia-nano", "all")
OBJECTIVES = ("qat", "qad")
"""Cross entropy on what the conversations say, and divergence from the BF16 persona."""
RATES: dict[str, tuple[float, ...]] = {"adapter": (3e-4, 1e-4, 1e-3), "all": (1e-4, 3e-5, 3e-4)}
"""Half a decade apart, the middle one first: it is run first, so that a matrix cut short still has a row of each."""
PERSONA = "annie_tiny"
SUITE = "annie_tiny_full"
SEED = 7

Kind = Literal["base", "bf16", "ptq", "qat", "qad"]


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        conversations: Fine-tuning of the BF16 persona, before a tenth is held out for its validation.
        epochs: Of it.
        steps: Optimizer steps of every training under quantization.
        rows: Rows of each step.
        lessons: Conversations that these trainings read, five in a row.
        chooses: Further ones that choose the step, five in a row.
        replies: Conversations of the held-out half on which divergence is measured.
        cases: Of the suite, the first so many.
        facts: Of the world's well-known facts, the first so many.
        rows_read: Rows of 512 tokens on which perplexity is measured, of each text.
        documents: Generated for the second base's pretraining.
    """

    conversations: int = 999
    epochs: int = 3
    steps: int = 200
    rows: int = 16
    lessons: int = 5000
    chooses: int = 600
    replies: int = 600
    cases: int = 1000
    facts: int = 2400
    rows_read: int = 160
    documents: int = 600_000


SCALES = {
    "full": Scale(),
    "trial": Scale(steps=60, lessons=1000, chooses=200, replies=200, cases=300, documents=150_000),
    "check": Scale(
        conversations=40, epochs=1, steps=2, rows=2, lessons=20, chooses=20, replies=10, cases=12, facts=12,
        rows_read=2, documents=60,
    ),
}  # fmt: skip
"""`full` is what is published, `trial` tells what it will take, `check` runs on a CPU in minutes."""


@dataclass(frozen=True)
class Arm:
    """One model that is measured.

    `trains`, `preset` and `rate` are None where they do not apply.
    """

    base: str
    kind: Kind
    preset: str | None = None
    trains: str | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        """Base, kind and settings, as `tiny/qad-all-adapter-0.0003`: key of the results and name of the files."""
        parts = [self.kind, self.preset, self.trains, None if self.rate is None else f"{self.rate:g}"]
        return f"{self.base}/" + "-".join(part for part in parts if part is not None)

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return asdict(self)


def arms_of(base: str) -> Iterator[Arm]:
    """All arms of a base, the most telling first."""
    yield Arm(base, "base")
    yield Arm(base, "bf16")
    for preset in PRESETS:
        yield Arm(base, "ptq", preset)
    for place in range(len(RATES["adapter"])):
        for trains in TRAINS:
            for preset in PRESETS:
                for kind in OBJECTIVES:
                    yield Arm(base, kind, preset, trains, RATES[trains][place])  # type: ignore[arg-type]


def recipe(base: Path, scale: Scale, arm: Arm) -> Recipe:
    """The recipe of one training, with the settings of `annie_tiny_full` where the matrix does not vary them.

    Args:
        base: What it stands on: the base, or the BF16 persona.
        scale: How much of everything.
        arm: `bf16` for fine-tuning, which is always an adapter's; a trained arm otherwise.
    """
    preset = arm.preset or PRESETS[0]
    quarter = max(1, scale.steps // 4)
    return Recipe.model_validate(
        {
            "name": "quality_matrix",
            "seed": SEED,
            "base": {"model": str(base), "family": "nemotron_h"},
            "persona": PERSONA,
            "data": {"source": "generated", "count": scale.conversations, "max_length": 768},
            "train": {
                "trains": arm.trains or "adapter",
                "sft": {
                    "epochs": scale.epochs, "learning_rate": 3e-4, "batch_size": 8, "warmup_ratio": 0.05,
                    "evals_per_epoch": 2, "early_stopping_patience": 3, "save_every": 1000,
                },
                "distill": {
                    "max_steps": scale.steps, "learning_rate": arm.rate or 3e-4, "batch_size": scale.rows,
                    "tokens": "replies", "ce_weight": 1.0 if arm.kind == "qat" else 0.0,
                    "eval_every": quarter, "save_every": quarter,
                },
            },
            "quant": {"calibration": {"samples": min(128, scale.conversations // 2), "algorithm": "max"}},
            "arms": [
                {"name": "bf16", "kind": "persona"},
                {"name": "nvfp4", "kind": "distilled", "preset": preset},
            ],
            "behavior": {
                "suite": SUITE, "max_tokens": 96, "gate": {"candidate": "nvfp4", "reference": "bf16"},
            },
        }
    )  # fmt: skip
