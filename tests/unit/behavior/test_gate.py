"""The gate: decisions from constructed results, verdict.json, junit.xml, and two files side by side."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

from qat.behavior.compare import compare
from qat.behavior.gate import Decision, Verdict, judge, write_verdict
from qat.behavior.paired import PairedCounts, tango_z
from qat.behavior.records import CaseResult, FailedCheck, ResultMeta, meta_path
from qat.behavior.suite import Suite
from qat.behavior.summary import markdown
from qat.errors import ExitCode, UserError
from qat.recipe.schema import GateBlock
from tests.unit.behavior.helpers import small_suite

Passes = Callable[[int, int], bool]
"""(number of the case, seed) -> did it pass"""


def result(arm: str, number: int, passed: bool, **more: Any) -> CaseResult:
    content = {
        "case": f"c-{number:03d}", "category": f"k{number % 2}", "arm": arm, "sampling": "greedy", "seed": 0,
        "produced": [{"role": "assistant", "content": "Yes." if passed else "No.\x00"}], "passed": passed,
        "failed_checks": [] if passed else [FailedCheck(check="mentions", detail="mentions none of 'yes'")],
        "latency_s": 0.5, "completion_tokens": 3, "error": None,
    } | more  # fmt: skip
    return CaseResult.model_validate(content)


def write(folder: Path, suite: Suite, arm: str, results: list[CaseResult]) -> Path:
    path = folder / f"{arm}.jsonl"
    path.write_text("".join(r.model_dump_json() + "\n" for r in results), encoding="utf-8")
    samplings = {r.sampling: {"temperature": 0.0, "top_p": 1.0} for r in results}
    meta = ResultMeta.model_validate(
        {
            "suite": suite.name,
            "version": "1",
            "sha256": suite.sha256,
            "model": arm,
            "max_tokens": 9,
            "samplings": samplings,
        }
    )
    meta_path(path).write_text(meta.model_dump_json(), encoding="utf-8")
    return path


def arm(
    folder: Path, suite: Suite, name: str, passes: Passes, seeds: tuple[int, ...] = (0,), sampling: str = "greedy"
) -> Path:
    rows = [result(name, n, passes(n, s), seed=s, sampling=sampling) for s in seeds for n in range(len(suite.cases))]
    return write(folder, suite, name, rows)


def gate(**more: Any) -> GateBlock:
    return GateBlock.model_validate(
        {"candidate": "new", "reference": "old", "pass_floor": 0.9, "max_drop": 0.05} | more
    )


def verdict_of(folder: Path, count: int, new: Passes, old: Passes, **more: Any) -> Verdict:
    suite = small_suite(folder, count)
    return judge({"old": arm(folder, suite, "old", old), "new": arm(folder, suite, "new", new)}, suite, gate(**more))


def good(number: int, seed: int) -> bool:
    return number % 50 != 0


def test_pass_where_both_are_proven(tmp_path: Path) -> None:
    found = verdict_of(tmp_path, 400, good, good)
    assert found.verdict is Decision.PASS
    assert found.verdict.exit_code is ExitCode.DONE
    assert found.reasons == [
        "new passes 392 of 400 (98.0%, 95% interval 96.1% to 99.0%) and reaches the floor of 90.0%",
        "new against old on 400 pairs: +0.0 points (95% interval -1.0 to +1.0), not worse by more than 5.0 points; "
        "0 cases lost, 0 won",
    ]
    z2 = norm.ppf(0.975) ** 2
    (comparison,) = found.comparisons
    assert comparison.ci_low == pytest.approx(-z2 / (400 + z2))
    assert (comparison.equivalent, comparison.p_mcnemar, comparison.difference) == (True, 1.0, 0.0)


def test_fail_where_the_floor_is_missed_though_the_reference_is_no_better(tmp_path: Path) -> None:
    half: Passes = lambda n, s: n % 2 == 0  # noqa: E731
    found = verdict_of(tmp_path, 200, half, half)
    assert found.verdict is Decision.FAIL
    assert found.verdict.exit_code is ExitCode.FAIL
    assert "misses the floor of 90.0%" in found.reasons[0]


def test_fail_where_the_drop_is_proven_though_the_floor_holds(tmp_path: Path) -> None:
    found = verdict_of(tmp_path, 1000, lambda n, s: n % 14 != 0, lambda n, s: True, pass_floor=0.5, max_drop=0.03)
    assert found.verdict is Decision.FAIL
    assert "worse by more than 3.0 points" in found.reasons[0]
    assert found.reasons[0].endswith("72 cases lost, 0 won")
    assert any("category k0 is worse than old: 72 cases lost, 0 won of 500" in reason for reason in found.reasons)
    assert not any("category k1" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("count", "new", "old", "text"),
    [
        (60, good, good, "not clearly better or worse than the limit of 5.0 points"),
        (100, lambda n, s: n % 12 != 0, lambda n, s: n % 12 != 0, "neither clearly reaches nor misses the floor"),
        (9, lambda n, s: True, lambda n, s: True, "too few: 9 cases"),
    ],
)
def test_inconclusive_where_the_cases_are_too_few(
    tmp_path: Path, count: int, new: Passes, old: Passes, text: str
) -> None:
    found = verdict_of(tmp_path, count, new, old)
    assert found.verdict is Decision.INCONCLUSIVE
    assert found.verdict.exit_code is ExitCode.INCONCLUSIVE
    assert any(text in reason for reason in found.reasons)


def test_the_floor_is_missed_only_where_the_exact_interval_says_so_too(tmp_path: Path) -> None:
    """45 of 50: Wilson's upper end is 95.65 %, Clopper's and Pearson's 96.67 %, by statsmodels; at 96 % they differ."""
    ends = [proportion_confint(45, 50, method=method)[1] for method in ("wilson", "beta")]
    assert ends == pytest.approx([0.95652, 0.96672], abs=1e-5)
    found = verdict_of(tmp_path, 50, lambda n, s: n % 10 != 0, good, pass_floor=0.96, max_drop=0.5)
    assert found.verdict is Decision.INCONCLUSIVE
    told = "neither clearly reaches nor misses the floor of 96.0% (exact interval 78.2% to 96.7%)"
    assert any(reason.endswith(told) for reason in found.reasons)
    assert verdict_of(tmp_path, 50, lambda n, s: n % 10 != 0, good, pass_floor=0.97, max_drop=0.5).verdict == "FAIL"


def test_nothing_is_claimed_of_nine_cases(tmp_path: Path) -> None:
    found = verdict_of(tmp_path, 9, lambda n, s: True, lambda n, s: True)
    rates = found.arms["new"]
    assert (rates.overall.rate, rates.overall.low, rates.overall.passed, rates.overall.n) == (None, None, 9, 9)
    (comparison,) = found.comparisons
    assert (comparison.difference, comparison.tost_p, comparison.equivalent) == (None, None, None)
    assert "too few" in (comparison.reason or "")


def test_flips_go_both_ways(tmp_path: Path) -> None:
    found = verdict_of(tmp_path, 100, lambda n, s: n not in (3, 4), lambda n, s: n not in (4, 7, 9))
    (comparison,) = found.comparisons
    assert (comparison.flips_worse, comparison.flips_better) == (["c-003"], ["c-007", "c-009"])
    assert comparison.difference == pytest.approx(0.01)
    assert comparison.p_mcnemar == pytest.approx(1.0)


def test_better_is_no_drop_and_yet_not_equivalent(tmp_path: Path) -> None:
    found = verdict_of(tmp_path, 400, good, lambda n, s: n % 4 != 0)
    assert found.verdict is Decision.PASS
    assert found.comparisons[0].equivalent is False
    assert (found.comparisons[0].tost_p or 0) > 0.5


def test_missing_answers_forbid_a_pass(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, 400)
    old = arm(tmp_path, suite, "old", good)
    missing = write(tmp_path, suite, "new", [result("new", n, good(n, 0)) for n in range(398)])
    found = judge({"old": old, "new": missing}, suite, gate())
    assert found.verdict is Decision.INCONCLUSIVE
    assert found.reasons[0] == "new: 2 of 400 questions were not asked"


def test_seeds_widen_no_evidence(tmp_path: Path) -> None:
    """Ten seeds that always agree prove as much as one: 60 cases stay inconclusive."""
    suite = small_suite(tmp_path, 60)
    seeds = tuple(range(10))
    files = {name: arm(tmp_path, suite, name, good, seeds) for name in ("old", "new")}
    found = judge(files, suite, gate())
    assert found.verdict is Decision.INCONCLUSIVE
    assert found.arms["new"].overall.n == 600
    assert found.comparisons[0].pairs == 600


def test_weights_count(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, 40)
    heavy = [c.model_copy(update={"weight": 3.0 if n == 0 else 1.0}) for n, c in enumerate(suite.cases)]
    suite = Suite(suite.name, "1", suite.persona, "", tuple(heavy), suite.sha256, suite.checks)
    new = arm(tmp_path, suite, "new", lambda n, s: n != 0)
    found = judge({"old": arm(tmp_path, suite, "old", lambda n, s: True), "new": new}, suite, gate())
    assert found.arms["new"].overall.rate == pytest.approx(39 / 42)
    assert found.comparisons[0].difference == pytest.approx(-3 / 42)


def test_every_arm_and_sampling_is_in_the_verdict(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, 40)

    def rows(name: str, weak: int) -> list[CaseResult]:
        greedy = [result(name, n, n >= weak) for n in range(40)]
        return greedy + [result(name, n, n >= 2 * weak, sampling="warm", seed=s) for n in range(40) for s in (1, 2)]

    files = {
        name: write(tmp_path, suite, name, rows(name, weak))
        for name, weak in [("base", 20), ("old", 0), ("ptq", 9), ("new", 1)]
    }
    found = judge(files, suite, gate())
    assert list(found.arms) == ["base", "old", "ptq", "new"]
    assert found.arms["ptq"].overall.rate == pytest.approx(31 / 40)
    assert found.arms["ptq"].samplings["warm"].rate == pytest.approx(22 / 40)
    assert {c: r.n for c, r in found.arms["ptq"].categories.items()} == {"k0": 20, "k1": 20}
    assert [c.arm for c in found.comparisons] == ["base", "ptq", "new"]
    assert [c.arm for c in found.sampling_comparisons["warm"]] == ["base", "ptq", "new"]
    p = {c.arm: (c.p_mcnemar, c.p_holm) for c in found.comparisons}
    assert p["base"][1] == pytest.approx(3 * 2 / 2**20)  # smallest of three
    assert p["ptq"][1] == pytest.approx(2 * 2 / 2**9)
    assert p["new"] == (1.0, 1.0)


def test_verdict_files(tmp_path: Path) -> None:
    found = verdict_of(tmp_path, 40, lambda n, s: n not in (3, 5), lambda n, s: True)
    write_verdict(found, tmp_path / "verdict.json", tmp_path / "junit.xml")
    content = json.loads((tmp_path / "verdict.json").read_text())
    assert list(content) == [
        "verdict", "reasons", "suite", "gate", "look", "arms", "comparisons", "sampling_comparisons"
    ]  # fmt: skip
    assert set(content["arms"]["new"]) == {"overall", "categories", "samplings", "errors"}
    assert set(content["arms"]["new"]["overall"]) == {
        "passed", "n", "rate", "low", "high", "reason", "cases", "method"
    }  # fmt: skip
    assert content["look"] == {"number": None, "planned": None, "confidence": 0.95}
    assert (tmp_path / "summary.md").read_text() == markdown(content)
    assert {
        "arm", "reference", "difference", "ci_low", "ci_high", "p_mcnemar", "tost_p", "margin", "equivalent",
        "flips_worse", "flips_better",
    } <= set(content["comparisons"][0])  # fmt: skip
    assert content["comparisons"][0]["flips_worse"] == ["c-003", "c-005"]
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors"), suite.get("skipped")) == (
        "40",
        "2",
        "0",
        "0",
    )
    cases = suite.findall("testcase")
    assert [c.get("name") for c in cases] == [f"c-{n:03d}" for n in range(40)]
    assert [c.get("name") for c in cases if c.find("failure") is not None] == ["c-003", "c-005"]
    failure = cases[3].find("failure")
    assert failure is not None and failure.text is not None
    assert "mentions none of 'yes'" in failure.text
    assert "No.�" in failure.text  # the NUL that XML cannot hold
    assert cases[3].get("classname") == "k1"
    properties = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert properties["verdict"] == found.verdict.value


def test_results_of_another_suite_are_refused(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, 20)
    files = {name: arm(tmp_path, suite, name, good) for name in ("old", "new")}
    with pytest.raises(UserError, match="answer another suite"):
        judge(files, small_suite(tmp_path, 21), gate())


def test_gate_arms_without_results(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, 20)
    with pytest.raises(UserError, match="reference has no results"):
        judge({"new": arm(tmp_path, suite, "new", good)}, suite, gate())
    files = {name: arm(tmp_path, suite, name, good) for name in ("old", "new")}
    with pytest.raises(UserError, match="no answers under sampling 'warm'"):
        judge(files, suite, gate(sampling="warm"))
    with pytest.raises(UserError, match="cannot be read"):
        judge(files | {"new": tmp_path / "nowhere.jsonl"}, suite, gate())
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="holds no results"):
        judge(files | {"new": tmp_path / "empty.jsonl"}, suite, gate())


def test_compare_two_files(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, 30)
    old = arm(tmp_path, suite, "old", lambda n, s: True)
    new = arm(tmp_path, suite, "new", lambda n, s: n != 4)
    (found,) = compare(old, new)
    assert (found.reference, found.arm, found.sampling, found.flips_worse) == ("old", "new", "greedy", ["c-004"])
    assert found.difference == pytest.approx(-1 / 30)
    (swapped,) = compare(new, old)
    assert swapped.difference == pytest.approx(1 / 30)
    assert swapped.ci_low == pytest.approx(-(found.ci_high or 0))
    with pytest.raises(UserError, match="Not both results hold sampling 'warm'"):
        compare(old, new, sampling="warm")
    other = tmp_path / "other"
    other.mkdir()
    bigger = small_suite(other, 31)
    with pytest.raises(UserError, match="different suites"):
        compare(old, arm(other, bigger, "new", good))


def test_compare_uses_the_pairs_that_both_have(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, 40)
    old = write(tmp_path, suite, "old", [result("old", n, True) for n in range(30)])
    new = write(tmp_path, suite, "new", [result("new", n, n != 12) for n in range(10, 40)])
    (found,) = compare(old, new)
    assert (found.pairs, found.flips_worse) == (20, ["c-012"])


def test_categories_come_with_their_own_difference(tmp_path: Path) -> None:
    """k0 holds 30 cases of which 3 are lost; k1 holds 9, too few for a difference but not for a count."""
    suite = small_suite(tmp_path, 60)
    numbers = [*range(0, 60, 2), *range(1, 19, 2)]
    old = write(tmp_path, suite, "old", [result("old", n, True) for n in numbers])
    new = write(tmp_path, suite, "new", [result("new", n, n not in (0, 2, 4, 1)) for n in numbers])
    (found,) = compare(old, new)
    k0, k1 = found.categories
    assert (k0.category, k0.pairs, k0.worse, k0.better) == ("k0", 30, 3, 0)
    assert k0.difference == pytest.approx(-0.1)
    assert k0.ci_low is not None and k0.ci_high is not None
    for end, sign in ((k0.ci_low, 1), (k0.ci_high, -1)):
        assert tango_z(PairedCounts(0, 3, 30), end) == pytest.approx(sign * norm.ppf(0.975), abs=1e-6)
    assert (k0.p_mcnemar, k0.p_holm) == (pytest.approx(0.25), pytest.approx(0.5))
    assert (k1.pairs, k1.worse, k1.difference, k1.ci_low) == (9, 1, None, None)
    assert "too few: 9 cases" in (k1.reason or "")


def test_an_arm_asked_twice_is_compared_with_itself(tmp_path: Path) -> None:
    """The repeated pass has another name and the same temperature, top_p and seed; 2 of 40 answers differ."""
    suite = small_suite(tmp_path, 40)

    def rows(name: str, flipped: tuple[int, ...]) -> list[CaseResult]:
        once = [result(name, n, n != 5, seed=3) for n in range(40)]
        again = [result(name, n, (n != 5) != (n in flipped), seed=3, sampling="again") for n in range(40)]
        other_seed = [result(name, n, False, seed=4, sampling="again") for n in range(40)]
        return once + again + other_seed

    old = write(tmp_path, suite, "old", [result("old", n, True, seed=3) for n in range(40)])
    new = write(tmp_path, suite, "new", rows("new", (5, 7)))
    (found,) = compare(old, new, sampling="greedy")
    flips = found.self_flips
    assert flips is not None and (flips.flips, flips.pairs, flips.rate) == (2, 40, pytest.approx(0.05))
    low, high = proportion_confint(2, 40, method="wilson")
    assert (flips.low, flips.high) == (pytest.approx(low), pytest.approx(high))
    assert found.reference_self_flips is None
    assert found.to_json()["self_flips"]["flips"] == 2
    verdict = judge({"old": old, "new": new}, suite, gate())
    assert verdict.comparisons[0].self_flips == flips
    warm = meta_path(new).read_text().replace('"again":{"temperature":0.0', '"again":{"temperature":0.7')
    meta_path(new).write_text(warm)
    assert compare(old, new, sampling="greedy")[0].self_flips is None  # another temperature is no repetition
