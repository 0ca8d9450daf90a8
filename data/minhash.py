"""Nearly equal texts of a set that is too large to compare every pair: MinHash signatures, looked up by bands.

`datasketch` makes the signatures; what follows is the banding of Leskovec, Rajaraman and Ullman (Mining of Massive
Datasets, section 3.4), by sorting, so that the signatures may lie on disk. A pair that shares a band is compared
exactly, so nothing is called nearly equal that is not; with 21 bands of 6 rows a pair of similarity 0.8 shares one with
probability 1 - (1 - 0.8^6)^21 = 99.8 %, one of 0.9 practically always. Its signatures must also agree in 69 % of their
places, as 99.9 % of such pairs do.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat.data.duplicates import NEAR, Families, Pair, grams, jaccard

BANDS = 21
ROWS = 6
PERMUTATIONS = BANDS * ROWS

_SLICE = 1 << 14
_SLACK = 0.11
"""Three standard deviations of a similarity of 0.8 estimated by 126 permutations; what lies further below is passed."""
_REMEMBERED = 1 << 18
"""Pairs that were compared in vain and are not compared again: most share several bands. Then all are forgotten."""
_NEIGHBOURS = 3
"""How many of those that share its band a text is compared with: they link the family, and more find no other one."""


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash signatures of the texts' character 4-grams.

    Args:
        texts: Normalised texts.

    Returns:
        (texts, PERMUTATIONS), uint32.
    """
    from datasketch import MinHash

    options: dict[str, Any] = {"num_perm": PERMUTATIONS, "hashfunc": zlib.crc32}
    first = MinHash(**options)
    options |= {"permutations": first.permutations, "scheme": first.scheme}
    rows = np.empty((len(texts), PERMUTATIONS), np.uint32)
    for place, text in enumerate(texts):
        sketch = MinHash(**options)
        sketch.update_batch([gram.encode() for gram in grams(text)])
        rows[place] = sketch.hashvalues
    return rows


def near_families(
    rows: NDArray[np.uint32], text: Callable[[int], str], threshold: float = NEAR
) -> tuple[Families, list[Pair]]:
    """Find which texts are held together by near equality.

    Args:
        rows: The signatures, (texts, PERMUTATIONS); may be mapped from a file.
        text: Gives the text at a position.
        threshold: Least Jaccard similarity, in (0, 1].

    Returns:
        The families, and the pairs that linked them, in order of finding.
    """
    families = Families(len(rows))
    pairs = []
    in_vain: set[tuple[int, int]] = set()
    for first, second in _candidates(rows, families, threshold):
        if (first, second) in in_vain or families.together(first, second):
            continue
        similarity = jaccard(grams(text(first)), grams(text(second)))
        if similarity >= threshold:
            families.join(first, second)
            pairs.append(Pair(min(first, second), max(first, second), similarity))
        else:
            if len(in_vain) == _REMEMBERED:
                in_vain.clear()
            in_vain.add((first, second))
    return families, pairs


def _candidates(rows: NDArray[np.uint32], families: Families, threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs that share a band, are not linked yet, and agree in about as many places as their similarity wants."""
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
                roots = families.roots()
                apart = roots[first] != roots[second]
                first, second = first[apart], second[apart]
                alike = (rows[first] == rows[second]).mean(axis=1) >= threshold - _SLACK
                yield from zip(first[alike].tolist(), second[alike].tolist(), strict=True)
