"""Rates against statsmodels, a slow definition of the design effect, and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, norm, t
from statsmodels.regression.linear_model import WLS
from statsmodels.stats.proportion import proportion_confint

from qat.behavior import stats
from qat.behavior.stats import Outcome


def outcomes(passed: int, n: int) -> list[Outcome]:
    return [Outcome(f"c{i}", i < passed) for i in range(n)]


@pytest.mark.parametrize(("passed", "n"), [(0, 10), (10, 10), (1, 17), (97, 120), (120, 120), (954, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_one_answer_a_case_gives_wilson(passed: int, n: int, confidence: float) -> None:
    rate = stats.rate(outcomes(passed, n), confidence)
    low, high = proportion_confint(passed, n, alpha=1 - confidence, method="wilson")
    assert (rate.passed, rate.n, rate.rate) == (passed, n, pytest.approx(passed / n))
    assert (rate.low, rate.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


@pytest.mark.parametrize("rows", [[], outcomes(9, 9), [Outcome(f"c{i % 9}", True) for i in range(900)]])
def test_too_few_cases_give_no_rate(rows: list[Outcome]) -> None:
    rate = stats.rate(rows, 0.95)
    assert (rate.rate, rate.low, rate.high) == (None, None, None)
    assert rate.n == len(rows)
    assert "too few" in (rate.reason or "")


def robust_variance(cases: list[str], weights: list[float], values: list[float]) -> float:
    """Oracle: cluster-robust variance of the weighted mean from statsmodels (G / (G - 1) correction)."""
    codes = np.unique(cases, return_inverse=True)[1]
    fit = WLS(np.array(values), np.ones(len(values)), weights=np.array(weights)).fit(
        cov_type="cluster", cov_kwds={"groups": codes, "use_correction": True}
    )
    return float(fit.cov_params()[0, 0])


def slow_effective(cases: list[str], weights: list[float], values: list[float]) -> tuple[float, float]:
    """Oracle: effective number and degrees of freedom, from the documented rule and `robust_variance`."""
    w, y = np.array(weights), np.array(values)
    names = sorted(set(cases))
    member = np.array([[case == name for case in cases] for name in names])
    sums = member @ (w * (y - np.average(y, weights=w)))
    # Satterthwaite: a variance estimate V has 2 E(V)^2 / Var(V) degrees of freedom.
    df = min(len(names) - 1, 2 * np.mean(sums**2) ** 2 / (np.var(sums**2) / len(names)))
    spread = np.average(y**2, weights=w) - np.average(y, weights=w) ** 2
    # Kish: unequal weights alone leave so many answers of equal weight.
    observed = min(w.sum() ** 2 / (w**2).sum(), spread / robust_variance(cases, weights, values))
    copies = w.sum() ** 2 / ((member @ w) ** 2).sum()
    return float((df + 8) / (df / observed + 8 / copies)), float(df + 8)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("repeats", [1, 4])
def test_clustered_and_weighted_rate(weighted: bool, repeats: int) -> None:
    rng = np.random.default_rng(3)
    rows = []
    for case in range(60):
        share, weight = rng.beta(4, 1), float(rng.integers(1, 4)) if weighted else 1.0
        rows += [Outcome(f"c{case}", bool(rng.random() < share), weight) for _ in range(repeats)]
    found = stats.rate(rows, 0.95)
    if repeats == 1 and not weighted:
        assert (found.method, found.cases) == ("wilson", 60)
        return
    mean = np.average([r.passed for r in rows], weights=[r.weight for r in rows])
    n, df = slow_effective([r.case for r in rows], [r.weight for r in rows], [float(r.passed) for r in rows])
    assert n < len(rows)
    # statsmodels knows the normal quantile only: the level whose normal quantile is Student's.
    level = 2 * norm.sf(t.ppf(0.975, df))
    low, high = proportion_confint(mean * n, n, alpha=level, method="wilson")
    assert found.rate == pytest.approx(mean)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    assert found.method == ("wilson, clustered by case" if repeats > 1 else "wilson, weighted")


def test_heavy_cases_that_agree_by_chance_do_not_hide_their_weight() -> None:
    """Two of twenty cases carry 20 of 38 parts: by Kish, no more than 38^2 / 218 = 6.6 answers, however they fall."""
    weights = [10.0, 10.0, *[1.0] * 18]
    rows = [Outcome(f"c{i}", i < 2 or i % 2 == 0, weight) for i, weight in enumerate(weights)]
    mean = (20 + 9) / 38
    found = stats.effective([(r.case, r.weight, float(r.passed)) for r in rows], mean, mean * (1 - mean))
    assert found.n == pytest.approx(38**2 / 218)
    rate = stats.rate(rows, 0.95)
    assert rate.low is not None and rate.low < 0.5


@pytest.mark.parametrize(("passed", "n"), [(0, 10), (10, 10), (1, 17), (97, 120), (49, 50)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_exact_interval_against_statsmodels(passed: int, n: int, confidence: float) -> None:
    expected = proportion_confint(passed, n, alpha=1 - confidence, method="beta")
    assert stats.exact_interval(outcomes(passed, n), confidence) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("n", "floor"), [(10, 0.9), (20, 0.95), (50, 0.98), (15, 0.6)])
def test_neither_end_of_the_exact_interval_errs_more_than_promised(n: int, floor: float) -> None:
    """Enumerated at a true rate of the floor; Wilson's upper end errs in up to 8 of 100 of these suites."""
    ends = [stats.exact_interval(outcomes(k, n), 0.95) for k in range(n + 1)]
    chances = binom.pmf(range(n + 1), n, floor)
    assert sum(p for p, end in zip(chances, ends, strict=True) if end.low > floor) <= 0.025
    assert sum(p for p, end in zip(chances, ends, strict=True) if end.high < floor) <= 0.025


def test_exact_interval_of_copies_is_that_of_the_cases_at_students_t() -> None:
    """Korn and Graubard by hand: 40 cases, all passed three times, carry 40 (z / t)^2 at 39 + 8 degrees of freedom."""
    n = 40 * (norm.ppf(0.975) / t.ppf(0.975, 47)) ** 2
    assert stats.exact_interval(outcomes(40, 40) * 3, 0.95) == pytest.approx((0.025 ** (1 / n), 1.0))


def test_copies_of_an_answer_add_nothing() -> None:
    """Five seeds that always agree carry what one carries; the unknown design effect costs a few percent of width."""
    once = [Outcome(f"c{i}", i % 5 > 0) for i in range(100)]
    five = stats.rate(once * 5, 0.95)
    one = stats.rate(once, 0.95)
    assert one.low is not None and five.low is not None and one.high is not None and five.high is not None
    assert five.high - five.low == pytest.approx(one.high - one.low, rel=0.03)
    assert five.high - five.low > one.high - one.low


def test_where_nothing_varies_a_case_counts_once() -> None:
    """By hand: 100 of 100 gives 1 / (1 + q^2 / 100), with Student's q at 99 + 8 degrees of freedom."""
    all_pass = [Outcome(f"c{i}", True) for i in range(100)]
    assert stats.rate(all_pass * 5, 0.95).low == pytest.approx(1 / (1 + t.ppf(0.975, 107) ** 2 / 100))
    assert stats.rate(all_pass, 0.95).low == pytest.approx(1 / (1 + norm.ppf(0.975) ** 2 / 100))


def test_seeds_that_balance_in_every_case_are_no_harm() -> None:
    """One of two seeds fails in each case: no case differs from another, so the answers count almost singly."""
    rows = [Outcome(f"c{i}", seed == 0) for i in range(100) for seed in (0, 1)]
    assert stats.effective([(r.case, 1.0, float(r.passed)) for r in rows], 0.5, 0.25) == pytest.approx(
        (107 / (99 / 200 + 8 / 100), 107)
    )


@pytest.mark.parametrize("df", [3.0, 12.5, 400.0, float("inf")])
def test_quantile_and_tail_against_scipy(df: float) -> None:
    assert stats.quantile(0.9, df) == pytest.approx(t.ppf(0.95, df))
    assert stats.tail(1.3, df) == pytest.approx(t.sf(1.3, df))
    assert (stats.tail(float("inf"), df), stats.tail(float("-inf"), df)) == (0.0, 1.0)
