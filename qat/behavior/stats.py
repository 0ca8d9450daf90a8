"""Rates with intervals, and paired comparisons of two arms on the same cases.

Everything is a closed form over counts; only the standard library is needed. One idea carries the clustered case (a
case asked with several seeds, or cases of unequal weight): the design effect. The variance of the estimate is computed
over cases (the clusters), compared with that of independent answers, and the counts are scaled to the effective number
of answers before a score interval is taken (Rao and Scott 1992, "A simple method for the analysis of clustered binary
data", Biometrics 48). With one answer a case and equal weights the design effect is exactly 1 and the plain intervals
result:

- one rate: Wilson's score interval (Wilson 1927);
- a paired difference: Tango's score interval and test (Tango 1998, "Equivalence test and confidence interval for the
  difference in proportions for the paired-sample design", Statistics in Medicine 17), which stays honest where no or
  few pairs differ, unlike Wald's.

Intervals are two-sided. A one-sided statement read off one end of an interval of confidence c errs with probability
(1 - c) / 2: 2.5 % at 95 %, the convention of ICH E9 for non-inferiority. Too few answers give None with a reason, never
a number that looks certain.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

MIN_CASES = 10
"""Fewer distinct cases than this give no rate and no comparison: the 95 % interval of 9 of 9 reaches down to 70 %."""


class Outcome(NamedTuple):
    """One judged answer; `case` is its cluster."""

    case: str
    passed: bool
    weight: float = 1.0


class Rate(NamedTuple):
    """A pass rate with its interval; `rate`, `low` and `high` are None where `reason` says that the cases are few."""

    passed: int
    n: int
    rate: float | None
    low: float | None
    high: float | None
    reason: str | None = None


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


def normal_quantile(confidence: float) -> float:
    """Z of a two-sided interval: 1.96 at 0.95."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(rate: float, n: float, confidence: float) -> Interval:
    """Wilson's score interval of a rate out of n; n may be an effective number and need not be whole."""
    if not n > 0:
        raise ValueError("a rate needs n > 0")
    z2 = normal_quantile(confidence) ** 2
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
    if cases < MIN_CASES:
        return Rate(
            passed, n, None, None, None, f"too few: {cases} case{'s' * (cases != 1)}, at least {MIN_CASES} are needed"
        )
    value = _weighted_mean([(row.weight, float(row.passed)) for row in rows])
    effective = _effective_n([(row.case, row.weight, float(row.passed)) for row in rows], value, value * (1 - value))
    return Rate(passed, n, value, *wilson(value, effective, confidence))


def _weighted_mean(rows: Sequence[tuple[float, float]]) -> float:
    # fsum keeps 120 of 120 at exactly 1.0 whatever the weights.
    return math.fsum(w * y for w, y in rows) / math.fsum(w for w, _ in rows)


def _effective_n(rows: Sequence[tuple[str, float, float]], mean: float, variance: float) -> float:
    """Number of independent answers that carry as much as these clustered, weighted ones.

    Args:
        rows: (case, weight, value).
        mean: Their weighted mean.
        variance: Of one value, were all independent: p (1 - p) for a rate.

    Returns:
        At most the number of rows. Where nothing varies, Kish's effective number of clusters: the answers of one case
        may then be copies of each other, and nothing in the data says that they are not.
    """
    total = math.fsum(weight for _, weight, _ in rows)
    residual: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    for case, weight, value in rows:
        residual[case] += weight * (value - mean)
        weights[case] += weight
    if len(weights) == len(rows) and max(weights.values()) == min(weights.values()):
        return float(len(rows))
    clusters = len(weights)
    if variance <= 0:
        return total**2 / math.fsum(weight**2 for weight in weights.values())
    between = math.fsum(value**2 for value in residual.values()) / total**2 * clusters / (clusters - 1)
    return min(float(len(rows)), variance / between) if between > 0 else float(len(rows))


class PairedCounts(NamedTuple):
    """Discordant pairs out of `n`, in effective numbers, which need not be whole.

    Attributes:
        gained: Only the arm passed.
        lost: Only the reference passed.
        n: All pairs.
    """

    gained: float
    lost: float
    n: float

    @property
    def difference(self) -> float:
        """Rate of the arm minus rate of the reference."""
        return (self.gained - self.lost) / self.n


class Pair(NamedTuple):
    """The same question (case, sampling, seed) answered by both arms."""

    case: str
    arm: bool
    reference: bool
    weight: float = 1.0


def paired_counts(pairs: Sequence[Pair]) -> PairedCounts:
    """Weighted discordant shares, scaled to the effective number of pairs."""
    gained = _weighted_mean([(p.weight, float(p.arm and not p.reference)) for p in pairs])
    lost = _weighted_mean([(p.weight, float(p.reference and not p.arm)) for p in pairs])
    mean = gained - lost
    n = _effective_n(
        [(p.case, p.weight, float(p.arm) - float(p.reference)) for p in pairs], mean, gained + lost - mean**2
    )
    return PairedCounts(gained * n, lost * n, n)


def tango_z(counts: PairedCounts, delta: float) -> float:
    """Tango's score statistic for "the difference is delta"; positive where the observed difference lies above.

    The variance is taken at the maximum-likelihood value of the `lost` share under the constraint (his equations 5 to
    8).
    """
    gained, lost, n = counts
    if abs(delta) >= 1:
        # At the ends of the range the constrained variance vanishes: only an observation there agrees with them.
        return 0.0 if math.isclose(counts.difference, delta) else math.copysign(math.inf, counts.difference - delta)
    a = 2 * n
    b = -gained - lost + (2 * n - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * share + delta * (1 - delta))
    distance = gained - lost - n * delta
    if variance <= 0:
        return 0.0 if abs(distance) < 1e-12 * n else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def tango_interval(counts: PairedCounts, confidence: float) -> Interval:
    """All differences that Tango's score test does not reject, by bisection (the statistic falls with delta)."""
    z = normal_quantile(confidence)

    def crossing(target: float, low: float, high: float) -> float:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if tango_z(counts, middle) > target else (low, middle)
        return (low + high) / 2

    estimate = counts.difference
    return Interval(crossing(z, -1.0, estimate), crossing(-z, estimate, 1.0))


class Tost(NamedTuple):
    """Two one-sided score tests: `p_lower` against "worse than -margin", `p_upper` against "better than +margin"."""

    p_lower: float
    p_upper: float

    @property
    def p(self) -> float:
        """The p-value of equivalence within the margin."""
        return max(self.p_lower, self.p_upper)


def tost(counts: PairedCounts, margin: float) -> Tost:
    """Equivalence within +-margin by two one-sided Tango tests.

    Consistent with `tango_interval`: the interval of confidence c lies inside the margin where p < (1 - c) / 2.
    """
    normal = NormalDist()
    return Tost(1 - normal.cdf(tango_z(counts, -margin)), normal.cdf(tango_z(counts, margin)))


class Flips(NamedTuple):
    """Ids of the cases on which the arms differ, sorted; with several seeds, by the sign of the net difference."""

    worse: list[str]
    better: list[str]


def flips(pairs: Iterable[Pair]) -> Flips:
    """Cases that the arm lost and won against the reference."""
    net: dict[str, int] = defaultdict(int)
    for pair in pairs:
        net[pair.case] += int(pair.arm) - int(pair.reference)
    return Flips(
        sorted(case for case, sign in net.items() if sign < 0), sorted(case for case, sign in net.items() if sign > 0)
    )


def mcnemar_exact(worse: int, better: int) -> float:
    """Two-sided exact McNemar test: a sign test on the discordant cases; 1.0 where there are none.

    With several seeds the case is the unit (its net sign), because answers of one case are not independent.
    """
    n = worse + better
    tail = sum(math.comb(n, k) for k in range(min(worse, better) + 1))
    # A quotient of whole numbers is exact to the last bit, also where 2**n overflows a float.
    p: float = 2 * tail / 2**n
    return min(1.0, p)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment over a family of tests (Holm 1979); same keys, adjusted p-values."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
