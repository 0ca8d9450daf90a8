"""Which passes over which batches a recipe's training stages consist of: what both estimate and rehearsal price.

The batches are those of the training itself (`training_order`, `evaluation_order`), made of the rows' lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from qat.plan.rows import Row, Rows
from qat.train.batches import evaluation_order, training_order

if TYPE_CHECKING:
    from qat.recipe.schema import Recipe

PLAIN, ADAPTED, STUDENT = "plain", "adapted", "student"
"""What runs: the base or merged persona; it with the factors of fine-tuning; it with quantizers and factors."""


class Shape(NamedTuple):
    """One batch: rows, their padded length, and the positions whose logits are made."""

    rows: int
    length: int
    targets: int

    @property
    def tokens(self) -> int:
        """Padding included."""
        return self.rows * self.length


class Pass(NamedTuple):
    """The same work on a number of batches.

    Attributes:
        kind: `train` (forward, backward and the optimizer's step), `score` (a forward with loss) or `read` (a forward
            up to the output layer).
        network: `PLAIN`, `ADAPTED` or `STUDENT`.
        batches: Shapes.
        repeats: How often all of them are gone through.
        steps: Optimizer steps in each repeat.
    """

    kind: str
    network: str
    batches: list[Shape]
    repeats: int = 1
    steps: int = 0

    @property
    def tokens(self) -> int:
        """In all repeats, padding included."""
        return self.repeats * sum(batch.tokens for batch in self.batches)


class Stage(NamedTuple):
    """A stage of the training.

    Attributes:
        name: As in the run's receipt.
        passes: What it does with the network.
        loads: How often the base is read and put into memory.
        preset: Its precision preset; None for fine-tuning and the divergence.
        saves: Checkpoints written at most: the regular ones, and each validation's where it is the best so far.
    """

    name: str
    passes: list[Pass]
    loads: int
    preset: str | None = None
    saves: int = 0


def training_stages(recipe: Recipe, rows: Rows) -> list[Stage]:
    """The stages of `qat train` that run a network, in their order.

    Early stopping is not foreseen: fine-tuning is taken at its full length.
    """
    found = []
    if any(arm.kind != "base" for arm in recipe.arms):
        found.append(_sft(recipe, rows))
    found += [_calibration(recipe, rows, preset) for preset in recipe.presets]
    found += [_distillation(recipe, rows, preset) for preset in recipe.distilled_presets]
    arms = sum(arm.kind in ("ptq", "distilled") for arm in recipe.arms)
    if arms:
        scored = evaluation_batches(rows.held_out)
        passes = [Pass("read", PLAIN, scored), Pass("score", STUDENT, scored, repeats=arms)]
        found.append(Stage("divergence", passes, loads=1 + arms))
    return found


def _sft(recipe: Recipe, rows: Rows) -> Stage:
    block = recipe.train.sft
    order = training_order([row.tokens for row in rows.train], block.batch_size, recipe.seed, epochs=block.epochs)
    steps = math.ceil(len(order) / block.gradient_accumulation)
    every = max(1, steps // (block.epochs * block.evals_per_epoch))
    trained = Pass("train", ADAPTED, [_shape(rows.train, batch, all_=False) for batch in order], steps=steps)
    looks = _looks(steps, every)
    scored = Pass("score", ADAPTED, evaluation_batches(rows.validation), looks)
    return Stage("sft", [trained, scored], loads=1, saves=looks + steps // block.save_every)


def _calibration(recipe: Recipe, rows: Rows, preset: str) -> Stage:
    """Rows of equal length go together there; which ones is drawn, so the middle ones stand in."""
    wanted = min(recipe.quant.calibration.samples, len(rows.train))
    by_length = sorted(rows.train)
    start = (len(by_length) - wanted) // 2
    batches = [Shape(1, row.tokens, 0) for row in by_length[start : start + wanted]]
    return Stage(f"calibrate/{preset}", [Pass("read", PLAIN, batches)], loads=1, preset=preset)


def _distillation(recipe: Recipe, rows: Rows, preset: str) -> Stage:
    block = recipe.train.distill
    count = block.max_steps * block.gradient_accumulation
    order = training_order([row.tokens for row in rows.lessons], block.batch_size, recipe.seed, count=count)
    every_position = block.tokens == "all"
    asked = [rows.lessons[row] for row in sorted({row for batch in order for row in batch})]
    chooses, looks = evaluation_batches(rows.lessons_validation), _looks(block.max_steps, block.eval_every)
    passes = [
        Pass("read", PLAIN, evaluation_batches(asked)),
        Pass("read", PLAIN, chooses),
        Pass(
            "train",
            STUDENT,
            [_shape(rows.lessons, batch, all_=every_position) for batch in order],
            steps=block.max_steps,
        ),
        Pass("score", STUDENT, chooses, looks + 1),
    ]
    return Stage(f"distill/{preset}", passes, loads=1, preset=preset, saves=looks + block.max_steps // block.save_every)


def _looks(steps: int, every: int) -> int:
    """Validations: before the first step, every so many steps, and after the last."""
    return 1 + steps // every + (steps % every > 0)


def evaluation_batches(rows: Sequence[Row]) -> list[Shape]:
    """Rows as validation takes them together."""
    return [_shape(rows, batch, all_=False) for batch in evaluation_order([row.tokens for row in rows])]


def _shape(rows: Sequence[Row], batch: Sequence[int], *, all_: bool) -> Shape:
    targets = sum(rows[row].tokens - 1 if all_ else rows[row].replies for row in batch)
    return Shape(len(batch), max(rows[row].tokens for row in batch), targets)
