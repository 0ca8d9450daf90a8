"""Equal and nearly equal texts (user turns, replies, whole conversations), within one set and between two.

Two texts are equal when they are so after `normalise_turn` (case, punctuation and white space do not count), and
nearly equal when the Jaccard similarity of their sets of character 4-grams reaches a threshold. All pairs are found,
none by chance: the prefix filter of Chaudhuri, Ganti and Kaushik (ICDE 2006) only leaves out pairs that cannot reach
it. Sets too large for that are for `minhash`. A family is what such pairs hold together, link by link.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import regex
from numpy.typing import NDArray

NEAR = 0.8
"""Jaccard similarity from which two turns count as nearly equal."""

OWN_FROM = 20
"""Characters from which a reply is somebody's own; shorter ones ("Your reminder is set") are rightly given often."""

_GRAM = 4


class Pair(NamedTuple):
    """Two positions of a list and the Jaccard similarity of what stands there, in [0, 1]."""

    first: int
    second: int
    similarity: float


class Leak(NamedTuple):
    """A held-out user turn that training has seen."""

    training_id: str
    held_out_id: str
    turn: str


def normalise_turn(text: str) -> str:
    """Bring a turn into the form in which turns are compared: NFKC, case folded, only letters, marks and digits."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(regex.findall(r"[\p{L}\p{M}\p{N}]+", folded))


def user_turns(conversation: Mapping[str, Any]) -> list[str]:
    """The contents of the user messages, in order; also of a suite's case record."""
    return [message["content"] for message in conversation["messages"] if message["role"] == "user"]


class Families:
    """Positions held together by pairs, link by link (union by the lower position, paths halved).

    Args:
        count: Of the positions; each begins as a family of its own.
    """

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def join(self, first: int, second: int) -> None:
        """Make one family of two positions'."""
        mine, other = self._root(first), self._root(second)
        self._parents[max(mine, other)] = min(mine, other)

    def together(self, first: int, second: int) -> bool:
        """Whether two positions are of one family."""
        return self._root(first) == self._root(second)

    def _root(self, position: int) -> int:
        parents = self._parents
        while (parent := parents[position]) != position:
            parents[position] = parents[parent]
            position = parent
        return position

    def roots(self) -> NDArray[np.intp]:
        """The lowest position of each one's family, (count,)."""
        roots = np.array(self._parents, np.intp)
        while not np.array_equal(further := roots[roots], roots):
            roots = further
        return roots


def near_pairs(turns: Sequence[str], threshold: float = NEAR) -> list[Pair]:
    """Find all pairs of distinct normalised turns that are nearly equal.

    Args:
        turns: Turns, normalised and distinct.
        threshold: Least Jaccard similarity, in (0, 1].

    Returns:
        The pairs with `first < second` by position, most similar first.
    """
    return sorted(each_pair(turns, threshold), key=lambda pair: (-pair.similarity, pair.first, pair.second))


def each_pair(turns: Sequence[str], threshold: float = NEAR, families: Families | None = None) -> Iterator[Pair]:
    """The pairs of `near_pairs`, one after the other, in the order of the turns' lengths.

    Args:
        turns: Turns, normalised and distinct.
        threshold: Least Jaccard similarity, in (0, 1].
        families: Joined by each pair; a pair of one family is left out, as it links nothing.
    """
    sets = [grams(turn) for turn in turns]
    frequency = Counter(gram for each in sets for gram in each)
    ordered = [_rare_first(each, frequency) for each in sets]
    index: dict[str, list[int]] = defaultdict(list)
    for second in sorted(range(len(turns)), key=lambda position: (len(sets[position]), position)):
        size = len(sets[second])
        prefix = ordered[second][: _prefix_length(size, threshold)]
        for first in {position for gram in prefix for position in index[gram]}:
            if len(sets[first]) < threshold * size or (families is not None and families.together(first, second)):
                continue
            similarity = jaccard(sets[first], sets[second])
            if similarity >= threshold:
                if families is not None:
                    families.join(first, second)
                yield Pair(min(first, second), max(first, second), similarity)
        for gram in prefix:
            index[gram].append(second)


class NearIndex:
    """A fixed set of turns, such as a suite's questions, in which others are looked up.

    Args:
        turns: Normalised turns.
        threshold: Least Jaccard similarity, in (0, 1].
    """

    def __init__(self, turns: Sequence[str], threshold: float = NEAR) -> None:
        self._threshold = threshold
        self._sets = [grams(turn) for turn in turns]
        self._frequency = Counter(gram for each in self._sets for gram in each)
        self._index: dict[str, list[int]] = defaultdict(list)
        for position, each in enumerate(self._sets):
            for gram in _rare_first(each, self._frequency)[: _prefix_length(len(each), threshold)]:
                self._index[gram].append(position)

    def nearest(self, turn: str) -> tuple[int, float] | None:
        """The position and similarity of the turn that is most like a normalised one; None where none is near."""
        mine = grams(turn)
        prefix = _rare_first(mine, self._frequency)[: _prefix_length(len(mine), self._threshold)]
        found = {position for gram in prefix for position in self._index.get(gram, ())}
        best = max(((jaccard(mine, self._sets[position]), -position) for position in found), default=(0.0, 0))
        return (-best[1], best[0]) if best[0] >= self._threshold else None


def _rare_first(each: frozenset[str], frequency: Mapping[str, int]) -> list[str]:
    # A pair that reaches the threshold shares one of the first |A| - ceil(t |A|) + 1 grams of each side, whatever the
    # order; with the rare ones first, few others share them by chance.
    return sorted(each, key=lambda gram: (frequency.get(gram, 0), gram))


def _prefix_length(size: int, threshold: float) -> int:
    return size - math.ceil(threshold * size) + 1


def grams(turn: str) -> frozenset[str]:
    """The character 4-grams of a normalised turn, its edges marked by a space."""
    padded = f" {turn} "
    return frozenset(padded[start : start + _GRAM] for start in range(max(1, len(padded) - _GRAM + 1)))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Size of the intersection by size of the union."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def find_leaks(training: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]]) -> list[Leak]:
    """Find user turns of held-out conversations or cases that also stand in training.

    Args:
        training: Records with `id` and `messages`.
        held_out: Records with `id` and `messages`.

    Returns:
        One leak per held-out turn, naming the first training conversation that holds it.
    """
    seen: dict[str, str] = {}
    for conversation in training:
        for turn in user_turns(conversation):
            seen.setdefault(normalise_turn(turn), conversation["id"])
    return [
        Leak(seen[key], record["id"], turn)
        for record in held_out
        for turn in user_turns(record)
        if (key := normalise_turn(turn)) in seen
    ]
