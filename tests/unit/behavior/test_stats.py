"""Statistics against scipy, statsmodels, direct maximisation, enumeration and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest, multinomial, norm
from statsmodels.regression.linear_model import WLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from qat.behavior import stats
from qat.behavior.stats import Outcome, Pair, PairedCounts


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


def _robust_variance(cases: list[str], weights: list[float], values: list[float]) -> float:
    """Oracle: cluster-robust variance of the weighted mean from statsmodels (G / (G - 1) correction)."""
    codes = np.unique(cases, return_inverse=True)[1]
    fit = WLS(np.array(values), np.ones(len(values)), weights=np.array(weights)).fit(
        cov_type="cluster", cov_kwds={"groups": codes, "use_correction": True}
    )
    return float(fit.cov_params()[0, 0])


@pytest.mark.parametrize("weighted", [False, True])
def test_clustered_rate_uses_the_cluster_robust_variance(weighted: bool) -> None:
    rng = np.random.default_rng(3)
    rows = []
    for case in range(60):
        share, weight = rng.beta(4, 1), float(rng.integers(1, 4)) if weighted else 1.0
        rows += [Outcome(f"c{case}", bool(rng.random() < share), weight) for _ in range(4)]
    found = stats.rate(rows, 0.95)
    mean = np.average([r.passed for r in rows], weights=[r.weight for r in rows])
    variance = _robust_variance([r.case for r in rows], [r.weight for r in rows], [float(r.passed) for r in rows])
    effective = mean * (1 - mean) / variance
    assert effective < len(rows)
    low, high = proportion_confint(mean * effective, effective, method="wilson")
    assert found.rate == pytest.approx(mean)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))


def test_copies_of_an_answer_add_nothing() -> None:
    """Five seeds that always agree carry what one carries (up to the small-sample factor G / (G - 1))."""
    once = [Outcome(f"c{i}", i % 5 > 0) for i in range(100)]
    five = stats.rate(once * 5, 0.95)
    one = stats.rate(once, 0.95)
    assert one.low is not None and five.low is not None and one.high is not None and five.high is not None
    assert five.high - five.low == pytest.approx(one.high - one.low, rel=0.02)
    all_pass = [Outcome(f"c{i}", True) for i in range(100)]
    assert stats.rate(all_pass * 5, 0.95).low == pytest.approx(stats.rate(all_pass, 0.95).low)


def test_clustered_rate_covers_the_truth() -> None:
    """Simulation: cases differ in difficulty, three seeds each; 95 % intervals hold the truth 95 times in 100."""
    rng = np.random.default_rng(11)
    hits, naive_hits, runs = 0, 0, 600
    truth = 4 / 5
    for _ in range(runs):
        difficulty = rng.beta(1.2, 0.3, size=80)
        rows = [Outcome(str(c), bool(x)) for c, p in enumerate(difficulty) for x in rng.random(3) < p]
        rate = stats.rate(rows, 0.95)
        assert rate.low is not None and rate.high is not None
        hits += rate.low <= truth <= rate.high
        naive = stats.wilson(rate.passed / rate.n, rate.n, 0.95)
        naive_hits += naive.low <= truth <= naive.high
    assert 0.93 <= hits / runs <= 0.975
    assert naive_hits / runs < 0.90  # what pretending that seeds are independent would claim as 95 %


def _tango_by_maximisation(counts: PairedCounts, delta: float) -> float:
    """Oracle: the score statistic with the `lost` share found by maximising the trinomial likelihood numerically."""
    b, c, n = counts

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
    found = stats.tango_z(PairedCounts(*counts), delta)
    assert found == pytest.approx(_tango_by_maximisation(PairedCounts(*counts), delta), abs=2e-4)


@pytest.mark.parametrize("counts", [(12, 2, 44), (3, 9, 120), (20, 25, 1000), (1, 4, 30)])
def test_tango_interval_ends_where_the_oracle_statistic_is_z(counts: tuple[float, float, float]) -> None:
    paired = PairedCounts(*counts)
    low, high = stats.tango_interval(paired, 0.95)
    z = norm.ppf(0.975)
    assert low == pytest.approx(
        brentq(lambda d: _tango_by_maximisation(paired, d) - z, -0.9, paired.difference), abs=1e-5
    )
    assert high == pytest.approx(
        brentq(lambda d: _tango_by_maximisation(paired, d) + z, paired.difference, 0.9), abs=1e-5
    )


def test_tango_without_any_difference_is_not_certain() -> None:
    """By hand: with b = c = 0 the statistic is -n d / sqrt(n |d| (1 - |d|)), so the ends are +-z^2 / (n + z^2)."""
    low, high = stats.tango_interval(PairedCounts(0, 0, 1000), 0.95)
    z2 = norm.ppf(0.975) ** 2
    assert (low, high) == (pytest.approx(-z2 / (1000 + z2)), pytest.approx(z2 / (1000 + z2)))


def test_tango_at_zero_is_mcnemar_without_correction() -> None:
    assert stats.tango_z(PairedCounts(14, 5, 200), 0.0) == pytest.approx((14 - 5) / math.sqrt(14 + 5))


@pytest.mark.parametrize("counts", [(100, 0, 100), (0, 100, 100)])
def test_tango_interval_reaches_the_ends(counts: tuple[float, float, float]) -> None:
    low, high = stats.tango_interval(PairedCounts(*counts), 0.95)
    assert -1 <= low < high <= 1
    assert max(abs(low), abs(high)) == pytest.approx(1.0)


@pytest.mark.parametrize("counts", [(0, 0, 1000), (3, 5, 1000), (20, 25, 1000), (9, 4, 300), (0, 0, 120), (2, 4, 500)])
def test_tost_and_interval_say_the_same(counts: tuple[float, float, float]) -> None:
    paired = PairedCounts(*counts)
    low, high = stats.tango_interval(paired, 0.95)
    assert (stats.tost(paired, 0.03).p < 0.025) == (low > -0.03 and high < 0.03)


@pytest.mark.parametrize("lost_share", [0.035, 0.05, 0.1])
def test_tost_errs_as_rarely_as_it_says(lost_share: float) -> None:
    """Enumeration of all tables of 150 pairs: at a true difference of -margin "not worse" is claimed in 2.5 %."""
    n, margin = 150, 0.03
    shares = [lost_share - margin, lost_share, 1 - 2 * lost_share + margin]
    wrong = 0.0
    for gained in range(30):
        for lost in range(45):
            if stats.tost(PairedCounts(gained, lost, n), margin).p_lower < 0.025:
                wrong += float(multinomial.pmf([gained, lost, n - gained - lost], n, shares))
    assert 0.005 < wrong < 0.034


def test_paired_difference_with_seeds_covers_the_truth() -> None:
    """Simulation: both arms share the difficulty of a case; the arm has its own weak spots; three seeds a case."""
    rng = np.random.default_rng(5)
    hits, naive_hits, runs = 0, 0, 500
    for _ in range(runs):
        reference = rng.beta(5, 0.6, size=100)
        hurt = rng.random(100) < 0.1
        arm = np.where(hurt, reference * 0.3, reference)
        truth = -0.1 * 0.7 * 5 / 5.6
        pairs = [
            Pair(str(c), bool(rng.random() < arm[c]), bool(rng.random() < reference[c]))
            for c in range(100)
            for _ in range(3)
        ]
        low, high = stats.tango_interval(stats.paired_counts(pairs), 0.95)
        hits += low <= truth <= high
        plain = PairedCounts(
            sum(p.arm > p.reference for p in pairs), sum(p.arm < p.reference for p in pairs), len(pairs)
        )
        low, high = stats.tango_interval(plain, 0.95)
        naive_hits += low <= truth <= high
    assert 0.925 <= hits / runs <= 0.98
    assert naive_hits < hits


def test_paired_counts_of_single_pairs_are_the_counts() -> None:
    pairs = [Pair(str(i), i % 10 != 0, i % 7 != 0) for i in range(140)]
    gained = sum(p.arm and not p.reference for p in pairs)
    lost = sum(p.reference and not p.arm for p in pairs)
    assert stats.paired_counts(pairs) == pytest.approx((gained, lost, 140))


def test_clustered_pairs_use_the_cluster_robust_variance() -> None:
    rng = np.random.default_rng(9)
    pairs = [
        Pair(str(c), bool(rng.random() < a), bool(rng.random() < 0.9))
        for c in range(50)
        for a in [rng.beta(3, 1)]
        for _ in range(4)
    ]
    values = [float(p.arm) - float(p.reference) for p in pairs]
    variance = _robust_variance([p.case for p in pairs], [1.0] * len(pairs), values)
    gained, lost, n = stats.paired_counts(pairs)
    assert (gained + lost) / n - ((gained - lost) / n) ** 2 == pytest.approx(variance * n)
    assert (gained - lost) / n == pytest.approx(np.mean(values))


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (1, 0), (5, 5), (3, 12), (40, 22), (0, 9), (700, 640)])
def test_mcnemar_against_statsmodels(worse: int, better: int) -> None:
    assert stats.mcnemar_exact(worse, better) == pytest.approx(mcnemar([[50, worse], [better, 50]], exact=True).pvalue)
    if worse + better:
        assert stats.mcnemar_exact(worse, better) == pytest.approx(binomtest(worse, worse + better).pvalue)


def test_mcnemar_of_very_many_pairs_does_not_overflow() -> None:
    assert 0 < stats.mcnemar_exact(2400, 2600) < 0.01


def test_flips_with_seeds_take_the_net_sign() -> None:
    pairs = [
        Pair("b", False, True), Pair("b", False, True), Pair("b", True, False),
        Pair("a", True, False), Pair("tie", True, False), Pair("tie", False, True), Pair("same", True, True),
    ]  # fmt: skip
    assert stats.flips(pairs) == (["b"], ["a"])


@pytest.mark.parametrize("p_values", [[0.01, 0.04, 0.03, 0.005], [0.5, 0.9], [0.02], [0.001, 0.001, 1.0]])
def test_holm_against_statsmodels(p_values: list[float]) -> None:
    named = {str(i): p for i, p in enumerate(p_values)}
    assert list(stats.holm(named).values()) == pytest.approx(list(multipletests(p_values, method="holm")[1]))


def test_holm_of_nothing() -> None:
    assert stats.holm({}) == {}
