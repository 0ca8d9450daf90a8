"""The gate: may the candidate be shipped?

Two statements decide, each read off a two-sided interval that is printed with it:

- floor: the candidate's pass rate is at least `pass_floor`;
- drop: it does not fall behind the reference by more than `max_drop`, on the same questions.

A statement is proven where its whole interval agrees with it, disproven where none of it does, and open otherwise.
PASS: both proven, and every case was answered by both arms. FAIL: one is disproven. Otherwise INCONCLUSIVE: more cases
or seeds are needed, not another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from qat.behavior.compare import (
    ArmRates,
    Comparison,
    Results,
    adjust_over_arms,
    answered,
    arm_rates,
    compare,
    compare_arms,
)
from qat.behavior.junit import JunitCase, junit_xml
from qat.behavior.records import CaseResult, ResultKey, read_meta, read_results
from qat.behavior.stats import Rate
from qat.behavior.suite import Suite
from qat.errors import ExitCode, UserError
from qat.recipe.schema import GateBlock
from qat.runs import write_atomic, write_json

__all__ = ["Decision", "Verdict", "compare", "judge", "write_verdict"]


class Decision(StrEnum):
    """The three outcomes."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"

    @property
    def exit_code(self) -> ExitCode:
        """Exit status of the command that judged."""
        return {"PASS": ExitCode.DONE, "FAIL": ExitCode.FAIL, "INCONCLUSIVE": ExitCode.INCONCLUSIVE}[self.value]


class Verdict(NamedTuple):
    """What the gate found.

    Attributes:
        verdict: The decision.
        reasons: Why, in sentences with numbers; the deciding ones first.
        arms: Rates of every arm, in the order given.
        comparisons: Every other arm against the reference under the gate's sampling.
        sampling_comparisons: The same under every other sampling.
        gate: The block that was judged by.
        suite: Name, version and hash of the suite.
        cases: For JUnit: every case of the candidate with what failed.
    """

    verdict: Decision
    reasons: list[str]
    arms: dict[str, ArmRates]
    comparisons: list[Comparison]
    sampling_comparisons: dict[str, list[Comparison]]
    gate: dict[str, Any]
    suite: dict[str, str]
    cases: list[JunitCase]

    def to_json(self) -> dict[str, Any]:
        """The content of verdict.json."""
        return {
            "verdict": self.verdict.value,
            "reasons": self.reasons,
            "suite": self.suite,
            "gate": self.gate,
            "arms": {name: _rates_json(rates) for name, rates in self.arms.items()},
            "comparisons": [c.to_json() for c in self.comparisons],
            "sampling_comparisons": {
                name: [c.to_json() for c in rows] for name, rows in self.sampling_comparisons.items()
            },
        }


def _rates_json(rates: ArmRates) -> dict[str, Any]:
    return {
        "overall": rates.overall._asdict(),
        "categories": {name: rate._asdict() for name, rate in rates.categories.items()},
        "samplings": {name: rate._asdict() for name, rate in rates.samplings.items()},
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
    for role, arm in (("candidate", gate.candidate), ("reference", gate.reference)):
        if arm not in results:
            raise UserError(
                f"The gate's {role} has no results.",
                where="behavior.gate",
                value=arm,
                remedy=f"arms at hand: {', '.join(results)}",
            )
    everything = {arm: _results_of(arm, path, suite) for arm, path in results.items()}
    weights = {case.id: case.weight for case in suite.cases}
    clean = {arm: answered(found) for arm, found in everything.items()}
    for arm in (gate.candidate, gate.reference):
        if not any(key.sampling == gate.sampling for key in clean[arm]):
            raise UserError(f"Arm {arm!r} has no answers under sampling {gate.sampling!r}.", where=str(results[arm]))
    samplings = dict.fromkeys(key.sampling for key in clean[gate.candidate])

    def comparisons(sampling: str) -> list[Comparison]:
        rows = [
            compare_arms(
                arm,
                clean[arm],
                gate.reference,
                clean[gate.reference],
                sampling,
                weights,
                gate.max_drop,
                gate.confidence,
            )
            for arm in results
            if arm != gate.reference and any(key.sampling == sampling for key in clean[arm])
        ]
        return adjust_over_arms(rows)

    arms = {arm: arm_rates(found, gate.sampling, weights, gate.confidence) for arm, found in clean.items()}
    judged = comparisons(gate.sampling)
    candidate = next((row for row in judged if row.arm == gate.candidate), None)
    decision, reasons = _decide(gate, arms[gate.candidate].overall, candidate, _gaps(everything, suite, gate))
    return Verdict(
        verdict=decision,
        reasons=reasons,
        arms=arms,
        comparisons=judged,
        sampling_comparisons={name: comparisons(name) for name in samplings if name != gate.sampling},
        gate=gate.model_dump(mode="json"),
        suite={"name": suite.name, "version": suite.version, "sha256": suite.sha256},
        cases=_junit_cases(everything[gate.candidate], suite, gate.sampling),
    )


def _results_of(arm: str, path: Path, suite: Suite) -> dict[ResultKey, CaseResult]:
    meta = read_meta(path)
    if meta is not None and meta.sha256 != suite.sha256:
        raise UserError(
            f"The results of arm {arm!r} answer another suite.",
            where=str(path),
            value=f"{meta.suite} {meta.sha256[:12]}, not {suite.name} {suite.sha256[:12]}",
            remedy="run the suite again on this arm",
        )
    found = read_results(path).results
    known = suite.by_id
    if strangers := [key.case for key in found if key.case not in known]:
        raise UserError(
            f"The results of arm {arm!r} hold cases that the suite does not know.", where=str(path), value=strangers[0]
        )
    return found


def _gaps(everything: Mapping[str, Results], suite: Suite, gate: GateBlock) -> list[str]:
    """What stands against a PASS beside the numbers: refused or unasked cases of the two arms that decide."""
    gaps = []
    asked = {
        arm: {k for k in everything[arm] if k.sampling == gate.sampling} for arm in (gate.candidate, gate.reference)
    }
    every = asked[gate.candidate] | asked[gate.reference]
    for arm, keys in asked.items():
        refused = [key for key in keys if everything[arm][key].error is not None]
        if refused:
            first = everything[arm][refused[0]]
            gaps.append(
                f"{arm}: the server refused {len(refused)} of {len(keys)} questions, first {first.case}: {first.error}"
            )
        if missing := len(every - keys):
            gaps.append(f"{arm}: {missing} of {len(every)} questions were not asked")
    return gaps


def _decide(gate: GateBlock, rate: Rate, comparison: Comparison | None, gaps: list[str]) -> tuple[Decision, list[str]]:
    percent = f"{gate.confidence:.0%}"
    states = [_floor(gate, rate, percent)]
    if comparison is not None:
        states.append(_drop(gate, comparison, percent))
    reasons = [text for _, text in sorted(states, key=lambda state: {False: 0, None: 1, True: 2}[state[0]])]
    if any(proven is False for proven, _ in states):
        decision = Decision.FAIL
    elif all(proven for proven, _ in states) and not gaps:
        decision = Decision.PASS
    else:
        decision = Decision.INCONCLUSIVE
    if comparison is not None:
        for change in comparison.categories:
            if change.worse > change.better and change.p_holm < 1 - gate.confidence:
                reasons.append(
                    f"category {change.category} is worse than {gate.reference}: {change.worse} cases lost, "
                    f"{change.better} won of {change.pairs} (exact McNemar, Holm over categories: "
                    f"p = {change.p_holm:.2g})"
                )
    return decision, [*gaps, *reasons]


def _floor(gate: GateBlock, rate: Rate, percent: str) -> tuple[bool | None, str]:
    if rate.rate is None or rate.low is None or rate.high is None:
        return None, f"{gate.candidate}: {rate.reason}"
    proven = True if rate.low >= gate.pass_floor else False if rate.high < gate.pass_floor else None
    relation = {True: "reaches", False: "misses", None: "neither clearly reaches nor misses"}[proven]
    return proven, (
        f"{gate.candidate} passes {rate.passed} of {rate.n} ({rate.rate:.1%}, {percent} interval {rate.low:.1%} to "
        f"{rate.high:.1%}) and {relation} the floor of {gate.pass_floor:.1%}"
    )


def _drop(gate: GateBlock, comparison: Comparison, percent: str) -> tuple[bool | None, str]:
    if comparison.difference is None or comparison.ci_low is None or comparison.ci_high is None:
        return None, f"{gate.candidate} against {gate.reference}: {comparison.reason}"
    proven = True if comparison.ci_low >= -gate.max_drop else False if comparison.ci_high < -gate.max_drop else None
    relation = {
        True: "not worse by more than",
        False: "worse by more than",
        None: "not clearly better or worse than the limit of",
    }[proven]
    points = [f"{100 * value:+.1f}" for value in (comparison.difference, comparison.ci_low, comparison.ci_high)]
    return proven, (
        f"{gate.candidate} against {gate.reference} on {comparison.pairs} pairs: {points[0]} points "
        f"({percent} interval {points[1]} to {points[2]}), {relation} {100 * gate.max_drop:.1f} points; "
        f"{len(comparison.flips_worse)} cases lost, {len(comparison.flips_better)} won"
    )


def _junit_cases(results: Results, suite: Suite, sampling: str) -> list[JunitCase]:
    """One entry per case under the gate's sampling; with several seeds the case fails where any of them does."""
    by_case: dict[str, list[CaseResult]] = {}
    for key, result in results.items():
        if key.sampling == sampling:
            by_case.setdefault(key.case, []).append(result)
    made = []
    for case in suite.cases:
        found = by_case.get(case.id, [])
        problems = [f"seed {r.seed}: {f.check}: {f.detail}" for r in found for f in r.failed_checks]
        spoken = [str(message.get("content") or "") for r in found if not r.passed for message in r.produced]
        made.append(
            JunitCase(
                case.id,
                case.category,
                sum(r.latency_s for r in found),
                problems,
                next((r.error for r in found if r.error), None),
                "\n".join(text for text in spoken if text),
                asked=bool(found),
            )
        )
    return made


def write_verdict(verdict: Verdict, json_path: Path, junit_path: Path) -> None:
    """Write `verdict.json` and `junit.xml`, each whole or not at all."""
    write_json(json_path, verdict.to_json())
    name = f"{verdict.suite['name']}: {verdict.gate['candidate']}"
    properties = {"verdict": verdict.verdict.value, "suite_sha256": verdict.suite["sha256"]}
    properties |= {f"reason_{number}": reason for number, reason in enumerate(verdict.reasons, start=1)}
    write_atomic(junit_path, junit_xml(name, verdict.cases, properties))
