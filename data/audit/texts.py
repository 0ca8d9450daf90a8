"""Repeated texts of a set: user turns, replies and conversations; some bytes each in memory, the rest on disk."""

from __future__ import annotations

import heapq
import os
import tempfile
from array import array
from collections.abc import Iterable
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from qat.data.audit.tally import Tally, digest
from qat.data.duplicates import Families, Pair, each_pair
from qat.data.minhash import PERMUTATIONS, near_families, signatures

EXACT_UPTO = 3000
"""Distinct texts whose pairs are all compared: seconds where all are alike, and quadratic time beyond."""
EXACT_BYTES = 1 << 20
"""Bytes of these: every 4-gram of every text is held for it, some hundred times as much."""

_SHOWN = 5
_SHOWN_CHARACTERS = 200
_BATCH = 4096


class TextNumbers(NamedTuple):
    """What the texts of one kind are like.

    Attributes:
        total: All of them.
        distinct: Different ones after normalisation.
        near: Distinct texts that are nearly equal to another one.
        again: Texts that are equal or nearly equal to one that stands before them: all but one of each family.
        exact: Every pair was compared; otherwise `near` and `again` are what MinHash found, each pair confirmed.
        families: The largest families, by how many texts they have in all: that number, and their first text.
        near_examples: Pairs of positions with their similarity.
    """

    total: int
    distinct: int
    near: int
    again: int
    exact: bool
    families: list[tuple[int, str]]
    near_examples: list[Pair]


class TextStore:
    """Normalised texts of one kind on disk, in a file that goes with the process.

    Args:
        exact_upto: Distinct texts whose pairs are all compared.
    """

    def __init__(self, exact_upto: int = EXACT_UPTO) -> None:
        self._exact_upto = exact_upto
        self._file = tempfile.TemporaryFile(prefix="qat-audit-")  # noqa: SIM115 closed by __exit__
        self._ends = array("Q", [0])
        self._hashes = array("Q")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, texts: Iterable[str]) -> None:
        """Keep these texts."""
        for text in texts:
            data = text.encode()
            self._file.write(data)
            self._ends.append(self._ends[-1] + len(data))
            self._hashes.append(digest(text))

    def text(self, position: int) -> str:
        """The text at a position."""
        start, end = self._ends[position], self._ends[position + 1]
        return os.pread(self._file.fileno(), end - start, start).decode()

    def shown(self, position: int) -> str:
        """The beginning of the text at a position."""
        text = self.text(position)
        return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"

    def numbers(self) -> TextNumbers:
        """Compare all texts that were kept."""
        self._file.flush()
        hashes = np.array(self._hashes, np.uint64)
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        order = np.argsort(first)
        first, counts = first[order], counts[order]
        families, pairs, exact = self._families(first)
        roots = families.roots()
        members = np.bincount(roots, minlength=len(first))
        sizes = np.bincount(roots, counts, minlength=len(first)).astype(np.int64)
        largest = np.argsort(-sizes, kind="stable")[:_SHOWN]
        return TextNumbers(
            total=len(hashes),
            distinct=len(first),
            near=int(members[members > 1].sum()),
            again=len(hashes) - int((members > 0).sum()),
            exact=exact,
            families=[(int(sizes[root]), self.shown(int(first[root]))) for root in largest if sizes[root]],
            near_examples=[Pair(int(first[a]), int(first[b]), round(similarity, 3)) for a, b, similarity in pairs],
        )

    def _families(self, distinct: NDArray[np.intp]) -> tuple[Families, list[Pair], bool]:
        """Families of the distinct texts, a few of the pairs, and whether every pair was compared."""

        def text(place: int) -> str:
            return self.text(int(distinct[place]))

        if len(distinct) <= self._exact_upto and self._ends[-1] <= EXACT_BYTES:
            families = Families(len(distinct))
            found = each_pair([text(place) for place in range(len(distinct))], families=families)
            pairs = heapq.nsmallest(_SHOWN, found, key=lambda pair: (-pair.similarity, pair.first, pair.second))
            return families, pairs, True
        with tempfile.NamedTemporaryFile(prefix="qat-audit-") as file:
            shape = (len(distinct), PERMUTATIONS)
            rows: Any = np.memmap(file.name, np.uint32, "w+", shape=shape)
            for start in range(0, len(distinct), _BATCH):
                stop = min(start + _BATCH, len(distinct))
                rows[start:stop] = signatures([text(place) for place in range(start, stop)])
            families, pairs = near_families(rows, text)
        return families, pairs[:_SHOWN], False


class Kinds(NamedTuple):
    """One of each kind of text.

    Attributes:
        turns: Of user turns.
        replies: Of replies: all that the assistant says between two turns of the user.
        talks: Of conversations: all that is said, called and returned, without the system prompt.
    """

    turns: TextNumbers
    replies: TextNumbers
    talks: TextNumbers


class TextStores:
    """The texts of a set by their kinds."""

    def __init__(self) -> None:
        # Conversations are long: all pairs of a few hundred would take longer than all signatures.
        self.turns, self.replies, self.talks = TextStore(), TextStore(), TextStore(exact_upto=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for store in (self.turns, self.replies, self.talks):
            store.__exit__(kind, error, trace)

    def take(self, tally: Tally) -> None:
        """Take the texts out of a tally."""
        self.turns.add(tally.turns)
        self.replies.add(tally.replies)
        self.talks.add(tally.talks)
        for texts in (tally.turns, tally.replies, tally.talks):
            texts.clear()

    def numbers(self) -> Kinds:
        """Compare the texts of each kind."""
        return Kinds(self.turns.numbers(), self.replies.numbers(), self.talks.numbers())


def repeats(hashes: array[int]) -> list[tuple[int, int]]:
    """Positions whose hash came before, each with the position where it first came."""
    values = np.array(hashes, np.uint64)
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    origin = first[inverse]
    later = np.flatnonzero(origin != np.arange(len(values)))
    return list(zip(later.tolist(), origin[later].tolist(), strict=True))
