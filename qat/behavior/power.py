"""How many cases and repeats the gate needs, before anything is asked.

The model of a drop of d: a share d of the cases is lost as a whole (whichever seed asks), and besides that a share
`flips` of the answers flips each way without any change, as two runs of the same model do. With one answer a case,
`lost` = d + flips and `gained` = flips of the pairs; the variance of their difference is d (1 - d) + 2 flips. Repeats
average the flips out, never the lost cases; at temperature 0 they average nothing, because a flip that quantization
causes is the same each time.

Power is that of the shipped interval (`qat.behavior.paired.tango_interval`) in the normal approximation: the score
statistic is judged with the variance under the limit and moves with the variance under the truth (the two-variance
form of Connor 1987, "Sample size for testing differences in proportions for the paired-sample design", Biometrics 43).
Tests hold it to simulations of the interval itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

from qat.behavior.compare import Answers
from qat.behavior.paired import PairedCounts, tango_z
from qat.behavior.stats import MIN_CASES, PRIOR_DF, Effective, quantile

ASSUMED_FLIPS = 0.02
"""Flips each way where nothing was measured; the four-bit arms of `annie_tiny_full` showed 0.6 to 1.5 %."""
MAX_CASES = 1_000_000


class Assumptions(NamedTuple):
    """What the power rests on.

    Attributes:
        flips: Share of answers that flip each way without any change.
        source: Where that comes from, in words.
        averaged: Whether repeats average flips out (temperature above 0).
    """

    flips: float
    source: str
    averaged: bool


class Requirement(NamedTuple):
    """Cases needed at a number of repeats; None where even a million are too few.

    Attributes:
        repeats: Answers a case.
        detect: Cases to show a drop: the interval lies wholly below zero.
        clear: Cases to pass where nothing changed: the interval stays above -max_drop.
    """

    repeats: int
    detect: int | None
    clear: int | None


def flips_between(arm: Answers, reference: Answers, sampling: str) -> Assumptions | None:
    """Flips measured between two arms, half of those in either direction; None where they share no question."""
    shared = [key for key in arm.answered if key.sampling == sampling and key in reference.answered]
    if not shared:
        return None
    differing = sum(arm.answered[key].passed != reference.answered[key].passed for key in shared)
    source = f"measured: {differing} of {len(shared)} pairs of {arm.name} and {reference.name} differ"
    return Assumptions(_each_way(differing, len(shared)), source, _warm(arm, sampling))


def flips_within(arm: Answers, sampling: str) -> Assumptions | None:
    """Flips measured between the answers of one arm to the same case: other seeds, or a second pass of the same.

    Returns:
        None where no case was asked twice.
    """
    own = arm.settings.get(sampling)
    passes = {sampling} | {name for name, settings in arm.settings.items() if settings == own}
    answers: dict[str, list[bool]] = defaultdict(list)
    for key, result in arm.answered.items():
        if key.sampling in passes:
            answers[key.case].append(result.passed)
    # Of the pairs of answers to one case, those that differ.
    differing = sum(sum(found) * (len(found) - sum(found)) for found in answers.values())
    pairs = sum(math.comb(len(found), 2) for found in answers.values())
    if not pairs:
        return None
    source = f"measured: {differing} of {pairs} pairs of answers of {arm.name} to the same case differ"
    return Assumptions(_each_way(differing, pairs), source, _warm(arm, sampling))


def _each_way(differing: int, pairs: int) -> float:
    # Laplace's estimate: no flip among 120 pairs does not mean that there are none.
    return (differing + 1) / (pairs + 2) / 2


def _warm(arm: Answers, sampling: str) -> bool:
    return arm.settings.get(sampling, {}).get("temperature", 0.0) > 0


def chance_to_detect(cases: int, repeats: int, drop: float, assumed: Assumptions, confidence: float) -> float:
    """Probability that a drop is shown: the interval of the difference lies wholly below zero."""
    return _power(cases, repeats, drop, 0.0, assumed, confidence, above=False)


def chance_to_clear(cases: int, repeats: int, max_drop: float, assumed: Assumptions, confidence: float) -> float:
    """Probability that "not worse by more than `max_drop`" is proven where nothing changed."""
    return _power(cases, repeats, 0.0, -max_drop, assumed, confidence, above=True)


def _power(
    cases: int, repeats: int, drop: float, limit: float, assumed: Assumptions, confidence: float, above: bool
) -> float:
    if cases < MIN_CASES:
        return 0.0
    lost, gained = drop + assumed.flips, assumed.flips
    carried = _carried(cases, repeats, drop, assumed)
    shares = PairedCounts(gained, lost, 1.0)
    # The statistic of one pair, times the root of their number; its spread is that of the truth over that of the limit.
    shift = tango_z(shares, limit) * math.sqrt(carried.n)
    spread = math.sqrt(lost + gained - drop**2) * abs(tango_z(shares, limit) / (-drop - limit)) if drop + limit else 1.0
    z = quantile(confidence, carried.df)
    distance = shift - z if above else -shift - z
    return NormalDist().cdf(distance / spread) if spread > 0 else float(distance > 0)


def _carried(cases: int, repeats: int, drop: float, assumed: Assumptions) -> Effective:
    """What `qat.behavior.stats.effective` finds on average, from second and fourth moments of the sums of the cases."""
    if repeats == 1:
        return Effective(float(cases), math.inf)
    m, flips = repeats, 2 * assumed.flips
    second = drop * (1 - drop) * m**2 + flips * (m if assumed.averaged else m**2)
    fourth = drop * m**4 + (flips * m + 3 * m * (m - 1) * flips**2 if assumed.averaged else flips * m**4)
    if second <= 0:
        return Effective(float(cases), cases - 1 + PRIOR_DF)
    df = min(cases - 1.0, 2 * cases * second**2 / max(fourth - second**2, 1e-12))
    observed = cases * m**2 * (drop * (1 - drop) + flips) / second
    return Effective((df + PRIOR_DF) / (df / observed + PRIOR_DF / cases), df + PRIOR_DF)


def cases_needed(
    repeats: int, drop: float, max_drop: float, target: float, assumed: Assumptions, confidence: float
) -> Requirement:
    """Cases for a power of `target` at this number of repeats.

    Args:
        repeats: Answers a case.
        drop: That shall be shown, as a share.
        max_drop: Of the gate.
        target: Power, in (0, 1).
        assumed: Flips without any change.
        confidence: Of the gate, two-sided.
    """
    return Requirement(
        repeats,
        _least(lambda cases: chance_to_detect(cases, repeats, drop, assumed, confidence) >= target),
        _least(lambda cases: chance_to_clear(cases, repeats, max_drop, assumed, confidence) >= target),
    )


def detectable_drop(cases: int, repeats: int, target: float, assumed: Assumptions, confidence: float) -> float | None:
    """The smallest drop, to a tenth of a point, that so many cases show with power `target`; None: not even a half."""
    return next(
        (d / 1000 for d in range(1, 501) if chance_to_detect(cases, repeats, d / 1000, assumed, confidence) >= target),
        None,
    )


def _least(enough: Callable[[int], bool]) -> int | None:
    """The smallest whole number that is enough, by doubling and bisection; None beyond `MAX_CASES`."""
    high = MIN_CASES
    while not enough(high):
        if high >= MAX_CASES:
            return None
        high = min(2 * high, MAX_CASES)
    low = high // 2 if high > MIN_CASES else MIN_CASES - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
