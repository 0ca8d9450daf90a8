from __future__ import annotations

import random
from collections import Counter

from qat.calibration.samples import choose_samples, strata, unpadded_batches

CATEGORIES = ["big"] * 80 + ["small"] * 9 + ["single"]
LENGTHS = random.Random(1).choices(range(10, 100), k=len(CATEGORIES))


def test_strata_by_hand() -> None:
    found = strata(["b", "a", "a", "a", "a"], [5, 40, 10, 20, 30])
    assert found == [("a", 0, [2]), ("a", 1, [3]), ("a", 2, [4, 1]), ("b", 2, [0])]


def test_every_category_and_length_is_seen() -> None:
    chosen = choose_samples(CATEGORIES, LENGTHS, 20, seed=0)
    assert len(chosen) == len(set(chosen)) == 20 and chosen == sorted(chosen)
    # Seven strata: three of `big`, three of `small`, one of `single`; 20 seats, of which `single` can fill one.
    counts = Counter(CATEGORIES[row] for row in chosen)
    assert counts["single"] == 1 and counts["big"] in (9, 10, 11) and counts["small"] in (8, 9)
    for stratum in strata(CATEGORIES, LENGTHS):
        assert set(stratum.rows) & set(chosen)


def test_more_seats_than_conversations() -> None:
    assert choose_samples(CATEGORIES, LENGTHS, 1000, seed=0) == list(range(90))


def test_the_choice_follows_the_seed() -> None:
    assert choose_samples(CATEGORIES, LENGTHS, 20, seed=0) == choose_samples(CATEGORIES, LENGTHS, 20, seed=0)
    assert choose_samples(CATEGORIES, LENGTHS, 20, seed=0) != choose_samples(CATEGORIES, LENGTHS, 20, seed=1)


def test_no_batch_needs_padding() -> None:
    rows = list(range(0, 90, 2))
    batches = unpadded_batches(LENGTHS, rows, 3)
    assert sorted(row for batch in batches for row in batch) == rows
    assert all(len({LENGTHS[row] for row in batch}) == 1 and len(batch) <= 3 for batch in batches)
