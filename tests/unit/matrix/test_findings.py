"""The statistics of the matrix against values by hand, exact formulas and made-up records whose answer is known."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from qat.matrix import design, findings
from qat.matrix.table import render

CASES = [f"c{number}" for number in range(100)]
SUBJECTS = [f"s{number // 4}" for number in range(80)]


def _result(arm: design.Arm, *, lost: int = 0, forgot: int = 0, kl: float = 0.0, best: float = 1.0) -> dict[str, Any]:
    """An arm that fails the first `lost` cases in manners and content, and the first `forgot` facts."""
    digits = "0" * lost + "1" * (100 - lost)
    facts = "0" * forgot + "1" * (80 - forgot)
    return {
        "arm": arm.to_json(),
        "passed": digits,
        "manners": digits,
        "checks": {},
        "failures": [],
        "knowledge": {"chat": facts, "dialogue": facts},
        "perplexity": {"generated": [100.0 + lost + number % 3 for number in range(20)]},
        "divergence": {"kl": kl, "kl_se": kl / 20, "top1": 0.99},
        "training": {"loop": {"best": best}} if arm.trains else None,
        "wall_s": 1.0,
    }


def _record(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "command": "here",
        "scale": {"name": "made up"},
        "environment": {"python": "3", "packages": {"torch": "2"}},
        "shared": {
            "tiny": {"cases": CASES, "subjects": SUBJECTS, "tokens": {"generated": [10] * 20}, "device": "none"}
        },
        "results": {design.Arm(**one["arm"]).name: one for one in results},
        "not_run": ["tiny/some"],
    }


def _arm(kind: Any, preset: str | None = None, trains: str | None = None, rate: float | None = None) -> design.Arm:
    return design.Arm("tiny", kind, preset, trains, rate)


def test_the_uneven_fall_agrees_with_its_exact_error() -> None:
    generator = random.Random(3)
    manners = [int(generator.random() < 0.2) for _ in range(400)]
    knowledge = [int(generator.random() < 0.05) for _ in range(600)]
    each = findings.uneven(manners, knowledge, [str(number) for number in range(600)])
    p, q = sum(manners) / 400, sum(knowledge) / 600
    error = math.sqrt(p * (1 - p) / 400 + q * (1 - q) / 600)
    assert each.value == pytest.approx(p - q)
    assert (each.low, each.high) == pytest.approx((p - q - 1.96 * error, p - q + 1.96 * error), abs=0.005)


def test_facts_of_one_subject_are_drawn_together() -> None:
    knowledge = [1] * 40 + [0] * 360
    alone = findings.uneven([0] * 100, knowledge, [str(number) for number in range(400)])
    together = findings.uneven([0] * 100, knowledge, [str(number // 40) for number in range(400)])
    assert together.high - together.low > 4 * (alone.high - alone.low)


def test_validation_chooses_the_rate_and_nothing_else_does() -> None:
    results = [
        _result(_arm("bf16")),
        _result(_arm("qad", "all", "adapter", 3e-4), kl=0.001, best=0.5),
        _result(_arm("qad", "all", "adapter", 1e-4), kl=0.009, lost=9, best=0.4),
        _result(_arm("qad", "all", "adapter", 1e-3), kl=0.001, best=0.6),
    ]
    rows = findings.rows_of(_record(results), "tiny")
    assert [row.arm.rate for row in findings.family(rows)] == [1e-4]


def test_differences_are_paired_with_the_persona() -> None:
    rows = findings.rows_of(_record([_result(_arm("bf16"), lost=2), _result(_arm("ptq", "all"), lost=7, kl=1)]), "tiny")
    (_, ptq) = rows
    assert ptq.passed.rate == pytest.approx(0.93)
    assert ptq.d_passed is not None
    assert ptq.d_passed.value == pytest.approx(-0.05)
    assert ptq.d_passed.low < -0.05 < ptq.d_passed.high < 0.01
    assert ptq.d_nats["generated"].value == pytest.approx(0.5)  # five nats of ten tokens, alike in every row
    assert ptq.d_nats["generated"].high == pytest.approx(0.5)


def test_hypotheses_are_decided_by_their_rules() -> None:
    results = [
        _result(_arm("bf16")),
        _result(_arm("ptq", "all"), lost=20, kl=0.02),
        _result(_arm("ptq", "nvidia-nano"), forgot=40, kl=0.01),
        _result(_arm("qad", "all", "adapter", 3e-4), kl=0.019),
        _result(_arm("qat", "all", "adapter", 3e-4), kl=0.03),
        _result(_arm("qad", "nvidia-nano", "all", 1e-4), lost=20, kl=0.02),
    ]
    tests = findings.tests_of(findings.rows_of(_record(results), "tiny"))
    verdicts = {(test.hypothesis, test.where): test.verdict for test in tests}
    assert verdicts[("H1", "ptq, all")] == "holds"
    assert verdicts[("H2", "qad, all, adapter")] == "open"  # 0.95 with an interval over 1
    assert verdicts[("H2", "qad, nvidia-nano, all")] == "refuted"
    assert verdicts[("H3", "qat, all, adapter")] == "holds"
    assert verdicts[("H4", "qad, nvidia-nano, all")] == "refuted"
    assert verdicts[("H5", "ptq, all")] == "holds"
    assert verdicts[("H5", "ptq, nvidia-nano")] == "refuted"
    assert verdicts[("H5", "qad, all, adapter")] == "open"


def test_a_fall_within_the_margin_is_told_from_none_that_is_proven() -> None:
    bf16, qad = _arm("bf16"), _arm("qad", "all", "adapter", 3e-4)
    for lost, verdict in ((26, "holds"), (30, "open"), (60, "refuted")):  # the persona fails 30
        rows = findings.rows_of(_record([_result(bf16, lost=30), _result(qad, lost=lost, kl=0.1)]), "tiny")
        (found,) = [test.verdict for test in findings.tests_of(rows) if test.hypothesis == "H4"]
        assert found == verdict, lost


def test_an_unfinished_matrix_is_rendered_with_what_is_missing() -> None:
    text = render(_record([_result(_arm("base")), _result(_arm("bf16"))]))
    assert "| bf16 | 100.0%" in text
    assert "- tiny/some" in text
    assert render({**_record([]), "shared": {}}).startswith("# The quality matrix")
