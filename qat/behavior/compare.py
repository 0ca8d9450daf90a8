"""Rates of one arm, and two arms set side by side: only questions that both answered count, pair by pair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qat.behavior import stats
from qat.behavior.records import CaseResult, ResultKey, read_meta, read_results
from qat.errors import UserError


class ArmRates(NamedTuple):
    """Pass rates of one arm: `overall` and `categories` under the judged sampling, `samplings` each as a whole."""

    overall: stats.Rate
    categories: dict[str, stats.Rate]
    samplings: dict[str, stats.Rate]


class CategoryChange(NamedTuple):
    """How one category differs; `p_holm` is adjusted over the categories of this comparison."""

    category: str
    pairs: int
    worse: int
    better: int
    p_mcnemar: float
    p_holm: float


class Comparison(NamedTuple):
    """An arm against a reference on the same questions.

    Attributes:
        arm: The arm.
        reference: What it is compared with.
        sampling: Under which both answered.
        pairs: Questions answered by both.
        difference: Rate of the arm minus rate of the reference, weighted; None where `reason` says that there are too
            few cases.
        ci_low: Lower end of the two-sided interval of the difference.
        ci_high: Upper end.
        p_mcnemar: Exact McNemar test on cases.
        p_holm: The same, adjusted over the arms that are compared with this reference.
        tost_p: Equivalence within the margin, two one-sided score tests.
        margin: That margin.
        equivalent: Whether the whole interval lies within the margin.
        flips_worse: Cases that only the reference passes.
        flips_better: Cases that only the arm passes.
        categories: The same by category.
        reason: Why there are no numbers.
    """

    arm: str
    reference: str
    sampling: str
    pairs: int
    difference: float | None
    ci_low: float | None
    ci_high: float | None
    p_mcnemar: float | None
    p_holm: float | None
    tost_p: float | None
    margin: float
    equivalent: bool | None
    flips_worse: list[str]
    flips_better: list[str]
    categories: list[CategoryChange]
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in verdict.json."""
        return self._asdict() | {"categories": [change._asdict() for change in self.categories]}


Results = Mapping[ResultKey, CaseResult]
"""Answers of one arm, without those that the server refused."""


def arm_rates(results: Results, sampling: str, weights: Mapping[str, float], confidence: float) -> ArmRates:
    """Rates of one arm; `weights` gives the weight of a case (1 where absent)."""

    def rate(chosen: Iterable[CaseResult]) -> stats.Rate:
        return stats.rate([stats.Outcome(r.case, r.passed, weights.get(r.case, 1.0)) for r in chosen], confidence)

    judged = [result for result in results.values() if result.sampling == sampling]
    categories = dict.fromkeys(result.category for result in judged)
    samplings = dict.fromkeys(result.sampling for result in results.values())
    return ArmRates(
        overall=rate(judged),
        categories={name: rate(r for r in judged if r.category == name) for name in categories},
        samplings={name: rate(r for r in results.values() if r.sampling == name) for name in samplings},
    )


def compare_arms(
    arm: str,
    results: Results,
    reference: str,
    others: Results,
    sampling: str,
    weights: Mapping[str, float],
    margin: float,
    confidence: float,
) -> Comparison:
    """Compare two arms under one sampling; a question that only one of them answered is left out."""
    keys = [key for key in results if key.sampling == sampling and key in others]
    pairs = [stats.Pair(key.case, results[key].passed, others[key].passed, weights.get(key.case, 1.0)) for key in keys]
    worse, better = stats.flips(pairs)
    empty = Comparison(
        arm, reference, sampling, len(pairs), None, None, None, None, None, None, margin, None, worse, better, [],
    )  # fmt: skip
    cases = len({pair.case for pair in pairs})
    if cases < stats.MIN_CASES:
        return empty._replace(reason=f"too few: {cases} cases answered by both, at least {stats.MIN_CASES} are needed")
    counts = stats.paired_counts(pairs)
    interval = stats.tango_interval(counts, confidence)
    p_mcnemar = stats.mcnemar_exact(len(worse), len(better))
    return empty._replace(
        difference=counts.difference,
        ci_low=interval.low,
        ci_high=interval.high,
        p_mcnemar=p_mcnemar,
        p_holm=p_mcnemar,
        tost_p=stats.tost(counts, margin).p,
        equivalent=-margin < interval.low and interval.high < margin,
        categories=_by_category(results, pairs, keys),
    )


def _by_category(results: Results, pairs: Sequence[stats.Pair], keys: Sequence[ResultKey]) -> list[CategoryChange]:
    groups: dict[str, list[stats.Pair]] = {}
    for key, pair in zip(keys, pairs, strict=True):
        groups.setdefault(results[key].category, []).append(pair)
    found = {name: stats.flips(group) for name, group in groups.items()}
    p_values = {name: stats.mcnemar_exact(len(flips.worse), len(flips.better)) for name, flips in found.items()}
    adjusted = stats.holm(p_values)
    return [
        CategoryChange(
            name, len(groups[name]), len(found[name].worse), len(found[name].better), p_values[name], adjusted[name]
        )
        for name in groups
    ]


def adjust_over_arms(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Fill `p_holm` over the arms of a sampling: the more arms are compared, the likelier is a small p by chance."""
    adjusted = stats.holm({c.arm: c.p_mcnemar for c in comparisons if c.p_mcnemar is not None})
    return [c._replace(p_holm=adjusted.get(c.arm)) for c in comparisons]


def answered(results: Results) -> dict[ResultKey, CaseResult]:
    """Without the cases that the server refused: a refusal says nothing about the model."""
    return {key: result for key, result in results.items() if result.error is None}


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
    metas = [read_meta(result_a), read_meta(result_b)]
    if metas[0] is not None and metas[1] is not None and metas[0].sha256 != metas[1].sha256:
        raise UserError(
            "The two results answer different suites.",
            where=f"{result_a} and {result_b}",
            value=f"{metas[0].suite} {metas[0].sha256[:12]} and {metas[1].suite} {metas[1].sha256[:12]}",
        )
    a, b = answered(read_results(result_a).results), answered(read_results(result_b).results)
    common = [name for name in dict.fromkeys(key.sampling for key in a) if any(key.sampling == name for key in b)]
    wanted = common if sampling is None else [sampling]
    if not wanted or any(name not in common for name in wanted):
        raise UserError(
            "The two results have no sampling in common."
            if sampling is None
            else f"Not both results hold sampling {sampling!r}.",
            where=f"{result_a} and {result_b}",
            remedy=f"samplings of both: {', '.join(common)}" if common else "",
        )
    names = [next(iter(r.values())).arm for r in (a, b)]
    return [compare_arms(names[1], b, names[0], a, name, {}, margin, confidence) for name in wanted]
