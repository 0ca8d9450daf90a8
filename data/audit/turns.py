"""Repeated conversations and user turns, over the whole set: eight bytes a turn in memory, the texts on disk."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterable
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from qat.data.audit.tally import digest
from qat.data.duplicates import Pair, near_pairs
from qat.data.minhash import PERMUTATIONS, near_twins, signatures

EXACT_UPTO = 20_000
"""Distinct turns whose pairs are all compared; that takes seconds, and quadratic time beyond."""

_EXAMPLES = 5
_BATCH = 4096


class TurnNumbers(NamedTuple):
    """What the user turns of a set are like.

    Attributes:
        total: All of them.
        distinct: Different ones after normalisation.
        near: Distinct turns that are nearly equal to another one.
        exact: Every pair was compared; otherwise `near` is what MinHash found, each confirmed.
        frequent: The three commonest turns, with their counts.
        near_examples: Pairs with their similarity.
    """

    total: int
    distinct: int
    near: int
    exact: bool
    frequent: list[tuple[str, int]]
    near_examples: list[tuple[str, str, float]]


class TurnStore:
    """User turns on disk, in a file that goes with the process."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="qat-audit-")  # noqa: SIM115 closed by __exit__
        self._ends = array("Q", [0])
        self._hashes = array("Q")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, turns: Iterable[str]) -> None:
        """Keep these turns."""
        for turn in turns:
            data = turn.encode()
            self._file.write(data)
            self._ends.append(self._ends[-1] + len(data))
            self._hashes.append(digest(turn))

    def text(self, position: int) -> str:
        """The turn at a position."""
        start, end = self._ends[position], self._ends[position + 1]
        return os.pread(self._file.fileno(), end - start, start).decode()

    def numbers(self) -> TurnNumbers:
        """Compare all turns that were kept."""
        self._file.flush()
        hashes = np.array(self._hashes, np.uint64)
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        commonest = np.argsort(-counts, kind="stable")[:3]
        frequent = [(self.text(int(first[place])), int(counts[place])) for place in commonest]
        distinct = np.sort(first)
        near, pairs = self._near(distinct)
        examples = [
            (self.text(int(distinct[a])), self.text(int(distinct[b])), round(similarity, 3))
            for a, b, similarity in pairs[:_EXAMPLES]
        ]
        return TurnNumbers(len(hashes), len(distinct), int(near.sum()), len(distinct) <= EXACT_UPTO, frequent, examples)

    def _near(self, distinct: NDArray[np.intp]) -> tuple[NDArray[np.bool_], list[Pair]]:
        def text(place: int) -> str:
            return self.text(int(distinct[place]))

        if len(distinct) <= EXACT_UPTO:
            pairs = near_pairs([text(place) for place in range(len(distinct))])
            near = np.zeros(len(distinct), np.bool_)
            near[[place for pair in pairs for place in pair[:2]]] = True
            return near, pairs
        with tempfile.NamedTemporaryFile(prefix="qat-audit-") as file:
            shape = (len(distinct), PERMUTATIONS)
            rows: Any = np.memmap(file.name, np.uint32, "w+", shape=shape)
            for start in range(0, len(distinct), _BATCH):
                stop = min(start + _BATCH, len(distinct))
                rows[start:stop] = signatures([text(place) for place in range(start, stop)])
            return near_twins(rows, text)


def repeats(hashes: array[int]) -> list[tuple[int, int]]:
    """Positions whose hash came before, each with the position where it first came."""
    values = np.array(hashes, np.uint64)
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    origin = first[inverse]
    later = np.flatnonzero(origin != np.arange(len(values)))
    return list(zip(later.tolist(), origin[later].tolist(), strict=True))
