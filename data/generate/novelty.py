"""Whether a user turn is new: neither equal nor nearly equal to one that the suite asks or the data holds already."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from qat.data.duplicates import NEAR, grams, jaccard, normalise_turn, user_turns

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


class Known(NamedTuple):
    """A turn that is taken, and by what."""

    source: str
    turn: str
    similarity: float


class Novelty:
    """Turns that are taken; nearness is that of `qat.data.duplicates` (Jaccard of character 4-grams, normalised)."""

    def __init__(self) -> None:
        self._grams: list[frozenset[str]] = []
        self._known: list[tuple[str, str]] = []

    def take(self, source: str, turns: Iterable[str]) -> None:
        """Enter turns; `source` says in messages whose they are."""
        for turn in turns:
            self._grams.append(grams(normalise_turn(turn)))
            self._known.append((source, turn))

    def take_cases(self, cases: Iterable[Mapping[str, Any]]) -> None:
        """Enter the user turns of a suite's case records, of the prefix and of `turns`."""
        for case in cases:
            turns = [*user_turns(case), *(turn["user"] for turn in case.get("turns") or ())]
            self.take(f"case {case['id']}", turns)

    def nearest(self, turns: Iterable[str]) -> Known | None:
        """The most similar taken turn that reaches `NEAR`; None where all of these are new."""
        best: Known | None = None
        for turn in turns:
            ours = grams(normalise_turn(turn))
            for known, (source, text) in zip(self._grams, self._known, strict=True):
                # Jaccard similarity is at most the ratio of the sizes: most pairs need no intersection.
                if min(len(known), len(ours)) < NEAR * max(len(known), len(ours)):
                    continue
                similarity = jaccard(known, ours)
                if similarity >= NEAR and (best is None or similarity > best.similarity):
                    best = Known(source, text, similarity)
        return best


def words_of(text: str) -> list[str]:
    """The words of a text in order, as written; of a possessive the word that possesses."""
    return [re.sub(r"['’]s$", "", word) for word in _WORD.findall(text)]
