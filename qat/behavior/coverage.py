"""Measures what the statistics promise: how often intervals cover the truth, looks err, and drops are found.

Exact enumeration where the outcomes can be listed, simulation elsewhere; always of the shipped functions.
`scripts/measure_statistics.py` publishes the result as docs/benchmarks/statistics.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, multinomial

from qat.behavior import paired, power, stats
from qat.behavior.sequential import Look, confidence_at

Signs = NDArray[np.int_]
"""(cases, repeats) -> +1 gained, -1 lost, 0 the same."""

CONFIDENCE = 0.95
SIZES = (20, 50, 120, 300, 1000)
RATES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99)
CASES, REPEATS = (30, 60, 120), (3, 10)
CLUSTERED_RATES, CORRELATIONS = (0.8, 0.9, 0.95, 0.98), (0.1, 0.5, 0.9)
FLOORS = (0.8, 0.9, 0.95, 0.98)
DROPS, FLIPS = (0.0, 0.03, 0.1), (0.005, 0.02, 0.05)


class Covered(NamedTuple):
    """Share of intervals that hold the truth: of the shipped one, and of one that takes every answer as independent."""

    shipped: float
    naive: float


def wilson_exact(n: int, rate: float) -> float:
    """Coverage of Wilson's interval, summed over every number of passes."""
    return float(sum(binom.pmf(k, n, rate) for k in range(n + 1) if _holds(_wilson(k, n), rate)))


def wilson_simulated(n: int, rate: float, runs: int, rng: np.random.Generator) -> float:
    """Coverage of `stats.rate` on drawn answers, one a case."""
    return float(np.mean([_holds(_wilson(int(k), n), rate) for k in rng.binomial(n, rate, runs)]))


@cache
def _wilson(passed: int, n: int) -> stats.Interval:
    found = stats.rate(_answers(passed, n), CONFIDENCE)
    assert found.low is not None and found.high is not None
    return stats.Interval(found.low, found.high)


def _answers(passed: int, n: int) -> list[stats.Outcome]:
    return [stats.Outcome(str(i), i < passed) for i in range(n)]


def _holds(interval: stats.Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def wilson_least(n: int) -> float:
    """The least coverage of Wilson's interval over all rates from 50 %: that of the rates just beyond its ends."""
    ends = [end for k in range(n + 1) for end in _wilson(k, n) if 0.5 <= end < 1]
    return min(wilson_exact(n, rate) for end in ends for rate in (end - 1e-9, end + 1e-9))


def floor_errors(n: int, floor: float) -> dict[str, float]:
    """How often the gate is wrong about a candidate whose true rate is the floor, summed over every number of passes.

    Returns:
        `passed` and `failed`: the floor is taken for reached, or for missed; `wilson_failed`: the same, were it judged
        by Wilson's interval alone.
    """
    chances = binom.pmf(np.arange(n + 1), n, floor)
    wilson = [_wilson(k, n) for k in range(n + 1)]
    exact = [stats.exact_interval(_answers(k, n), CONFIDENCE) for k in range(n + 1)]

    def share(wrong: list[bool]) -> float:
        return float(chances[np.array(wrong)].sum())

    return {
        "passed": share([min(w.low, e.low) >= floor for w, e in zip(wilson, exact, strict=True)]),
        "failed": share([max(w.high, e.high) < floor for w, e in zip(wilson, exact, strict=True)]),
        "wilson_failed": share([w.high < floor for w in wilson]),
    }


def drop_errors(n: int, max_drop: float, flips: float) -> dict[str, float]:
    """How often the gate is wrong about a candidate exactly `max_drop` worse, summed over every table of n pairs."""
    z, found = stats.quantile(CONFIDENCE), {"passed": 0.0, "failed": 0.0}
    for b, c, chance in _tables(n, flips, flips + max_drop):
        statistic = paired.tango_z(paired.PairedCounts(b, c, n), -max_drop)
        found["passed"] += chance * (statistic >= z)
        found["failed"] += chance * (statistic < -z)
    return found


def _tables(n: int, gained: float, lost: float) -> Iterator[tuple[int, int, float]]:
    """Tables of n pairs with their probabilities; those of 1e-10 in all are left out."""
    most_lost, most_gained = (int(binom.ppf(1 - 1e-10, n, share)) for share in (lost, gained))
    for b, c in product(range(most_gained + 1), range(most_lost + 1)):
        if b + c <= n:
            yield b, c, float(multinomial.pmf([b, c, n - b - c], n, [gained, lost, 1 - gained - lost]))


def tango_exact(n: int, gained: float, lost: float) -> float:
    """Coverage of Tango's interval, summed over every table of n single pairs.

    A truth lies in the interval where the score test does not reject it; tests hold that the two agree.
    """
    z, covered = stats.quantile(CONFIDENCE), 0.0
    for b, c, chance in _tables(n, gained, lost):
        covered += chance * (abs(paired.tango_z(paired.PairedCounts(b, c, n), gained - lost)) <= z)
    return covered


def clustered_rate(
    cases: int, repeats: int, rate: float, correlation: float, runs: int, rng: np.random.Generator
) -> Covered:
    """Coverage of a rate over cases whose difficulty is beta-distributed, asked several times.

    Args:
        cases: Clusters.
        repeats: Answers a case.
        rate: True pass rate.
        correlation: Between two answers of one case, in (0, 1).
        runs: Simulated suites.
        rng: Source of randomness.
    """
    strength = (1 - correlation) / correlation
    hits = np.zeros(2)
    for _ in range(runs):
        passed = rng.binomial(repeats, rng.beta(rate * strength, (1 - rate) * strength, cases))
        rows = [stats.Outcome(str(case), turn < k) for case, k in enumerate(passed) for turn in range(repeats)]
        found = stats.rate(rows, CONFIDENCE)
        assert found.rate is not None and found.low is not None and found.high is not None
        naive = stats.wilson(found.rate, found.n, CONFIDENCE)
        hits += found.low <= rate <= found.high, _holds(naive, rate)
    return Covered(*(hits / runs))


LAYOUTS = ("1 to 10 answers", "weights 1 and 3", "a tenth weighs 10")
"""Suites whose cases do not count alike: answers lost to errors, or cases of unequal weight."""


def uneven_rate(layout: str, cases: int, rate: float, runs: int, rng: np.random.Generator) -> float:
    """Coverage of a rate over cases that do not count alike; two answers of one case correlate by a half.

    Args:
        layout: One of `LAYOUTS`.
        cases: Clusters.
        rate: True pass rate.
        runs: Simulated suites.
        rng: Source of randomness.
    """
    hits = 0
    for _ in range(runs):
        asked = rng.integers(1, 11, cases) if layout == LAYOUTS[0] else np.ones(cases, int)
        weights = rng.choice([1.0, 1.0, 1.0, 3.0], cases) if layout == LAYOUTS[1] else np.ones(cases)
        if layout == LAYOUTS[2]:
            weights[: cases // 10] = 10.0
        chances = rng.beta(rate, 1 - rate, cases)
        rows = [
            stats.Outcome(str(case), bool(rng.random() < chances[case]), float(weights[case]))
            for case in range(cases)
            for _ in range(asked[case])
        ]
        found = stats.rate(rows, CONFIDENCE)
        assert found.low is not None and found.high is not None
        hits += found.low <= rate <= found.high
    return hits / runs


def nightly(cases: int, drop: float, runs: int, rng: np.random.Generator, nights: int = 30) -> dict[str, float]:
    """A model asked anew every night and judged against one stored baseline: floor 90 %, drop of 3 points.

    The reference passes 95 % of the cases; two runs of one model differ in 3.8 % of them (difficulties drawn from a
    beta distribution, correlation 0.6).

    Args:
        cases: In the suite.
        drop: By so much the nightly model is worse than the reference, in whole cases lost.
        runs: Simulated baselines, each with its nights.
        rng: Source of randomness.
        nights: Judged against each.

    Returns:
        Shares of nights by verdict; `ever_pass` and `ever_fail`: of baselines with at least one such night, and
        `ever_pass_look`: the same where night k is judged as look k.
    """
    rate, floor, max_drop = 0.95, 0.90, 0.03
    passed = np.zeros((runs, nights), bool)
    failed, looked = passed.copy(), passed.copy()
    for run in range(runs):
        chances = rng.beta(rate * 2 / 3, (1 - rate) * 2 / 3, cases)
        baseline = rng.random(cases) < chances
        tonight = rng.random((nights, cases)) < np.where(rng.random(cases) < drop / rate, 0.0, chances)
        for night, answers in enumerate(tonight):
            counts = int((answers & ~baseline).sum()), int((baseline & ~answers).sum())
            passed[run, night], failed[run, night] = _judged(int(answers.sum()), *counts, cases, floor, max_drop, None)
            looked[run, night], _ = _judged(int(answers.sum()), *counts, cases, floor, max_drop, night + 1)
    return {
        "pass": float(passed.mean()),
        "fail": float(failed.mean()),
        "ever_pass": float(passed.any(axis=1).mean()),
        "ever_fail": float(failed.any(axis=1).mean()),
        "ever_pass_look": float(looked.any(axis=1).mean()),
    }


@cache
def _judged(
    passed: int, gained: int, lost: int, cases: int, floor: float, max_drop: float, look: int | None
) -> tuple[bool, bool]:
    """Whether the gate says PASS, and whether FAIL, from the counts of one answer a case."""
    confidence = confidence_at(CONFIDENCE, None if look is None else Look(look))
    rate, answers = stats.rate(_answers(passed, cases), confidence), _answers(passed, cases)
    exact, z = stats.exact_interval(answers, confidence), stats.quantile(confidence)
    assert rate.low is not None and rate.high is not None
    drop = paired.tango_z(paired.PairedCounts(gained, lost, cases), -max_drop)
    return (
        min(rate.low, exact.low) >= floor and drop >= z,
        max(rate.high, exact.high) < floor or drop < -z,
    )


def draw_signs(cases: int, repeats: int, drop: float, flips: float, averaged: bool, rng: np.random.Generator) -> Signs:
    """Paired answers under the model of `qat.behavior.power`: whole cases lost, and flips either way."""
    turns = rng.random((cases, repeats if averaged else 1))
    noise = np.where(turns < flips, -1, np.where(turns < 2 * flips, 1, 0))
    signs = np.where(rng.random((cases, 1)) < drop, -1, noise)
    return signs if averaged else np.repeat(signs, repeats, axis=1)


def counts_of(signs: Signs) -> paired.PairedCounts:
    """The shipped counts of drawn pairs."""
    return paired.paired_counts(
        [paired.Pair(str(c), s > 0, s < 0) for c, row in enumerate(signs.tolist()) for s in row]
    )


def clustered_difference(
    cases: int, repeats: int, drop: float, flips: float, runs: int, rng: np.random.Generator
) -> dict[str, float]:
    """Coverage of a paired difference with repeats: shipped, naive, and the percentile bootstrap over cases."""
    hits = np.zeros(3)
    for _ in range(runs):
        signs = draw_signs(cases, repeats, drop, flips, True, rng)
        found = counts_of(signs)
        gained, lost, n = int((signs > 0).sum()), int((signs < 0).sum()), signs.size
        low, high = _bootstrap(signs, rng)
        hits += (
            abs(paired.tango_z(found, -drop)) <= stats.quantile(CONFIDENCE, found.df),
            abs(paired.tango_z(paired.PairedCounts(gained, lost, n), -drop)) <= stats.quantile(CONFIDENCE),
            low <= -drop <= high,
        )
    return dict(zip(("shipped", "naive", "bootstrap"), (hits / runs).tolist(), strict=True))


def _bootstrap(signs: Signs, rng: np.random.Generator, draws: int = 400) -> tuple[float, float]:
    means = signs.mean(axis=1)
    chosen = rng.multinomial(len(means), np.full(len(means), 1 / len(means)), draws)
    low, high = np.quantile(chosen @ means / len(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    # Sums of thirds and tenths must not miss an end by rounding.
    return float(low) - 1e-9, float(high) + 1e-9


def wrong_passes(looks: int, fresh: bool, runs: int, rng: np.random.Generator, cases: int = 300) -> dict[str, float]:
    """How often "not worse by more than 3 points" is claimed at any look of a candidate exactly 3 points worse.

    Args:
        looks: Looks taken; the first claim ends the asking.
        fresh: Every look asks new cases; otherwise each adds a repeat of the same cases to all answers so far.
        runs: Simulated candidates.
        rng: Source of randomness.
        cases: In the suite.
    """
    margin, flips = 0.03, 0.05
    plans = {
        "fixed": lambda look: CONFIDENCE,
        "any number": lambda look: confidence_at(CONFIDENCE, Look(look)),
        "planned": lambda look: confidence_at(CONFIDENCE, Look(look, looks)),
    }
    claimed = dict.fromkeys(plans, 0)
    for _ in range(runs):
        signs = draw_signs(cases, looks, margin, flips, True, rng)
        open_plans = set(plans)
        for look in range(1, looks + 1):
            seen = draw_signs(cases, 1, margin, flips, True, rng) if fresh else signs[:, :look]
            found = counts_of(seen)
            p = paired.tost(found, margin).p_lower
            for name in [name for name in open_plans if p <= (1 - plans[name](look)) / 2]:
                claimed[name] += 1
                open_plans.remove(name)
    return {name: count / runs for name, count in claimed.items()}


def simulated_power(
    cases: int, repeats: int, drop: float, limit: float, assumed: power.Assumptions, runs: int, rng: np.random.Generator
) -> float:
    """Share of simulated suites in which the interval lies wholly below `limit`, or above it where nothing dropped."""
    hits = 0
    for _ in range(runs):
        found = counts_of(draw_signs(cases, repeats, drop, assumed.flips, assumed.averaged, rng))
        z = paired.tango_z(found, limit) * (-1 if drop else 1)
        hits += z >= stats.quantile(CONFIDENCE, found.df)
    return hits / runs


def measure(runs: int, seed: int) -> dict[str, Any]:
    """Every table of the page.

    Args:
        runs: Simulated suites per cell; a coverage of 95 % then has a standard error of 0.22 / sqrt(runs).
        seed: Of the simulation.
    """
    rng = np.random.default_rng(seed)
    return {
        "runs": runs,
        "seed": seed,
        "confidence": CONFIDENCE,
        "wilson": [
            {"n": n, "rate": p, "exact": wilson_exact(n, p), "simulated": wilson_simulated(n, p, 10 * runs, rng)}
            for n, p in product(SIZES, RATES)
        ],
        "tango": [
            {"n": n, "gained": f, "lost": f + d, "exact": tango_exact(n, f, f + d)}
            for n, d, f in product((50, 120, 300), DROPS, FLIPS)
        ],
        "clustered_rate": [
            {"cases": c, "repeats": m, "rate": p, "correlation": r, **clustered_rate(c, m, p, r, runs, rng)._asdict()}
            for c, m, p, r in product(CASES, REPEATS, CLUSTERED_RATES, CORRELATIONS)
        ],
        "clustered_difference": [
            {"cases": c, "repeats": m, "drop": d, "flips": f, **clustered_difference(c, m, d, f, runs, rng)}
            for c, m, d, f in product(CASES, REPEATS, DROPS, FLIPS)
        ],
        "looks": [
            {"looks": looks, "fresh": fresh, **wrong_passes(looks, fresh, runs, rng)}
            for looks, fresh in product((1, 2, 5), (True, False))
        ],
        "power": list(_power_rows(runs, rng)),
        "wilson_least": [{"n": n, "least": wilson_least(n)} for n in (10, *SIZES)],
        "floor_errors": [{"n": n, "floor": p, **floor_errors(n, p)} for n, p in product((10, *SIZES), FLOORS)],
        "drop_errors": [
            {"n": n, "max_drop": d, "flips": f, **drop_errors(n, d, f)}
            for n, d, f in product((50, 120, 300), (0.03, 0.05), FLIPS)
        ],
        "uneven_rate": [
            {"layout": layout, "cases": c, "rate": p, "covered": uneven_rate(layout, c, p, runs, rng)}
            for layout, c, p in product(LAYOUTS, (10, 20, 30, 60), (0.5, 0.8, 0.9, 0.95, 0.98))
        ],
        "nightly": [
            {"cases": c, "drop": d, **nightly(c, d, max(1, runs // 4), rng)}
            for c, d in product((120, 300, 1000), (0.0, 0.03, 0.06))
        ],
    }


def _power_rows(runs: int, rng: np.random.Generator, target: float = 0.8) -> Iterator[dict[str, Any]]:
    for flips, drop, repeats in product(FLIPS, (0.03, 0.05, 0.1), (1, 3)):
        assumed = power.Assumptions(flips, "", True)
        needed = power.cases_needed(repeats, drop, drop, target, assumed, CONFIDENCE)
        assert needed.detect is not None and needed.clear is not None
        yield {
            "flips": flips,
            "drop": drop,
            "repeats": repeats,
            "target": target,
            "detect": needed.detect,
            "detected": simulated_power(needed.detect, repeats, drop, 0.0, assumed, runs, rng),
            "clear": needed.clear,
            "cleared": simulated_power(needed.clear, repeats, 0.0, -drop, assumed, runs, rng),
        }
