"""The CPU benchmark's arithmetic: against SciPy, by hand, and against the published seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from scipy.stats import quantile_test

PUBLISHED = Path(__file__).parents[3] / "docs" / "benchmarks" / "train_cpu.json"


@pytest.fixture(scope="module")
def bench(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("bench_cpu_step")


@pytest.mark.parametrize("count", [6, 9, 10, 22, 51])
def test_the_interval_is_the_one_of_the_sign_test(bench: ModuleType, count: int) -> None:
    values = random.Random(count).sample(range(1000), count)
    expected = quantile_test(values, q=0.5, p=0.5).confidence_interval(confidence_level=0.95)
    assert bench.median_interval(values) == pytest.approx((expected.low, expected.high))


def test_the_published_figures_follow_from_the_published_seconds(bench: ModuleType) -> None:
    arms = json.loads(PUBLISHED.read_text(encoding="utf-8"))["arms"]
    for arm in arms.values():
        low, high = quantile_test(arm["seconds"], p=0.5).confidence_interval(confidence_level=0.95)
        assert arm["interval_s"] == pytest.approx([low, high]) == list(bench.median_interval(arm["seconds"]))


def test_every_arm_takes_its_turn_at_being_first(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the arms move on: by 1, 2 and 3 s, and the warm-up's four rounds are left out."""
    now, order = [0.0], []

    def arm(name: str, seconds: float) -> Callable[[list[int]], None]:
        def step(rows: list[int]) -> None:
            order.append((name, *rows))
            now[0] += seconds * (100 if rows[0] < 4 else 1)

        return step

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    steps = {"a": arm("a", 1), "b": arm("b", 2), "c": arm("c", 3)}
    taken = bench.in_turns(steps, [[number] for number in range(6)])
    assert taken == {"a": [1, 1], "b": [2, 2], "c": [3, 3]}
    assert [name for name, _ in order] == list("abcbcacab") * 2
    assert [batch for _, batch in order] == [batch for batch in range(6) for _ in range(3)]


def test_ratios_are_taken_batch_by_batch(bench: ModuleType) -> None:
    """Of medians 4 / 2 would be 2: the batches are of different lengths."""
    samples = [SimpleNamespace(input_ids=[0] * length) for length in (3, 5, 8)]
    seconds = {
        "bf16_sft": [1.0, 2.0, 4.0],
        "nvfp4_distillation": [1.5, 4.0, 6.0],
        "teacher_pass": [0.5, 1.0, 0.0],
    }
    found = bench.summary("r", samples, [[0, 1]] * 4 + [[0, 1], [1, 2], [2, 0]], seconds)
    assert found["batches"] == {"rows": 2, "padded_length_median": 8, "lengths": [5, 8, 8]}
    arms = found["arms"]
    assert (arms["nvfp4_distillation"]["ratio"], arms["nvfp4_distillation"]["median_s"]) == (1.5, 4.0)
    both = arms["nvfp4_distillation_and_teacher_pass"]
    assert both["seconds"] == [2.0, 5.0, 6.0] and both["ratio"] == 2.0
