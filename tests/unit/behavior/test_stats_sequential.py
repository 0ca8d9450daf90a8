"""Looking again: the spending by hand, and what it is worth by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from qat.behavior import coverage
from qat.behavior.sequential import Look, confidence_at, wrong_claims
from qat.errors import UserError


def test_the_only_look_takes_it_all() -> None:
    assert confidence_at(0.95, None) == 0.95


def test_planned_looks_share_and_unplanned_ones_never_spend_more() -> None:
    """By hand: 0.05 / 5 at each of five; 0.05 (1/2 + 1/6 + 1/12 + ...) = 0.05 (1 - 1 / (k + 1)) after k."""
    assert [confidence_at(0.95, Look(k, 5)) for k in (1, 5)] == pytest.approx([0.99, 0.99])
    assert [confidence_at(0.95, Look(k)) for k in (1, 2, 3)] == pytest.approx(
        [0.975, 0.95 + 0.05 * 5 / 6, 0.95 + 0.55 / 12]
    )
    spent = math.fsum(1 - confidence_at(0.95, Look(k)) for k in range(1, 1001))
    assert spent == pytest.approx(0.05 * (1 - 1 / 1001))


@pytest.mark.parametrize("look", [Look(0), Look(3, 2), Look(1, 0)])
def test_looks_that_were_not_planned(look: Look) -> None:
    with pytest.raises(UserError, match="not planned"):
        confidence_at(0.95, look)


def test_wrong_claims_is_the_chance_of_at_least_one() -> None:
    assert wrong_claims(0.95, 5) == pytest.approx(1 - binom.pmf(0, 5, 0.025))


@pytest.mark.parametrize("fresh", [True, False])
def test_spending_keeps_the_promise_that_repeated_looks_break(fresh: bool) -> None:
    found = coverage.wrong_passes(4, fresh, 400, np.random.default_rng(3), cases=150)
    assert found["any number"] <= 0.025 and found["planned"] <= 0.03
    assert found["fixed"] > (0.05 if fresh else 0.01)
    assert found["fixed"] >= found["planned"]
