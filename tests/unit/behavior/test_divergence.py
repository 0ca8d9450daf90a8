"""The estimator against full distributions and its counting against statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import entropy

from qat.behavior.divergence import SuiteDivergence, Sums, Top, compare_position, mean, ratio_error

RNG = np.random.default_rng(3)


def pair(vocabulary: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Log probabilities of a reference and of an arm that is a little off."""
    logits = RNG.normal(scale=3.0, size=vocabulary)
    return log_softmax(logits), log_softmax(logits + RNG.normal(scale=noise, size=vocabulary))


def top(log_probabilities: np.ndarray, count: int) -> Top:
    return {int(token): float(log_probabilities[token]) for token in np.argsort(-log_probabilities)[:count]}


@pytest.mark.parametrize("noise", [0.01, 0.3, 2.0])
def test_with_all_tokens_listed_it_is_the_full_divergence(noise: float) -> None:
    for _ in range(20):
        p, q = pair(50, noise)
        found = compare_position(top(p, 50), top(q, 50))
        assert found.kl == pytest.approx(entropy(np.exp(p), np.exp(q)), abs=1e-6)
        assert found.agree == (np.argmax(p) == np.argmax(q))
        assert found.rest == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("count", [1, 5, 20])
def test_what_a_truncated_list_leaves_out_is_the_rest_times_the_divergence_of_the_rests(count: int) -> None:
    for _ in range(20):
        p, q = pair(200, 0.5)
        known = list(top(p, count).keys() & top(q, count).keys())
        found = compare_position(top(p, count), top(q, count))
        hidden = np.delete(np.exp(p), known), np.delete(np.exp(q), known)
        assert found.rest == pytest.approx(hidden[0].sum(), abs=1e-9)
        assert found.kl + found.rest * entropy(*hidden) == pytest.approx(entropy(np.exp(p), np.exp(q)), abs=1e-9)
        assert 0 <= found.kl <= entropy(np.exp(p), np.exp(q))


def test_equal_lists_and_a_token_of_no_probability() -> None:
    p, _ = pair(200, 0.0)
    assert compare_position(top(p, 20), top(p, 20)).kl == 0.0
    # vLLM writes -9999 for minus infinity.
    impossible = compare_position({0: 0.0, 1: -9999.0}, {0: math.log(0.5), 1: math.log(0.5)})
    assert impossible.kl == pytest.approx(math.log(2), abs=1e-5)


def test_of_two_tokens_as_likely_the_first_counts() -> None:
    tied = math.log(0.4)
    assert compare_position({7: tied, 3: tied}, {3: math.log(0.5), 7: math.log(0.3)}).agree
    assert not compare_position({7: tied, 3: tied}, {7: math.log(0.5), 3: math.log(0.3)}).agree


def test_the_standard_error_is_that_of_clustered_tokens() -> None:
    sm = pytest.importorskip("statsmodels.api")
    sizes = RNG.integers(1, 40, size=25)
    tokens = [RNG.exponential(size=size) + RNG.normal() ** 2 for size in sizes]
    flat, groups = np.concatenate(tokens), np.repeat(np.arange(len(sizes)), sizes)
    fitted = sm.OLS(flat, np.ones(len(flat))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    found = ratio_error([float(part.sum()) for part in tokens], [int(size) for size in sizes])
    assert found == pytest.approx(float(fitted.bse[0]), rel=1e-9)


def case(positions: list[tuple[float, bool, float]]) -> Sums:
    sums = Sums()
    for position in positions:
        sums.add(compare_position({0: 0.0}, {0: 0.0})._replace(kl=position[0], agree=position[1], rest=position[2]))
    return sums


def test_means_are_over_tokens_and_few_cases_have_no_error() -> None:
    few = mean([case([(0.2, True, 0.1)]), case([(0.0, True, 0.0), (0.1, False, 0.2)])])
    assert few == pytest.approx((0.1, None, 2 / 3, None, 0.1, 3, 2))
    many = mean([case([(0.1 * n, n > 3, 0.0)]) for n in range(12)])
    assert (many.kl, many.top1) == (pytest.approx(0.55), pytest.approx(8 / 12))
    assert many.kl_se == pytest.approx(np.std([0.1 * n for n in range(12)], ddof=1) / math.sqrt(12))
    found = SuiteDivergence("bf16", "s", "0", "greedy", 20, 1, many, {"a": few}).to_json()
    assert found["kl"] == many.kl and found["categories"]["a"]["tokens"] == 3 and "overall" not in found
