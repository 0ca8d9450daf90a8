"""Numbers of steps and validations, by hand and against the training's own plan."""

from __future__ import annotations

from qat.plan.rows import Row, Rows
from qat.plan.stages import Shape, evaluation_batches, training_stages
from qat.recipe.load import load_recipe

SMALL = [
    "train.sft.batch_size=4", "train.sft.gradient_accumulation=2", "train.sft.epochs=2", "train.sft.evals_per_epoch=2",
    "train.sft.save_every=2", "train.distill.max_steps=5", "train.distill.eval_every=2", "train.distill.batch_size=3",
    "train.distill.gradient_accumulation=2", "train.distill.save_every=2", "quant.calibration.samples=4",
]  # fmt: skip


def rows(count: int = 10) -> Rows:
    train = [Row(10 * (number + 1), number + 1) for number in range(count)]
    held_out = [Row(30, 3)] * 9
    return Rows(train, held_out, train, held_out, held_out, "made up")


def test_steps_and_looks_by_hand() -> None:
    recipe = load_recipe("annie_tiny", SMALL)
    stages = {stage.name: stage for stage in training_stages(recipe, rows())}
    trained, scored = stages["sft"].passes
    # 10 rows in batches of 4: 3 a pass, 6 in all, two a step; every step is looked at, and before the first.
    assert (len(trained.batches), trained.steps, scored.repeats) == (6, 3, 4)
    assert stages["sft"].saves == 4 + 3 // 2
    assert sum(batch.rows for batch in trained.batches) == 2 * 10
    taught = stages["distill/all"].passes[2]
    assert (len(taught.batches), taught.steps) == (10, 5)
    # Before, at 2, 4 and after the last; once more for the report.
    assert stages["distill/all"].passes[3].repeats == 1 + 2 + 1 + 1
    assert [len(part.batches) for part in stages["calibrate/all"].passes] == [4]
    assert stages["divergence"].loads == 1 + 2


def test_padding_and_targets() -> None:
    batches = evaluation_batches([Row(10, 1), Row(20, 2), Row(5, 3)])
    assert batches == [Shape(rows=3, length=20, targets=6)] and batches[0].tokens == 60


def test_all_positions_or_replies() -> None:
    every = training_stages(load_recipe("annie_tiny", [*SMALL, "train.distill.tokens=all"]), rows())
    replies = training_stages(load_recipe("annie_tiny", [*SMALL, "train.distill.tokens=replies"]), rows())
    assert every[2].passes[2].batches[0].targets > 2 * replies[2].passes[2].batches[0].targets


def test_the_steps_are_those_of_the_training_itself() -> None:
    from qat.train.batches import Sample
    from qat.train.distill import _plan as distill_plan
    from qat.train.sft import _plan as sft_plan

    recipe, made = load_recipe("annie_tiny", SMALL), rows(37)
    samples = [Sample(str(n), "", [1] * row.tokens, [1] * row.tokens) for n, row in enumerate(made.train)]
    stages = {stage.name: stage for stage in training_stages(recipe, made)}
    plan = sft_plan(recipe, samples, {}, [])
    assert plan.steps == stages["sft"].passes[0].steps
    widths = [(len(batch), max(made.train[row].tokens for row in batch)) for batch in plan.order]
    assert widths == [(batch.rows, batch.length) for batch in stages["sft"].passes[0].batches]
    taught = stages["distill/all"].passes[2]
    plan = distill_plan(recipe, "all", samples, {}, [])
    assert (plan.steps, len(plan.order)) == (taught.steps, len(taught.batches))


def test_no_network_runs_for_a_base_arm_alone() -> None:
    assert training_stages(load_recipe("annie_tiny", ["arms=[{name: base, kind: base}, {name: bf16, kind: persona}]",
        "behavior.gate.candidate=bf16", "behavior.gate.reference=base"]), rows())[-1].name == "sft"  # fmt: skip
