"""Two arms on the same questions: the difference with its interval, tests, and which cases flipped.

The difference of two paired rates takes Tango's score interval and test (Tango 1998, "Equivalence test and confidence
interval for the difference in proportions for the paired-sample design", Statistics in Medicine 17), which stays honest
where no or few pairs differ: Wald's interval and the bootstrap both shrink to a point there. Repeated answers of one
case and weights enter through the effective number of pairs (`qat.behavior.stats`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from qat.behavior.stats import Interval, effective, quantile, tail, weighted_mean


class Pair(NamedTuple):
    """The same question (case, sampling, seed) answered by both arms."""

    case: str
    arm: bool
    reference: bool
    weight: float = 1.0


class PairedCounts(NamedTuple):
    """Discordant pairs out of `n`, in effective numbers, which need not be whole.

    Attributes:
        gained: Only the arm passed.
        lost: Only the reference passed.
        n: All pairs.
        df: Degrees of freedom of quantiles and p-values.
    """

    gained: float
    lost: float
    n: float
    df: float = math.inf

    @property
    def difference(self) -> float:
        """Rate of the arm minus rate of the reference."""
        return (self.gained - self.lost) / self.n


def paired_counts(pairs: Sequence[Pair]) -> PairedCounts:
    """Weighted discordant shares, scaled to the effective number of pairs."""
    gained = weighted_mean([(p.weight, float(p.arm and not p.reference)) for p in pairs])
    lost = weighted_mean([(p.weight, float(p.reference and not p.arm)) for p in pairs])
    mean = gained - lost
    n, df = effective(
        [(p.case, p.weight, float(p.arm) - float(p.reference)) for p in pairs], mean, gained + lost - mean**2
    )
    return PairedCounts(gained * n, lost * n, n, df)


def tango_z(counts: PairedCounts, delta: float) -> float:
    """Tango's score statistic for "the difference is delta"; positive where the observed difference lies above.

    The variance is taken at the maximum-likelihood value of the `lost` share under the constraint (his equations 5 to
    8).
    """
    gained, lost, n, _ = counts
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
    z = quantile(confidence, counts.df)

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
    return Tost(tail(tango_z(counts, -margin), counts.df), tail(-tango_z(counts, margin), counts.df))


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
    tail_count = sum(math.comb(n, k) for k in range(min(worse, better) + 1))
    # A quotient of whole numbers is exact to the last bit, also where 2**n overflows a float.
    p: float = 2 * tail_count / 2**n
    return min(1.0, p)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment over a family of tests (Holm 1979); same keys, adjusted p-values."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def method(pairs: Sequence[Pair]) -> str:
    """Which interval `tango_interval` of these pairs is, in words."""
    if len({pair.case for pair in pairs}) < len(pairs):
        return "tango, clustered by case"
    return "tango" if len({pair.weight for pair in pairs}) == 1 else "tango, weighted"
