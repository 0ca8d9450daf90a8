"""Whether a user turn is new, neither equal nor nearly so to one of the suite or the data, and a reply not worn out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from qat.data.duplicates import NEAR, OWN_FROM, grams, jaccard, normalise_turn, user_turns

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


class Known(NamedTuple):
    """A turn that is taken, and by what."""

    source: str
    turn: str
    similarity: float


class Phrases:
    """Replies that were accepted, and how many of them say nearly what another one says."""

    def __init__(self) -> None:
        self._counts: Counter[frozenset[str]] = Counter()

    def take(self, replies: Iterable[str]) -> None:
        """Enter replies."""
        self._counts.update(found for reply in replies if (found := _phrase(reply)))

    def alike(self, reply: str) -> int:
        """How many entered replies are equal or nearly equal to this one; short ones are nobody's phrase: 0."""
        ours = _phrase(reply)
        return (
            0
            if ours is None
            else sum(
                count
                for known, count in self._counts.items()
                if _may_be_near(known, ours) and jaccard(known, ours) >= NEAR
            )
        )


def _phrase(reply: str) -> frozenset[str] | None:
    text = normalise_turn(reply)
    return grams(text) if len(text) >= OWN_FROM else None


def _may_be_near(first: frozenset[str], second: frozenset[str]) -> bool:
    """Jaccard similarity is at most the ratio of the sizes: most pairs need no intersection."""
    return min(len(first), len(second)) >= NEAR * max(len(first), len(second))


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
                if not _may_be_near(known, ours):
                    continue
                similarity = jaccard(known, ours)
                if similarity >= NEAR and (best is None or similarity > best.similarity):
                    best = Known(source, text, similarity)
        return best


def words_of(text: str) -> list[str]:
    """The words of a text in order, as written; of a possessive the word that possesses."""
    return [re.sub(r"['’]s$", "", word) for word in _WORD.findall(text)]
