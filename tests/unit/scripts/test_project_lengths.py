"""The projection of a whole fine-tuning: by hand, against the measured step, and against the published table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[3] / "docs" / "benchmarks"
STEPS = {"installed_s_per_1024": 1.0, "ours_s_per_16384": 2.0}


@pytest.fixture(scope="module")
def project(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("project_lengths")


def test_rows_of_one_length_by_hand(project: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """999 rows of 1,024 tokens, three times: 2,997 steps of 1 s, or a sixteenth as many of 2 s, without padding."""
    monkeypatch.setattr(project, "_step_seconds", lambda rows, length: rows * length / 1024)
    found = project.projected([1024, 1024], STEPS)
    assert found["tokens"] == 3 * 999 * 1024 and found["installed_s"] == 2997
    assert found["full_batches"]["rows"] == 16 and found["full_batches"]["padding"] == 0
    assert found["full_batches"]["seconds"] == pytest.approx(2997 / 16 * 2, abs=0.05)
    assert found["full_batches"]["times_faster"] == 8
    assert found["eight_rows_a_step"] == {"steps": 375, "seconds": 2997, "times_faster": 1}


def test_padding_and_cut_rows_are_counted(project: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 100 and 200, and of 2,048 and 300 tokens, at a second a token."""
    monkeypatch.setattr(project, "training_order", lambda *_, **__: [[0, 1], [3, 2]])
    monkeypatch.setattr(project, "_step_seconds", lambda rows, length: rows * length)
    found = project.projected([100, 200, 300, 5000], {**STEPS, "ours_s_per_16384": 16384.0})
    assert (found["conversations"], found["longest"], found["cut"], found["mean"]) == (4, 5000, 1, 1400)
    rows = 249 * (100 + 200 + 300 + 2048) + 100 + 200 + 300  # 999 of them, drawn in turn
    assert found["tokens"] == 3 * rows and found["installed_s"] == pytest.approx(3 * rows / 1024, abs=0.05)
    assert found["full_batches"]["seconds"] == found["eight_rows_a_step"]["seconds"] == 2 * 200 + 2 * 2048
    assert found["full_batches"]["padding"] == round((2 * 200 + 2 * 2048) / (3 * rows) - 1, 4)


def test_a_step_is_priced_near_what_was_measured(project: ModuleType) -> None:
    measured = project._measured(BENCHMARKS / "train_whole.json")
    assert measured == {"installed_s_per_1024": 3.72612, "ours_s_per_16384": 0.765}
    assert project._step_seconds(8, 2048) == pytest.approx(measured["ours_s_per_16384"], rel=0.125)


def test_the_published_table_is_that_of_the_published_numbers(project: ModuleType) -> None:
    sets = json.loads((BENCHMARKS / "plan_lengths.json").read_text(encoding="utf-8"))["sets"]
    page = (BENCHMARKS / "train_steps.md").read_text(encoding="utf-8")
    assert project.markdown(sets) in page


def test_the_tokenizer_has_the_published_ids(project: ModuleType, real_data: Path) -> None:
    """Ids of Qwen's own tokenizer; a number is one token a digit, and a special token is never cut."""
    tokenizer = project.qwen3(real_data / "qwen3_tokenizer")
    assert tokenizer.encode("Hello, world!").ids == [9707, 11, 1879, 0]
    assert tokenizer.encode("<|im_start|>").ids == [151644]
    assert len(tokenizer.encode("2026").ids) == 4
