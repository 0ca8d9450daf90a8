"""Rates of one arm, and two arms set side by side: only questions that both answered count, pair by pair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qat.behavior import paired, stats
from qat.behavior.records import CaseResult, ResultKey, ResultMeta, read_meta, read_results
from qat.errors import UserError

Results = Mapping[ResultKey, CaseResult]
Settings = Mapping[str, Mapping[Literal["temperature", "top_p"], float]]
"""Sampling to what it was asked with: temperature and top_p."""


@dataclass(frozen=True)
class Answers:
    """What one arm said.

    Attributes:
        name: As reasons and tables call the arm.
        results: Everything that it was asked.
        settings: Of its samplings; empty where the file does not say.
        meta: Description of the result file, where there is one.
    """

    name: str
    results: Results
    settings: Settings = field(default_factory=dict)
    meta: ResultMeta | None = None

    @cached_property
    def answered(self) -> dict[ResultKey, CaseResult]:
        """Without the questions that ended in an error: that says nothing about the model."""
        return {key: result for key, result in self.results.items() if result.error is None}

    def asked(self, sampling: str) -> list[ResultKey]:
        """Questions under one sampling, errors included."""
        return [key for key in self.results if key.sampling == sampling]


def read_answers(path: Path, name: str | None = None) -> Answers:
    """Answers of a result file.

    Args:
        path: The file; its description is read where it lies beside it.
        name: Of the arm; by default the file's own.

    Raises:
        UserError: The file is missing, damaged or empty.
    """
    meta = read_meta(path)
    results = read_results(path).results
    if not results:
        raise UserError("The result file holds no results.", where=str(path))
    return Answers(name or next(iter(results.values())).arm, results, meta.samplings if meta else {}, meta)


class ArmRates(NamedTuple):
    """Pass rates of one arm: `overall` and `categories` under the judged sampling, `samplings` each as a whole.

    `errors` counts the questions under the judged sampling that ended in an error; they are in no rate.
    """

    overall: stats.Rate
    categories: dict[str, stats.Rate]
    samplings: dict[str, stats.Rate]
    errors: int

    def to_json(self) -> dict[str, Any]:
        """As it stands in verdict.json."""
        return {
            "overall": self.overall._asdict(),
            "categories": {name: rate._asdict() for name, rate in self.categories.items()},
            "samplings": {name: rate._asdict() for name, rate in self.samplings.items()},
            "errors": self.errors,
        }


class SelfFlips(NamedTuple):
    """How often an arm that was asked twice in the same way disagrees with itself.

    Attributes:
        flips: Questions that passed once and failed once.
        pairs: Questions asked twice: same case, seed, temperature and top_p.
        rate: Share of flips; None, like `low` and `high`, where the cases are too few.
        low: Lower end of its interval.
        high: Upper end.
        reason: Why there is no rate.
    """

    flips: int
    pairs: int
    rate: float | None
    low: float | None
    high: float | None
    reason: str | None


class CategoryChange(NamedTuple):
    """How one category differs.

    Attributes:
        category: Its name.
        pairs: Questions answered by both.
        worse: Cases that only the reference passes.
        better: Cases that only the arm passes.
        p_mcnemar: Exact McNemar test on cases.
        p_holm: The same, adjusted over the categories of this comparison.
        difference: Rate of the arm minus rate of the reference; None, like the interval, where `reason` says that there
            are too few cases.
        ci_low: Lower end of its interval, which is not adjusted for the number of categories.
        ci_high: Upper end.
        reason: Why there is no difference.
    """

    category: str
    pairs: int
    worse: int
    better: int
    p_mcnemar: float
    p_holm: float
    difference: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    reason: str | None = None


class Comparison(NamedTuple):
    """An arm against a reference on the same questions.

    Attributes:
        arm: The arm.
        reference: What it is compared with.
        sampling: Under which both answered.
        pairs: Questions answered by both.
        margin: Of equivalence.
        flips_worse: Cases that only the reference passes.
        flips_better: Cases that only the arm passes.
        difference: Rate of the arm minus rate of the reference, weighted; None where `reason` says that there are too
            few cases.
        ci_low: Lower end of the two-sided interval of the difference.
        ci_high: Upper end.
        method: `tango`, `tango, clustered by case` (cases asked several times) or `tango, weighted`.
        p_mcnemar: Exact McNemar test on cases.
        p_holm: The same, adjusted over the arms that are compared with this reference.
        tost_p: Equivalence within the margin, two one-sided score tests.
        equivalent: Whether the whole interval lies within the margin.
        self_flips: The arm against itself, where it was asked twice.
        reference_self_flips: The reference against itself, where it was asked twice.
        categories: The same by category.
        reason: Why there are no numbers.
    """

    arm: str
    reference: str
    sampling: str
    pairs: int
    margin: float
    flips_worse: list[str]
    flips_better: list[str]
    difference: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    method: str | None = None
    p_mcnemar: float | None = None
    p_holm: float | None = None
    tost_p: float | None = None
    equivalent: bool | None = None
    self_flips: SelfFlips | None = None
    reference_self_flips: SelfFlips | None = None
    categories: Sequence[CategoryChange] = ()
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in verdict.json."""
        return self._asdict() | {
            "categories": [change._asdict() for change in self.categories],
            "self_flips": self.self_flips and self.self_flips._asdict(),
            "reference_self_flips": self.reference_self_flips and self.reference_self_flips._asdict(),
        }


def arm_rates(answers: Answers, sampling: str, weights: Mapping[str, float], confidence: float) -> ArmRates:
    """Rates of one arm; `weights` gives the weight of a case (1 where absent)."""

    def rate(chosen: Iterable[CaseResult]) -> stats.Rate:
        return stats.rate([stats.Outcome(r.case, r.passed, weights.get(r.case, 1.0)) for r in chosen], confidence)

    found = list(answers.answered.values())
    judged = [result for result in found if result.sampling == sampling]
    return ArmRates(
        overall=rate(judged),
        categories={
            name: rate(r for r in judged if r.category == name) for name in dict.fromkeys(r.category for r in judged)
        },
        samplings={
            name: rate(r for r in found if r.sampling == name) for name in dict.fromkeys(r.sampling for r in found)
        },
        errors=len(answers.asked(sampling)) - len(judged),
    )


def self_flips(answers: Answers, sampling: str, confidence: float) -> SelfFlips | None:
    """The arm against itself, or None where it was not asked twice.

    A repeated pass is a second sampling of the same temperature and top_p that shares seeds with `sampling`: the same
    requests, sent again. At temperature 0 it is 0 only where the server is deterministic.
    """
    own = answers.settings.get(sampling)
    twins = {name for name, settings in answers.settings.items() if name != sampling and settings == own}
    found = answers.answered
    flipped = [
        stats.Outcome(key.case, result.passed != found[again].passed)
        for key, result in found.items()
        if key.sampling == sampling
        for twin in twins
        if (again := key._replace(sampling=twin)) in found
    ]
    if not flipped:
        return None
    rate = stats.rate(flipped, confidence)
    return SelfFlips(rate.passed, rate.n, rate.rate, rate.low, rate.high, rate.reason)


def compare_arms(
    arm: Answers, reference: Answers, sampling: str, weights: Mapping[str, float], margin: float, confidence: float
) -> Comparison:
    """Compare two arms under one sampling; a question that only one of them answered is left out."""
    keys = [key for key in arm.answered if key.sampling == sampling and key in reference.answered]
    pairs = [
        paired.Pair(key.case, arm.answered[key].passed, reference.answered[key].passed, weights.get(key.case, 1.0))
        for key in keys
    ]
    empty = Comparison(
        arm.name,
        reference.name,
        sampling,
        len(pairs),
        margin,
        *paired.flips(pairs),
        self_flips=self_flips(arm, sampling, confidence),
        reference_self_flips=self_flips(reference, sampling, confidence),
    )
    if few := stats.too_few(len({pair.case for pair in pairs})):
        return empty._replace(reason=f"{few} that both answered")
    counts = paired.paired_counts(pairs)
    low, high = paired.tango_interval(counts, confidence)
    p_mcnemar = paired.mcnemar_exact(len(empty.flips_worse), len(empty.flips_better))
    return empty._replace(
        difference=counts.difference,
        ci_low=low,
        ci_high=high,
        method=paired.method(pairs),
        p_mcnemar=p_mcnemar,
        p_holm=p_mcnemar,
        tost_p=paired.tost(counts, margin).p,
        equivalent=-margin < low and high < margin,
        categories=_by_category([arm.answered[key].category for key in keys], pairs, confidence),
    )


def _by_category(
    categories: Sequence[str], pairs: Sequence[paired.Pair], confidence: float
) -> tuple[CategoryChange, ...]:
    groups: dict[str, list[paired.Pair]] = {}
    for category, pair in zip(categories, pairs, strict=True):
        groups.setdefault(category, []).append(pair)
    found = {name: paired.flips(group) for name, group in groups.items()}
    p_values = {name: paired.mcnemar_exact(len(flips.worse), len(flips.better)) for name, flips in found.items()}
    adjusted = paired.holm(p_values)
    changes = []
    for name, group in groups.items():
        change = CategoryChange(
            name, len(group), len(found[name].worse), len(found[name].better), p_values[name], adjusted[name]
        )
        if few := stats.too_few(len({pair.case for pair in group})):
            changes.append(change._replace(reason=few))
            continue
        counts = paired.paired_counts(group)
        low, high = paired.tango_interval(counts, confidence)
        changes.append(change._replace(difference=counts.difference, ci_low=low, ci_high=high))
    return tuple(changes)


def adjust_over_arms(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Fill `p_holm` over the arms of a sampling: the more arms are compared, the likelier is a small p by chance."""
    adjusted = paired.holm({c.arm: c.p_mcnemar for c in comparisons if c.p_mcnemar is not None})
    return [c._replace(p_holm=adjusted.get(c.arm)) for c in comparisons]


def compare(
    result_a: Path, result_b: Path, *, sampling: str | None = None, margin: float = 0.03, confidence: float = 0.95
) -> list[Comparison]:
    """Set result file B against result file A.

    Args:
        result_a: The reference.
        result_b: The arm; differences are B minus A.
        sampling: One sampling; None: every one that both files hold.
        margin: Of equivalence.
        confidence: Of the intervals, two-sided.

    Returns:
        One comparison per sampling, in the order of file A.

    Raises:
        UserError: A file is missing or damaged, they were made with different suites, or have no sampling in common.
    """
    a, b = read_answers(result_a), read_answers(result_b)
    if a.meta is not None and b.meta is not None and a.meta.sha256 != b.meta.sha256:
        raise UserError(
            "The two results answer different suites.",
            where=f"{result_a} and {result_b}",
            value=f"{a.meta.suite} {a.meta.sha256[:12]} and {b.meta.suite} {b.meta.sha256[:12]}",
        )
    common = [name for name in dict.fromkeys(key.sampling for key in a.answered) if b.asked(name)]
    wanted = common if sampling is None else [sampling]
    if not wanted or any(name not in common for name in wanted):
        raise UserError(
            "The two results have no sampling in common."
            if sampling is None
            else f"Not both results hold sampling {sampling!r}.",
            where=f"{result_a} and {result_b}",
            remedy=f"samplings of both: {', '.join(common)}" if common else "",
        )
    return [compare_arms(b, a, name, {}, margin, confidence) for name in wanted]
