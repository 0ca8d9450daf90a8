"""The matrix is the one that docs/quality_matrix.md lays down."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from qat.matrix import design
from qat.matrix.jobs import jobs_of

DOC = Path(__file__).resolve().parents[3] / "docs" / "quality_matrix.md"


@pytest.mark.parametrize("base", design.BASES)
def test_every_combination_is_there_once(base: str) -> None:
    arms = list(design.arms_of(base))
    assert Counter(arm.kind for arm in arms) == {"base": 1, "bf16": 1, "ptq": 2, "qat": 12, "qad": 12}
    assert len({arm.name for arm in arms}) == len(arms) == 28
    trained = Counter((arm.kind, arm.preset, arm.trains) for arm in arms if arm.trains)
    assert set(trained.values()) == {3}


def test_the_document_states_the_numbers_of_the_design() -> None:
    text = DOC.read_text(encoding="utf-8")
    full = design.SCALES["full"]
    lora, all_weights = (", ".join(_short(rate) for rate in sorted(design.RATES[trains])) for trains in design.TRAINS)
    assert f"LoRA {lora}; all weights {all_weights}" in text
    assert f"{full.steps} steps of {full.rows} rows" in text
    assert f"{full.lessons // 5:,} rows" in text
    assert f"{full.cases:,} held-out cases" in text
    assert f"{full.facts:,} well-known facts" in text
    assert f"{full.replies} held-out conversations" in text


def _short(rate: float) -> str:
    return re.sub(r"e-0(\d)", r"e-\1", f"{rate:.0e}")


def test_a_recipe_trains_what_the_arm_says(tmp_path: Path) -> None:
    arm = design.Arm("tiny", "qat", "all", "all", 1e-4)
    recipe = design.recipe(tmp_path, design.SCALES["full"], arm)
    block = recipe.train.distill
    assert (recipe.train.trains, block.ce_weight, block.learning_rate, block.max_steps) == ("all", 1.0, 1e-4, 200)
    assert recipe.distilled_presets == ("all",)
    assert (
        design.recipe(tmp_path, design.SCALES["full"], design.Arm("tiny", "qad", "all", "adapter", 1e-4)).train.trains
        == "adapter"
    )


def test_jobs_come_after_what_they_need_and_both_bases_take_turns() -> None:
    jobs = jobs_of(design.BASES)
    place = {job.name: number for number, job in enumerate(jobs)}
    assert len(place) == len(jobs)
    assert all(place[need] < place[job.name] for job in jobs for need in job.needs)
    arms = [job for job in jobs if job.arm is not None]
    assert [job.arm.base for job in arms[:4] if job.arm] == ["small", "tiny", "small", "tiny"]
    assert [job.name for job in jobs if job.alone] == ["small/pretraining"]
