"""Which conversations set the activation scales: every category and every length takes part."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

LENGTH_CLASSES = 3
"""Lengths are cut into this many classes of equal size within each category: short, middle, long."""


class Stratum(NamedTuple):
    """Conversations of one category and length class.

    Attributes:
        category: Name.
        length_class: 0 for the shortest.
        rows: Their numbers.
    """

    category: str
    length_class: int
    rows: list[int]


def strata(categories: Sequence[str], lengths: Sequence[int]) -> list[Stratum]:
    """Divide conversations by category, and each category into length classes of equal size.

    Args:
        categories: Of each conversation.
        lengths: Tokens of each conversation.
    """
    found = []
    for category in sorted(set(categories)):
        rows = sorted(
            (row for row, name in enumerate(categories) if name == category), key=lambda row: (lengths[row], row)
        )
        cuts = [len(rows) * part // LENGTH_CLASSES for part in range(LENGTH_CLASSES + 1)]
        for part, (start, end) in enumerate(pairwise(cuts)):
            if end > start:
                found.append(Stratum(category, part, rows[start:end]))
    return found


def choose_samples(categories: Sequence[str], lengths: Sequence[int], count: int, seed: int) -> list[int]:
    """Choose conversations for calibration.

    Seats go round the strata one at a time, so that each stratum is represented before any has two, and small
    categories weigh as much as large ones: a range is a maximum, and what matters is that every kind of activation is
    seen. A stratum that runs out passes its seats on. Within a stratum the choice is random.

    Args:
        categories: Of each conversation.
        lengths: Tokens of each conversation.
        count: How many to choose; all where there are no more.
        seed: Of the choice and of the order of the strata.

    Returns:
        Rising row numbers.
    """
    shuffle = random.Random(f"calibration/{seed}")
    waiting = [list(stratum.rows) for stratum in strata(categories, lengths)]
    for rows in waiting:
        shuffle.shuffle(rows)
    shuffle.shuffle(waiting)
    chosen: list[int] = []
    while len(chosen) < min(count, len(lengths)):
        for rows in waiting:
            if rows and len(chosen) < count:
                chosen.append(rows.pop())
    return sorted(chosen)


def unpadded_batches(lengths: Sequence[int], rows: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group rows of equal length, so that no padding ever reaches a range.

    Args:
        lengths: Tokens of each conversation.
        rows: The chosen ones.
        batch_size: Most rows in a batch.

    Returns:
        Batches of row numbers in falling length.
    """
    by_length: dict[int, list[int]] = {}
    for row in rows:
        by_length.setdefault(lengths[row], []).append(row)
    return [
        members[start : start + batch_size]
        for _, members in sorted(by_length.items(), reverse=True)
        for start in range(0, len(members), batch_size)
    ]
