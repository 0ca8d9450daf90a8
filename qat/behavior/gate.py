"""The gate: may the candidate be shipped?

Two statements decide, each read off a two-sided interval that is printed with it:

- floor: the candidate's pass rate is at least `pass_floor`;
- drop: it does not fall behind the reference by more than `max_drop`, on the same questions.

A statement is proven where its whole interval agrees with it, disproven where none of it does, and open otherwise.
PASS: both proven, and every question was put to both. FAIL: one is disproven. Otherwise INCONCLUSIVE: more cases or
seeds are needed, not another model.

A question that ended in an error says nothing about the model, and could have gone either way. A statement is proven
only where it also holds with every error counted against the candidate, and disproven only where it also fails with
every error counted for it. So a few errors cost a little certainty, many leave the verdict open, and none can buy a
PASS.

PASS needs both statements, so their errors do not add up: a candidate at the edge of either passes with probability
(1 - confidence) / 2. FAIL needs one: a candidate at the edge of both fails with probability 1 - confidence. The floor
keeps that as an upper bound, because Clopper's and Pearson's exact interval must agree with Wilson's. The drop keeps it
about, by Tango's; docs/benchmarks/statistics.md enumerates both. Looking again at the same candidate is paid for
beforehand (`qat.behavior.sequential`).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from qat.behavior import paired, stats
from qat.behavior.compare import (
    Answers,
    ArmRates,
    Comparison,
    adjust_over_arms,
    arm_rates,
    compare_arms,
    read_answers,
)
from qat.behavior.junit import JunitCase, junit_cases, junit_xml
from qat.behavior.sequential import Look, confidence_at
from qat.behavior.suite import Suite
from qat.behavior.summary import markdown
from qat.errors import ExitCode, UserError
from qat.recipe.schema import GateBlock
from qat.storage import write_atomic, write_json


class Decision(StrEnum):
    """The three outcomes."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"

    @property
    def exit_code(self) -> ExitCode:
        """Exit status of the command that judged."""
        return {"PASS": ExitCode.DONE, "FAIL": ExitCode.FAIL, "INCONCLUSIVE": ExitCode.INCONCLUSIVE}[self.value]


class Questions(NamedTuple):
    """What was asked: the suite's name, version and hash, and category and weight of each case in its order."""

    suite: dict[str, str]
    categories: dict[str, str]
    weights: dict[str, float]


class Verdict(NamedTuple):
    """What the gate found.

    Attributes:
        verdict: The decision.
        reasons: Why, in sentences with numbers; the deciding ones first.
        arms: Rates of every arm, in the order given.
        comparisons: Every other arm against the reference under the gate's sampling.
        sampling_comparisons: The same under every other sampling.
        gate: The block that was judged by.
        look: Which look at the candidate this is, and the confidence that it was judged with.
        suite: Name, version and hash of the suite.
        cases: For JUnit: every case of the candidate with what failed.
    """

    verdict: Decision
    reasons: list[str]
    arms: dict[str, ArmRates]
    comparisons: list[Comparison]
    sampling_comparisons: dict[str, list[Comparison]]
    gate: dict[str, Any]
    look: dict[str, Any]
    suite: dict[str, str]
    cases: list[JunitCase]

    def to_json(self) -> dict[str, Any]:
        """The content of verdict.json."""
        return {
            "verdict": self.verdict.value,
            "reasons": self.reasons,
            "suite": self.suite,
            "gate": self.gate,
            "look": self.look,
            "arms": {name: rates.to_json() for name, rates in self.arms.items()},
            "comparisons": [c.to_json() for c in self.comparisons],
            "sampling_comparisons": {
                name: [c.to_json() for c in rows] for name, rows in self.sampling_comparisons.items()
            },
        }


def judge(results: Mapping[str, Path], suite: Suite, gate: GateBlock) -> Verdict:
    """Judge the candidate by result files of the arms.

    Args:
        results: Arm to its result file, in the order of the table.
        suite: The suite that they answer.
        gate: Candidate, reference, sampling, floor, drop and confidence.

    Raises:
        UserError: The candidate or reference has no results, a file is damaged or answers another suite, or nobody was
            asked under the gate's sampling.
    """
    arms = {arm: read_answers(path, arm) for arm, path in results.items()}
    known = suite.by_id
    for arm, answers in arms.items():
        if answers.meta is not None and answers.meta.sha256 != suite.sha256:
            raise UserError(
                f"The results of arm {arm!r} answer another suite.",
                where=str(results[arm]),
                value=f"{answers.meta.suite} {answers.meta.sha256[:12]}, not {suite.name} {suite.sha256[:12]}",
                remedy="run the suite again on this arm",
            )
        if strangers := [key.case for key in answers.results if key.case not in known]:
            raise UserError(
                f"The results of arm {arm!r} hold cases that the suite does not know.",
                where=str(results[arm]),
                value=strangers[0],
            )
    questions = Questions(
        suite={"name": suite.name, "version": suite.version, "sha256": suite.sha256},
        categories={case.id: case.category for case in suite.cases},
        weights={case.id: case.weight for case in suite.cases},
    )
    return judge_answers(arms, questions, gate)


def judge_answers(
    arms: Mapping[str, Answers], questions: Questions, gate: GateBlock, look: Look | None = None
) -> Verdict:
    """Judge the candidate by the answers of the arms.

    Args:
        arms: By name, in the order of the table.
        questions: What they were asked.
        gate: Candidate, reference, sampling, floor, drop and confidence.
        look: Which look at this candidate it is; None: the only one.

    Raises:
        UserError: The candidate or reference is missing or was not asked under the gate's sampling, or the look was
            not planned.
    """
    for role, arm in (("candidate", gate.candidate), ("reference", gate.reference)):
        if arm not in arms:
            raise UserError(
                f"The gate's {role} has no results.",
                where="behavior.gate",
                value=arm,
                remedy=f"arms at hand: {', '.join(arms)}",
            )
        if not arms[arm].asked(gate.sampling):
            raise UserError(
                f"Arm {arm!r} has no answers under sampling {gate.sampling!r}.",
                remedy=f"it has: {', '.join(dict.fromkeys(key.sampling for key in arms[arm].results))}",
            )
    confidence = confidence_at(gate.confidence, look)
    used = gate.model_copy(update={"confidence": confidence})
    candidate, reference = arms[gate.candidate], arms[gate.reference]

    def comparisons(sampling: str) -> list[Comparison]:
        return adjust_over_arms(
            [
                compare_arms(arm, reference, sampling, questions.weights, gate.max_drop, confidence)
                for arm in arms.values()
                if arm is not reference and arm.asked(sampling)
            ]
        )

    rates = {name: arm_rates(answers, gate.sampling, questions.weights, confidence) for name, answers in arms.items()}
    judged = comparisons(gate.sampling)
    decision, reasons = _decide(used, candidate, reference, rates, judged, questions.weights)
    others = dict.fromkeys(key.sampling for key in candidate.results if key.sampling != gate.sampling)
    return Verdict(
        verdict=decision,
        reasons=reasons,
        arms=rates,
        comparisons=judged,
        sampling_comparisons={name: comparisons(name) for name in others},
        gate=gate.model_dump(mode="json"),
        look={"number": look and look.number, "planned": look and look.planned, "confidence": confidence},
        suite=questions.suite,
        cases=junit_cases(candidate.results, questions.categories, gate.sampling),
    )


def _decide(
    gate: GateBlock,
    candidate: Answers,
    reference: Answers,
    rates: Mapping[str, ArmRates],
    comparisons: list[Comparison],
    weights: Mapping[str, float],
) -> tuple[Decision, list[str]]:
    states = [_floor(gate, candidate, rates[candidate.name].overall, weights)]
    comparison = next((row for row in comparisons if row.arm == gate.candidate), None)
    if comparison is not None:
        states.append(_drop(gate, candidate, reference, comparison, weights))
    missing = _missing(candidate, reference, gate.sampling)
    if any(proven is False for proven, _ in states):
        decision = Decision.FAIL
    elif all(proven for proven, _ in states) and not missing:
        decision = Decision.PASS
    else:
        decision = Decision.INCONCLUSIVE
    reasons = [text for _, text in sorted(states, key=lambda state: {False: 0, None: 1, True: 2}[state[0]])]
    worse = [] if comparison is None else _worse_categories(gate, comparison)
    return decision, [*missing, *_errors(candidate, reference, gate.sampling), *reasons, *worse]


def _both(candidate: Answers, reference: Answers) -> tuple[Answers, ...]:
    return (candidate,) if candidate is reference else (candidate, reference)


def _missing(candidate: Answers, reference: Answers, sampling: str) -> list[str]:
    """Questions that one of the two was not asked: the run is not over, and no PASS is given on part of it."""
    every = {*candidate.asked(sampling), *reference.asked(sampling)}
    return [
        f"{arm.name}: {len(every) - asked} of {len(every)} questions were not asked"
        for arm in _both(candidate, reference)
        if (asked := len(arm.asked(sampling))) < len(every)
    ]


def _errors(candidate: Answers, reference: Answers, sampling: str) -> list[str]:
    notes = []
    for arm in _both(candidate, reference):
        asked = arm.asked(sampling)
        if failed := [key for key in asked if key not in arm.answered]:
            first = arm.results[failed[0]]
            notes.append(
                f"{arm.name}: {len(failed)} of {len(asked)} questions ended in an error, "
                f"first {first.case}: {first.error}"
            )
    return notes


def _outcomes(arm: Answers, sampling: str, errors_pass: bool) -> dict[Any, bool]:
    """Every question of the arm, with its errors counted as passed or as failed."""
    return {key: errors_pass if arm.results[key].error else arm.results[key].passed for key in arm.asked(sampling)}


def _proven(worst: float, best: float, limit: float) -> bool | None:
    """Whether the statement "at least `limit`" holds, by the lowest and highest value that is left possible."""
    return True if worst >= limit else False if best < limit else None


def _floor(
    gate: GateBlock, candidate: Answers, rate: stats.Rate, weights: Mapping[str, float]
) -> tuple[bool | None, str]:
    if rate.rate is None or rate.low is None or rate.high is None:
        return None, f"{gate.candidate}: {rate.reason}"

    def outcomes(errors_pass: bool) -> list[stats.Outcome]:
        found = _outcomes(candidate, gate.sampling, errors_pass)
        return [stats.Outcome(key.case, passed, weights.get(key.case, 1.0)) for key, passed in found.items()]

    worst, best = (stats.rate(outcomes(errors_pass), gate.confidence) for errors_pass in (False, True))
    exact = stats.Interval(
        stats.exact_interval(outcomes(False), gate.confidence).low,
        stats.exact_interval(outcomes(True), gate.confidence).high,
    )
    by_wilson = _proven(worst.low or 0.0, best.high or 1.0, gate.pass_floor)
    proven = by_wilson if by_wilson is _proven(*exact, gate.pass_floor) else None
    relation = {True: "reaches", False: "misses", None: "neither clearly reaches nor misses"}[proven]
    doubt = "" if proven is by_wilson else f" (exact interval {exact.low:.1%} to {exact.high:.1%})"
    errors = len(candidate.asked(gate.sampling)) - rate.n
    return proven, (
        f"{gate.candidate} passes {rate.passed} of {rate.n} ({rate.rate:.1%}, {_percent(gate)} interval "
        f"{rate.low:.1%} to {rate.high:.1%}) and {relation} the floor of {gate.pass_floor:.1%}{doubt}"
        f"{_whatever(proven, errors)}"
    )


def _drop(
    gate: GateBlock, candidate: Answers, reference: Answers, comparison: Comparison, weights: Mapping[str, float]
) -> tuple[bool | None, str]:
    if comparison.difference is None or comparison.ci_low is None or comparison.ci_high is None:
        return None, f"{gate.candidate} against {gate.reference}: {comparison.reason}"

    def bound(errors_help: bool) -> stats.Interval:
        mine = _outcomes(candidate, gate.sampling, errors_help)
        theirs = _outcomes(reference, gate.sampling, not errors_help)
        pairs = [paired.Pair(k.case, mine[k], theirs[k], weights.get(k.case, 1.0)) for k in mine if k in theirs]
        return paired.tango_interval(paired.paired_counts(pairs), gate.confidence)

    proven = _proven(bound(False).low, bound(True).high, -gate.max_drop)
    relation = {
        True: "not worse by more than",
        False: "worse by more than",
        None: "not clearly better or worse than the limit of",
    }[proven]
    points = [f"{100 * value:+.1f}" for value in (comparison.difference, comparison.ci_low, comparison.ci_high)]
    errors = sum(len(arm.asked(gate.sampling)) - sum(k.sampling == gate.sampling for k in arm.answered)
                 for arm in (candidate, reference))  # fmt: skip
    return proven, (
        f"{gate.candidate} against {gate.reference} on {comparison.pairs} pairs: {points[0]} points "
        f"({_percent(gate)} interval {points[1]} to {points[2]}), {relation} {100 * gate.max_drop:.1f} points"
        f"{_whatever(proven, errors)}; {len(comparison.flips_worse)} cases lost, {len(comparison.flips_better)} won"
    )


def _whatever(proven: bool | None, errors: int) -> str:
    if not errors:
        return ""
    counted = f"{errors} error{'s' * (errors > 1)}"
    return f", as {counted} could have gone either way" if proven is None else f", whichever way {counted} had gone"


def _percent(gate: GateBlock) -> str:
    return f"{100 * gate.confidence:.4g}%"


def _worse_categories(gate: GateBlock, comparison: Comparison) -> list[str]:
    return [
        f"category {change.category} is worse than {gate.reference}: {change.worse} cases lost, "
        f"{change.better} won of {change.pairs} (exact McNemar, Holm over categories: p = {change.p_holm:.2g})"
        for change in comparison.categories
        if change.worse > change.better and change.p_holm < 1 - gate.confidence
    ]


def write_verdict(verdict: Verdict, json_path: Path, junit_path: Path) -> None:
    """Write `verdict.json`, `junit.xml` and, beside the first, `summary.md`, each whole or not at all."""
    write_json(json_path, verdict.to_json())
    write_junit(verdict, junit_path)
    write_atomic(json_path.with_name("summary.md"), markdown(verdict.to_json()))


def write_junit(verdict: Verdict, path: Path) -> None:
    """Write the JUnit file: one test case per case, verdict and reasons as properties."""
    name = f"{verdict.suite['name']}: {verdict.gate['candidate']}"
    properties = {"verdict": verdict.verdict.value, "suite_sha256": verdict.suite["sha256"]}
    properties |= {f"reason_{number}": reason for number, reason in enumerate(verdict.reasons, start=1)}
    write_atomic(path, junit_xml(name, verdict.cases, properties))
