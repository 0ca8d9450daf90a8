"""Pass rates with intervals.

One idea carries the clustered case (a case asked several times, or cases of unequal weight): the design effect. The
variance of the estimate is computed over cases (the clusters), compared with that of independent answers, and the
counts are scaled to the effective number of answers before a score interval is taken (Rao and Scott 1992, "A simple
method for the analysis of clustered binary data", Biometrics 48). With one answer a case and equal weights the design
effect is exactly 1 and Wilson's score interval (Wilson 1927) results.

A design effect that is read off a handful of failing cases is itself a guess, and an interval that trusts it covers
the truth in 64 to 90 of 100 suites instead of 95. It is therefore drawn towards the worst case, in which the answers of
one case are copies of each other: with `PRIOR_DF` degrees of freedom against those that the data give, counted by
Satterthwaite's rule on the sums of the cases (Satterthwaite 1946, Biometrics Bulletin 2), and Student's t of both
together takes the place of the normal quantile. docs/benchmarks/statistics.md holds the measured coverage.

Intervals are two-sided. A one-sided statement read off one end of an interval of confidence c errs with probability
(1 - c) / 2: 2.5 % at 95 %, the convention of ICH E9 for non-inferiority. Too few answers give None with a reason, never
a number that looks certain.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple

from scipy.special import betaincinv, stdtr, stdtrit

MIN_CASES = 10
"""Fewer distinct cases than this give no rate and no comparison: the 95 % interval of 9 of 9 reaches down to 70 %."""
PRIOR_DF = 8.0
"""Weight of the worst case in the design effect; with 4, intervals of the measured grids covered as little as 90 %."""


class Outcome(NamedTuple):
    """One judged answer; `case` is its cluster."""

    case: str
    passed: bool
    weight: float = 1.0


class Rate(NamedTuple):
    """A pass rate with its interval.

    Attributes:
        passed: Answers that passed.
        n: Answers.
        rate: Weighted share; None, like `low` and `high`, where `reason` says that the cases are few.
        low: Lower end of the interval.
        high: Upper end.
        reason: Why there is no rate.
        cases: Distinct cases.
        method: `wilson`, `wilson, clustered by case` (cases asked several times) or `wilson, weighted`.
    """

    passed: int
    n: int
    rate: float | None
    low: float | None
    high: float | None
    reason: str | None
    cases: int
    method: str | None


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


class Effective(NamedTuple):
    """How much clustered, weighted answers carry.

    Attributes:
        n: Number of independent answers of equal weight that would carry as much.
        df: Degrees of freedom of the quantile; infinite where nothing had to be estimated.
    """

    n: float
    df: float


def quantile(confidence: float, df: float = math.inf) -> float:
    """Student's t of a two-sided interval: 1.96 at 0.95 and infinite `df`, where it is the normal quantile."""
    return NormalDist().inv_cdf(0.5 + confidence / 2) if math.isinf(df) else float(stdtrit(df, 0.5 + confidence / 2))


def tail(z: float, df: float = math.inf) -> float:
    """Probability above `z` under the same distribution."""
    return NormalDist().cdf(-z) if math.isinf(df) else float(stdtr(df, -z))


def wilson(rate: float, n: float, confidence: float, df: float = math.inf) -> Interval:
    """Wilson's score interval of a rate out of n; n may be an effective number and need not be whole."""
    if not n > 0:
        raise ValueError("a rate needs n > 0")
    z2 = quantile(confidence, df) ** 2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At 0 and 1 the end is exact; rounding must not leave it at 1e-17.
    return Interval(0.0 if rate == 0 else max(0.0, centre - half), 1.0 if rate == 1 else min(1.0, centre + half))


def rate(outcomes: Iterable[Outcome], confidence: float) -> Rate:
    """Weighted pass rate with a Wilson interval at the effective number of answers.

    Args:
        outcomes: Answers; those of one case form a cluster.
        confidence: Two-sided, in (0, 1).
    """
    rows = list(outcomes)
    passed, n = sum(row.passed for row in rows), len(rows)
    cases = len({row.case for row in rows})
    if few := too_few(cases):
        return Rate(passed, n, None, None, None, few, cases, None)
    value, carried = _carried(rows)
    method = "wilson, clustered by case" if cases < n else "wilson" if math.isinf(carried.df) else "wilson, weighted"
    return Rate(passed, n, value, *wilson(value, carried.n, confidence, carried.df), None, cases, method)


def exact_interval(outcomes: Iterable[Outcome], confidence: float) -> Interval:
    """An interval neither end of which errs more often than (1 - confidence) / 2, however small n or extreme p.

    Wilson's keeps its confidence on average only: its upper end lies below a true 98 % in 8 of 100 suites of 50 cases.
    Clopper and Pearson 1934, Biometrika 26; clustered or weighted answers enter by their effective number, reduced by
    the squared ratio of the quantiles (Korn and Graubard 1998, Survey Methodology 24).

    Args:
        outcomes: Answers, at least one; those of one case form a cluster.
        confidence: Two-sided, in (0, 1).
    """
    value, (n, df) = _carried(list(outcomes))
    n *= (quantile(confidence) / quantile(confidence, df)) ** 2
    passed, alpha = value * n, 1 - confidence
    return Interval(
        0.0 if value == 0 else float(betaincinv(passed, n - passed + 1, alpha / 2)),
        1.0 if value == 1 else float(betaincinv(passed + 1, n - passed, 1 - alpha / 2)),
    )


def _carried(rows: Sequence[Outcome]) -> tuple[float, Effective]:
    """The weighted rate, and what the answers carry."""
    value = weighted_mean([(row.weight, float(row.passed)) for row in rows])
    return value, effective([(row.case, row.weight, float(row.passed)) for row in rows], value, value * (1 - value))


def too_few(cases: int) -> str | None:
    """The reason why so few cases give no number, or None."""
    if cases >= MIN_CASES:
        return None
    return f"too few: {cases} case{'s' * (cases != 1)}, at least {MIN_CASES} are needed"


def weighted_mean(rows: Sequence[tuple[float, float]]) -> float:
    """Mean of (weight, value); fsum keeps 120 of 120 at exactly 1.0 whatever the weights."""
    return math.fsum(w * y for w, y in rows) / math.fsum(w for w, _ in rows)


def effective(rows: Sequence[tuple[str, float, float]], mean: float, variance: float) -> Effective:
    """Number of independent answers that carry as much as these clustered, weighted ones.

    Args:
        rows: (case, weight, value).
        mean: Their weighted mean.
        variance: Of one value, were all independent: p (1 - p) for a rate.

    Returns:
        All rows at infinite degrees of freedom for one answer a case of equal weight. Otherwise at most Kish's
        effective number of rows, which unequal weights leave even where all are independent; where nothing varies, that
        of cases, because nothing in the data says that the answers of one case are not copies of each other.
    """
    residual: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    for case, weight, value in rows:
        residual[case] += weight * (value - mean)
        weights[case] += weight
    if len(weights) == len(rows) and max(weights.values()) == min(weights.values()):
        return Effective(float(len(rows)), math.inf)
    clusters = len(weights)
    total = math.fsum(weights.values())
    copies = total**2 / math.fsum(weight**2 for weight in weights.values())
    squares = math.fsum(value**2 for value in residual.values())
    if variance <= 0:
        return Effective(copies, clusters - 1 + PRIOR_DF)
    between = squares / total**2 * clusters / (clusters - 1)
    most = total**2 / math.fsum(weight**2 for _, weight, _ in rows)
    observed = min(most, variance / between) if between > 0 else most
    spread = math.fsum(value**4 for value in residual.values()) - squares**2 / clusters
    df = min(clusters - 1.0, 2 * squares**2 / spread) if spread > 0 else clusters - 1.0
    return Effective((df + PRIOR_DF) / (df / observed + PRIOR_DF / copies), df + PRIOR_DF)
