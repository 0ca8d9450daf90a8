"""Nearly equal turns of a set that is too large to compare every pair: MinHash signatures, looked up by bands.

`datasketch` makes the signatures; what follows is the banding of Leskovec, Rajaraman and Ullman (Mining of Massive
Datasets, section 3.4), by sorting, so that the signatures may lie on disk. A pair that shares a band is compared
exactly, so nothing is called nearly equal that is not; with 21 bands of 6 rows a pair of similarity 0.8 shares one with
probability 1 - (1 - 0.8^6)^21 = 99.8 %, one of 0.9 practically always.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat.data.duplicates import NEAR, Pair, grams, jaccard

BANDS = 21
ROWS = 6
PERMUTATIONS = BANDS * ROWS

_SLICE = 1 << 14
_SLACK = 0.15
"""Four standard deviations of a similarity estimated by 126 permutations; what lies further below is not compared."""
_NEIGHBOURS = 3
"""How many of those that share its band a turn is compared with: more change nothing in who has a near twin."""


def signatures(turns: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash signatures of the turns' character 4-grams.

    Args:
        turns: Normalised turns.

    Returns:
        (turns, PERMUTATIONS), uint32.
    """
    from datasketch import MinHash

    options: dict[str, Any] = {"num_perm": PERMUTATIONS, "hashfunc": zlib.crc32}
    first = MinHash(**options)
    options |= {"permutations": first.permutations, "scheme": first.scheme}
    rows = np.empty((len(turns), PERMUTATIONS), np.uint32)
    for place, turn in enumerate(turns):
        sketch = MinHash(**options)
        sketch.update_batch([gram.encode() for gram in grams(turn)])
        rows[place] = sketch.hashvalues
    return rows


def near_twins(
    rows: NDArray[np.uint32], text: Callable[[int], str], threshold: float = NEAR
) -> tuple[NDArray[np.bool_], list[Pair]]:
    """Find the turns that are nearly equal to another one.

    Args:
        rows: The signatures, (turns, PERMUTATIONS); may be mapped from a file.
        text: Gives the turn at a position.
        threshold: Least Jaccard similarity, in (0, 1].

    Returns:
        Which turns have a near twin, (turns,), and the pairs that showed it, in order of finding.
    """
    near = np.zeros(len(rows), np.bool_)
    pairs = []
    for first, second in _candidates(rows, near, threshold):
        if near[first] and near[second]:
            continue
        similarity = jaccard(grams(text(first)), grams(text(second)))
        if similarity >= threshold:
            near[first] = near[second] = True
            pairs.append(Pair(min(first, second), max(first, second), similarity))
    return near, pairs


def _candidates(rows: NDArray[np.uint32], near: NDArray[np.bool_], threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs that share a band and whose signatures agree in about as many places as their similarity wants."""
    mix = np.random.default_rng(0).integers(1, 1 << 63, ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    for band in range(BANDS):
        columns = np.array(rows[:, band * ROWS : (band + 1) * ROWS], np.uint64)
        keys = (columns * mix).sum(axis=1, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for distance in range(1, min(_NEIGHBOURS, len(keys) - 1) + 1):
            places = np.flatnonzero(keys[distance:] == keys[:-distance])
            for start in range(0, len(places), _SLICE):
                part = places[start : start + _SLICE]
                first, second = order[part], order[part + distance]
                open_pairs = ~(near[first] & near[second])
                first, second = first[open_pairs], second[open_pairs]
                alike = (rows[first] == rows[second]).mean(axis=1) >= threshold - _SLACK
                yield from zip(first[alike].tolist(), second[alike].tolist(), strict=True)
