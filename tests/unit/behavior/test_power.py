"""Power against simulation of the gate's own interval, and flips against counting by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, norm

from qat.behavior import coverage, power
from qat.behavior.compare import read_answers
from qat.behavior.power import Assumptions
from tests.unit.behavior.helpers import small_suite
from tests.unit.behavior.test_gate import result, write


def assumed(flips: float, averaged: bool = True) -> Assumptions:
    return Assumptions(flips, "", averaged)


def test_single_answers_by_the_published_formula() -> None:
    """Connor 1987: n = (z_a sqrt(psi) + z_b sqrt(psi - d^2))^2 / d^2 pairs, psi = d + 2 flips."""
    psi, d = 0.05 + 2 * 0.02, 0.05
    n = (norm.ppf(0.975) * psi**0.5 + norm.ppf(0.8) * (psi - d**2) ** 0.5) ** 2 / d**2
    needed = power.cases_needed(1, d, 0.03, 0.8, assumed(0.02), 0.95).detect
    assert needed == int(np.ceil(n))


@pytest.mark.parametrize(("drop", "flips", "cases"), [(0.1, 0.03, 130), (0.05, 0.05, 470)])
def test_detection_by_enumeration(drop: float, flips: float, cases: int) -> None:
    """Exact: of D discordant pairs, L were lost; the score test at zero is (2 L - D) / sqrt(D)."""
    psi, z = drop + 2 * flips, norm.ppf(0.975)
    exact = 0.0
    for discordant in range(1, cases + 1):
        lost = np.arange(discordant + 1)
        shown = (2 * lost - discordant) / np.sqrt(discordant) >= z
        exact += binom.pmf(discordant, cases, psi) * binom.pmf(lost, discordant, (drop + flips) / psi)[shown].sum()
    assert power.chance_to_detect(cases, 1, drop, assumed(flips), 0.95) == pytest.approx(exact, abs=0.04)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("drop", "flips"), [(0.05, 0.02), (0.1, 0.05)])
def test_simulated_suites_of_the_size_asked_for(repeats: int, drop: float, flips: float) -> None:
    """At least as powerful as asked, up to noise; at three quarters of the cases not much more so."""
    rng = np.random.default_rng(4)
    needed = power.cases_needed(repeats, drop, drop, 0.8, assumed(flips), 0.95)
    assert needed.detect is not None and needed.clear is not None
    for cases, fall, limit in ((needed.detect, drop, 0.0), (needed.clear, 0.0, -drop)):
        found = coverage.simulated_power(cases, repeats, fall, limit, assumed(flips), 250, rng)
        fewer = coverage.simulated_power(int(cases * 0.6), repeats, fall, limit, assumed(flips), 250, rng)
        assert found > 0.75
        assert fewer < found


def test_repeats_help_only_where_flips_average_out() -> None:
    warm = [power.cases_needed(m, 0.03, 0.03, 0.8, assumed(0.05), 0.95).detect or 0 for m in (1, 3, 10)]
    assert warm[0] > 1.5 * warm[1] > 1.5 * warm[2] * 0.7
    cold = [power.cases_needed(m, 0.03, 0.03, 0.8, assumed(0.05, False), 0.95).detect or 0 for m in (1, 3)]
    assert cold[1] >= cold[0]  # copies help nothing, and the unknown design effect costs a little


def test_edges() -> None:
    assert power.chance_to_detect(9, 1, 0.5, assumed(0.0), 0.95) == 0.0  # too few cases for any comparison
    assert power.cases_needed(1, 0.00001, 0.03, 0.8, assumed(0.05), 0.95).detect is None
    # By hand: without flips the ends of the interval are +-z^2 / (n + z^2), inside 3 points from 125 cases on.
    assert power.cases_needed(1, 0.03, 0.03, 0.8, assumed(0.0), 0.95).clear == 125
    assert power.detectable_drop(10, 1, 0.8, assumed(0.25), 0.95) is None


def test_detectable_drop_inverts_the_requirement() -> None:
    cases = power.cases_needed(1, 0.05, 0.03, 0.8, assumed(0.02), 0.95).detect
    assert cases is not None
    assert power.detectable_drop(cases, 1, 0.8, assumed(0.02), 0.95) == pytest.approx(0.05)
    assert (power.detectable_drop(cases - 1, 1, 0.8, assumed(0.02), 0.95) or 0) > 0.05


def test_flips_by_hand(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, 20)
    old = write(tmp_path, suite, "old", [result("old", n, n > 2) for n in range(20)])
    new_rows = [result("new", n, n > 1, seed=s) for s in (0, 1) for n in range(20)]
    again = [result("new", n, n != 7, sampling="again") for n in range(10)]
    new = write(tmp_path, suite, "new", [*new_rows, *again])
    between = power.flips_between(read_answers(new), read_answers(old), "greedy")
    assert between is not None and between.flips == pytest.approx((1 + 1) / (20 + 2) / 2)  # only case 2 differs
    assert "1 of 20 pairs of new and old differ" in between.source and not between.averaged
    # Two equal seeds of 20 cases: 20 pairs, none differs. The repeated pass makes three answers of ten cases: 3 pairs
    # each, of which 2 differ where the third one does, in cases 0, 1 and 7.
    within = power.flips_within(read_answers(new), "greedy")
    assert within is not None and within.flips == pytest.approx((6 + 1) / (10 + 30 + 2) / 2)
    assert power.flips_within(read_answers(old), "greedy") is None
    assert power.flips_between(read_answers(new), read_answers(old), "warm") is None
