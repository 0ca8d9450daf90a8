"""What was counted in some conversations: sums of the same size for ten conversations and for a million.

Only what must be compared across the whole set grows with it: three numbers of eight bytes a conversation, and the
texts, which the reader of the set puts on disk.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from qat.data.audit.findings import Groups, Place

_FILE_BITS = 40


def _counters() -> defaultdict[str, Counter[str]]:
    return defaultdict(Counter)


def _histograms() -> defaultdict[str, Counter[int]]:
    return defaultdict(Counter)


@dataclass
class Tally:
    """Counts of a stretch of conversations.

    Attributes:
        groups: The findings.
        numbers: Plain sums.
        tables: Sums by a word: tools called, categories, languages, and `rows:<category>` for the tokens of one.
        histograms: How often each whole number came: row lengths, words a reply, percent of supervised tokens.
        places: Packed place of every conversation, in order.
        ids: Hash of its id.
        bodies: Hash of its messages and tools.
        turns: Normalised user turns, in order; these and the following are taken out by whoever keeps them.
        replies: Normalised texts of the replies that say something.
        talks: Normalised text of every conversation, without its system prompt.
    """

    groups: Groups = field(default_factory=Groups)
    numbers: Counter[str] = field(default_factory=Counter)
    tables: defaultdict[str, Counter[str]] = field(default_factory=_counters)
    histograms: defaultdict[str, Counter[int]] = field(default_factory=_histograms)
    places: array[int] = field(default_factory=lambda: array("Q"))
    ids: array[int] = field(default_factory=lambda: array("Q"))
    bodies: array[int] = field(default_factory=lambda: array("Q"))
    turns: list[str] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    talks: list[str] = field(default_factory=list)

    def merge(self, later: Tally) -> None:
        """Add what was counted in the conversations that follow."""
        self.groups.merge(later.groups)
        self.numbers.update(later.numbers)
        for name, table in later.tables.items():
            self.tables[name].update(table)
        for name, histogram in later.histograms.items():
            self.histograms[name].update(histogram)
        self.places.extend(later.places)
        self.ids.extend(later.ids)
        self.bodies.extend(later.bodies)
        self.turns.extend(later.turns)
        self.replies.extend(later.replies)
        self.talks.extend(later.talks)


def pack(place: Place) -> int:
    """File and number of a place in one whole number."""
    return place.file << _FILE_BITS | place.number


def unpack(packed: int) -> tuple[int, int]:
    """File and number again."""
    return packed >> _FILE_BITS, packed & ((1 << _FILE_BITS) - 1)


def digest(text: str) -> int:
    """64 bits of a text: among 100,000 texts two differing ones agree with a probability of 3e-10."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
