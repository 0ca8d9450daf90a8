"""Baselines: what is kept, what is refused, and that judging against one equals judging against its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat.behavior.baseline import (
    Baseline,
    judge_against,
    list_baselines,
    load_baseline,
    make_baseline,
    save_baseline,
)
from qat.behavior.gate import judge
from qat.behavior.records import meta_path
from qat.behavior.sequential import Look
from qat.behavior.suite import Suite
from qat.errors import UserError
from tests.unit.behavior.helpers import small_suite
from tests.unit.behavior.test_gate import arm, gate, good, result, write


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return small_suite(tmp_path, 400)


@pytest.fixture
def kept(tmp_path: Path, suite: Suite) -> Baseline:
    return make_baseline("v1", arm(tmp_path, suite, "old", good, seeds=(0, 1)), suite)


def test_saved_and_read_again(tmp_path: Path, kept: Baseline) -> None:
    path = save_baseline(kept, tmp_path / "kept", replace=False)
    assert load_baseline("v1", tmp_path / "kept") == load_baseline(str(path), tmp_path) == kept
    assert list_baselines(tmp_path / "kept") == [kept]
    assert list_baselines(tmp_path / "nowhere") == []
    content = json.loads(path.read_text())
    failed = [f"c-{n:03d}" for n in range(0, 400, 50)]
    assert [(p["sampling"], p["seed"], p["failed"]) for p in content["passes"]] == [
        ("greedy", 0, failed),
        ("greedy", 1, failed),
    ]
    assert content["passes"][0]["passed"][:2] == ["c-001", "c-002"]
    assert "Yes." not in path.read_text()  # no replies


def test_a_name_is_not_overwritten_by_accident(tmp_path: Path, kept: Baseline) -> None:
    save_baseline(kept, tmp_path / "kept", replace=False)
    with pytest.raises(UserError, match="baseline of this name"):
        save_baseline(kept, tmp_path / "kept", replace=False)
    save_baseline(kept, tmp_path / "kept", replace=True)


def test_judged_as_against_the_results_themselves(tmp_path: Path, suite: Suite, kept: Baseline) -> None:
    new = arm(tmp_path, suite, "new", lambda n, s: n % 20 != s, seeds=(0, 1))
    against = judge_against(new, kept, gate())
    direct = judge({"old": tmp_path / "old.jsonl", "new": new}, suite, gate())
    assert against.verdict is direct.verdict
    assert against.comparisons == [c._replace(reference="baseline v1") for c in direct.comparisons]
    assert against.arms["new"] == direct.arms["new"]
    assert against.arms["baseline v1"] == direct.arms["old"]
    assert [c.name for c in against.cases] == [case.id for case in suite.cases]
    assert against.gate["reference"] == "baseline v1" and against.suite == direct.suite


def test_weights_are_kept(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, 40)
    heavy = [c.model_copy(update={"weight": 3.0 if n == 0 else 1.0}) for n, c in enumerate(suite.cases)]
    suite = Suite(suite.name, "1", suite.persona, "", tuple(heavy), suite.sha256, suite.checks)
    kept = make_baseline("w", arm(tmp_path, suite, "old", lambda n, s: True), suite)
    found = judge_against(arm(tmp_path, suite, "new", lambda n, s: n != 0), kept, gate())
    assert found.comparisons[0].difference == pytest.approx(-3 / 42)


def test_the_candidate_may_bear_the_name_of_the_arm_that_was_kept(tmp_path: Path, suite: Suite, kept: Baseline) -> None:
    found = judge_against(arm(tmp_path, suite, "old", good, seeds=(0, 1)), kept, gate())
    assert list(found.arms) == ["baseline v1", "old"]
    assert found.verdict == "PASS"


def test_looks_are_judged_stricter(tmp_path: Path, suite: Suite, kept: Baseline) -> None:
    new = arm(tmp_path, suite, "new", lambda n, s: n % 25 != 0, seeds=(0, 1))
    single = judge_against(new, kept, gate(pass_floor=0.93))
    third = judge_against(new, kept, gate(pass_floor=0.93), Look(3))
    assert (single.verdict, third.verdict) == ("PASS", "INCONCLUSIVE")
    assert third.look == {"number": 3, "planned": None, "confidence": pytest.approx(1 - 0.05 / 12)}
    assert "99.58% interval" in third.reasons[0]


def test_another_suite_is_refused(tmp_path: Path, kept: Baseline) -> None:
    other = tmp_path / "other"
    other.mkdir()
    bigger = small_suite(other, 401)
    with pytest.raises(UserError, match="answer different suites") as error:
        judge_against(arm(other, bigger, "new", good), kept, gate())
    assert bigger.sha256[:12] in str(error.value) and kept.meta.sha256[:12] in str(error.value)
    with pytest.raises(UserError, match="answer another suite"):
        make_baseline("x", tmp_path / "old.jsonl", bigger)


@pytest.mark.parametrize(
    ("old", "new"), [('"max_tokens":9', '"max_tokens":10'), ('"temperature":0.0', '"temperature":0.7')]
)
def test_other_settings_are_refused(tmp_path: Path, suite: Suite, kept: Baseline, old: str, new: str) -> None:
    candidate = arm(tmp_path, suite, "new", good, seeds=(0, 1))
    meta_path(candidate).write_text(meta_path(candidate).read_text().replace(old, new))
    with pytest.raises(UserError, match="is not that of the baseline"):
        judge_against(candidate, kept, gate())


def test_what_cannot_be_kept(tmp_path: Path, suite: Suite) -> None:
    rows = [result("old", n, True) for n in range(399)]
    refused = write(tmp_path, suite, "old", [*rows, result("old", 399, False, error="HTTP 400", failed_checks=[])])
    with pytest.raises(UserError, match="must be whole"):
        make_baseline("v1", refused, suite)
    with pytest.raises(UserError, match="no name"):
        make_baseline("../v1", refused, suite)
    stranger = write(tmp_path, suite, "new", [result("new", 999, True)])
    with pytest.raises(UserError, match="does not know"):
        make_baseline("v1", stranger, suite)
    meta_path(stranger).unlink()
    with pytest.raises(UserError, match="Nothing says"):
        make_baseline("v1", stranger, suite)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", "file: "),
        ({"format": 2}, "format"),
        ({"passes": []}, "passes"),
        ({"cases": {}}, "'c-000' of a pass is not among the cases"),
        ({"passes": [{"sampling": "g", "seed": 0, "passed": ["c-001"], "failed": ["c-001"]}]}, "stands twice"),
    ],
)
def test_damaged_files(tmp_path: Path, kept: Baseline, change: str | dict[str, object], message: str) -> None:
    content = change if isinstance(change, str) else json.dumps(kept.model_dump(mode="json") | change)
    (tmp_path / "v1.json").write_text(content)
    with pytest.raises(UserError, match="no baseline") as error:
        load_baseline("v1", tmp_path)
    assert message in str(error.value)


def test_missing_files_name_what_is_there(tmp_path: Path, kept: Baseline) -> None:
    with pytest.raises(UserError, match="qat baseline save"):
        load_baseline("v1", tmp_path / "kept")
    save_baseline(kept, tmp_path / "kept", replace=False)
    with pytest.raises(UserError, match="baselines here: v1"):
        load_baseline("v2", tmp_path / "kept")


def test_a_part_of_the_suite_is_no_baseline_but_its_first_cases_are(tmp_path: Path, suite: Suite) -> None:
    """A recipe may limit a sampling to the first cases; a shard or a selection from the middle is something else."""
    first = write(tmp_path, suite, "first", [result("first", n, True) for n in range(50)])
    assert len(make_baseline("v1", first, suite).passes[0].passed) == 50
    shard = write(tmp_path, suite, "shard", [result("shard", n, True) for n in range(1, 400, 2)])
    with pytest.raises(UserError, match="200 of 400 cases were asked"):
        make_baseline("v1", shard, suite)
