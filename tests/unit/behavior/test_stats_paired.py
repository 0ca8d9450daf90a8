"""Paired comparison against scipy, statsmodels, direct maximisation, enumeration and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest, multinomial, norm, t
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from qat.behavior import paired
from qat.behavior.paired import Pair, PairedCounts
from tests.unit.behavior.test_stats import slow_effective


def _tango_by_maximisation(counts: PairedCounts, delta: float) -> float:
    """Oracle: the score statistic with the `lost` share found by maximising the trinomial likelihood numerically."""
    b, c, n, _ = counts

    def minus_likelihood(q: float) -> float:
        terms = [(c, q), (b, q + delta), (n - b - c, 1 - 2 * q - delta)]
        return -sum(k * math.log(p) if k else 0.0 for k, p in terms if k or p > 0)

    low, high = max(0.0, -delta), (1 - delta) / 2
    best = minimize_scalar(
        minus_likelihood, bounds=(low + 1e-13, high - 1e-13), method="bounded", options={"xatol": 1e-13}
    )
    q = float(best.x)
    return (b - c - n * delta) / math.sqrt(n * (2 * q + delta * (1 - delta)))


@pytest.mark.parametrize("counts", [(12, 2, 44), (3, 9, 120), (1, 1, 50), (0, 6, 80), (20, 25, 1000), (7.3, 2.9, 61.7)])
@pytest.mark.parametrize("delta", [-0.2, -0.03, 0.0, 0.05, 0.3])
def test_tango_statistic_by_direct_maximisation(counts: tuple[float, float, float], delta: float) -> None:
    found = paired.tango_z(PairedCounts(*counts), delta)
    assert found == pytest.approx(_tango_by_maximisation(PairedCounts(*counts), delta), abs=2e-4)


@pytest.mark.parametrize("counts", [(12, 2, 44), (3, 9, 120), (20, 25, 1000), (1, 4, 30)])
def test_tango_interval_ends_where_the_oracle_statistic_is_z(counts: tuple[float, float, float]) -> None:
    table = PairedCounts(*counts)
    low, high = paired.tango_interval(table, 0.95)
    z = norm.ppf(0.975)
    assert low == pytest.approx(
        brentq(lambda d: _tango_by_maximisation(table, d) - z, -0.9, table.difference), abs=1e-5
    )
    assert high == pytest.approx(
        brentq(lambda d: _tango_by_maximisation(table, d) + z, table.difference, 0.9), abs=1e-5
    )


def test_tango_without_any_difference_is_not_certain() -> None:
    """By hand: with b = c = 0 the statistic is -n d / sqrt(n |d| (1 - |d|)), so the ends are +-z^2 / (n + z^2)."""
    low, high = paired.tango_interval(PairedCounts(0, 0, 1000), 0.95)
    z2 = norm.ppf(0.975) ** 2
    assert (low, high) == (pytest.approx(-z2 / (1000 + z2)), pytest.approx(z2 / (1000 + z2)))


def test_tango_at_zero_is_mcnemar_without_correction() -> None:
    assert paired.tango_z(PairedCounts(14, 5, 200), 0.0) == pytest.approx((14 - 5) / math.sqrt(14 + 5))


@pytest.mark.parametrize("counts", [(100, 0, 100), (0, 100, 100)])
def test_tango_interval_reaches_the_ends(counts: tuple[float, float, float]) -> None:
    low, high = paired.tango_interval(PairedCounts(*counts), 0.95)
    assert -1 <= low < high <= 1
    assert max(abs(low), abs(high)) == pytest.approx(1.0)


@pytest.mark.parametrize("counts", [(0, 0, 1000), (3, 5, 1000), (20, 25, 1000), (9, 4, 300), (0, 0, 120), (2, 4, 500)])
def test_tost_and_interval_say_the_same(counts: tuple[float, float, float]) -> None:
    table = PairedCounts(*counts)
    low, high = paired.tango_interval(table, 0.95)
    assert (paired.tost(table, 0.03).p < 0.025) == (low > -0.03 and high < 0.03)


@pytest.mark.parametrize("lost_share", [0.035, 0.05, 0.1])
def test_tost_errs_as_rarely_as_it_says(lost_share: float) -> None:
    """Enumeration of all tables of 150 pairs: at a true difference of -margin "not worse" is claimed in 2.5 %."""
    n, margin = 150, 0.03
    shares = [lost_share - margin, lost_share, 1 - 2 * lost_share + margin]
    wrong = 0.0
    for gained in range(30):
        for lost in range(45):
            if paired.tost(PairedCounts(gained, lost, n), margin).p_lower < 0.025:
                wrong += float(multinomial.pmf([gained, lost, n - gained - lost], n, shares))
    assert 0.005 < wrong < 0.034


def test_paired_counts_of_single_pairs_are_the_counts() -> None:
    pairs = [Pair(str(i), i % 10 != 0, i % 7 != 0) for i in range(140)]
    gained = sum(p.arm and not p.reference for p in pairs)
    lost = sum(p.reference and not p.arm for p in pairs)
    assert paired.paired_counts(pairs)[:3] == pytest.approx((gained, lost, 140))
    assert math.isinf(paired.paired_counts(pairs).df)


def some_pairs(seed: int) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [
        Pair(str(c), bool(rng.random() < a), bool(rng.random() < 0.9))
        for c in range(50)
        for a in [rng.beta(3, 1)]
        for _ in range(4)
    ]


def test_clustered_pairs_carry_what_the_slow_rule_says() -> None:
    pairs = some_pairs(9)
    values = [float(p.arm) - float(p.reference) for p in pairs]
    gained, lost, n, df = paired.paired_counts(pairs)
    assert (n, df) == pytest.approx(slow_effective([p.case for p in pairs], [1.0] * len(pairs), values))
    assert gained / n == pytest.approx(np.mean([v > 0 for v in values]))
    assert lost / n == pytest.approx(np.mean([v < 0 for v in values]))
    assert paired.method(pairs) == "tango, clustered by case"


def test_clustered_interval_and_tost_use_students_t() -> None:
    """The interval ends where the score statistic is Student's quantile, and TOST takes its tail."""
    counts = paired.paired_counts(some_pairs(4))
    low, high = paired.tango_interval(counts, 0.95)
    q = t.ppf(0.975, counts.df)
    assert q > norm.ppf(0.975) + 0.01
    assert (paired.tango_z(counts, low), paired.tango_z(counts, high)) == (pytest.approx(q), pytest.approx(-q))
    assert paired.tost(counts, 0.3).p_lower == pytest.approx(t.sf(paired.tango_z(counts, -0.3), counts.df))


def test_clustered_interval_is_near_the_bootstrap_over_cases() -> None:
    """With many cases and many flips all methods agree: width and place of the percentile bootstrap."""
    rng = np.random.default_rng(8)
    signs = rng.choice([-1, 0, 0, 1], size=(400, 3)) * (rng.random((400, 1)) < 0.5)
    pairs = [Pair(str(c), s > 0, s < 0) for c, row in enumerate(signs.tolist()) for s in row]
    low, high = paired.tango_interval(paired.paired_counts(pairs), 0.95)
    means = signs.mean(axis=1)
    drawn = rng.choice(means, size=(4000, 400)).mean(axis=1)
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.006)


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (1, 0), (5, 5), (3, 12), (40, 22), (0, 9), (700, 640)])
def test_mcnemar_against_statsmodels(worse: int, better: int) -> None:
    assert paired.mcnemar_exact(worse, better) == pytest.approx(mcnemar([[50, worse], [better, 50]], exact=True).pvalue)
    if worse + better:
        assert paired.mcnemar_exact(worse, better) == pytest.approx(binomtest(worse, worse + better).pvalue)


def test_mcnemar_of_very_many_pairs_does_not_overflow() -> None:
    assert 0 < paired.mcnemar_exact(2400, 2600) < 0.01


def test_flips_with_seeds_take_the_net_sign() -> None:
    pairs = [
        Pair("b", False, True), Pair("b", False, True), Pair("b", True, False),
        Pair("a", True, False), Pair("tie", True, False), Pair("tie", False, True), Pair("same", True, True),
    ]  # fmt: skip
    assert paired.flips(pairs) == (["b"], ["a"])


@pytest.mark.parametrize("p_values", [[0.01, 0.04, 0.03, 0.005], [0.5, 0.9], [0.02], [0.001, 0.001, 1.0]])
def test_holm_against_statsmodels(p_values: list[float]) -> None:
    named = {str(i): p for i, p in enumerate(p_values)}
    assert list(paired.holm(named).values()) == pytest.approx(list(multipletests(p_values, method="holm")[1]))


def test_holm_of_nothing() -> None:
    assert paired.holm({}) == {}
