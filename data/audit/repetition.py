"""What the report says of repeated texts: conversations and replies that teach nothing new, turns without variety."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qat.data.audit.findings import SHOWN, Finding, Place, Show
from qat.data.audit.tally import Tally, unpack
from qat.data.audit.texts import Kinds, TextNumbers, repeats
from qat.data.duplicates import OWN_FROM

LEAST_DISTINCT_SHARE = 0.95
"""Distinct user turns of all user turns."""
MOST_NEAR_SHARE = 0.02
"""Conversations equal or nearly equal to an earlier one, of all."""
MOST_FAMILY_SHARE = 0.03
"""Replies that say nearly the same, of all: a teacher that has fallen into one phrase."""

_LEAST_FAMILY = 10


def repetition_findings(tally: Tally, texts: Kinds | None, show: Show) -> Iterator[Finding]:
    """The warnings; `texts` is None where repetition was not looked for."""
    again = repeats(tally.bodies)
    if again:
        places = tuple(
            (_shown(tally, later, show), f"as {_shown(tally, first, show)}") for later, first in again[:SHOWN]
        )
        message = f"{len(again)} conversations repeat another one word for word"
        yield Finding("repeated", "warning", len(again), message, places)
    if texts is None:
        return
    yield from _near_conversations(tally, texts.talks, len(again), show)
    yield from _few_turns(texts.turns)
    yield from _one_phrase(texts.replies)


def _shown(tally: Tally, position: int, show: Show) -> str:
    return show(Place(*unpack(tally.places[position]), ""))


def _near_conversations(tally: Tally, talks: TextNumbers, word_for_word: int, show: Show) -> Iterator[Finding]:
    if talks.again > word_for_word and talks.again >= MOST_NEAR_SHARE * talks.total:
        places = tuple(
            (_shown(tally, second, show), f"{similarity:.2f} to {_shown(tally, first, show)}")
            for first, second, similarity in talks.near_examples
        )
        share = talks.again / talks.total
        message = f"{talks.again} conversations ({share:.1%}) are equal or nearly equal to an earlier one"
        yield Finding("near_repeated", "warning", talks.again, message, places)


def _few_turns(turns: TextNumbers) -> Iterator[Finding]:
    if turns.distinct < LEAST_DISTINCT_SHARE * turns.total:
        most = ", ".join(f"{turn!r} {count} times" for count, turn in turns.families[:3])
        share = turns.distinct / turns.total
        message = (
            f"only {share:.1%} of the {turns.total} user turns are distinct (most, with what is nearly equal: {most})"
        )
        yield Finding("repeated_turns", "warning", turns.total - turns.distinct, message)


def _one_phrase(replies: TextNumbers) -> Iterator[Finding]:
    least = max(_LEAST_FAMILY, MOST_FAMILY_SHARE * replies.total)
    found = [(count, text) for count, text in replies.families if count >= least and len(text) >= OWN_FROM]
    if found:
        total = sum(count for count, _ in found)
        message = f"{total} of {replies.total} replies ({total / replies.total:.1%}) say nearly the same"
        examples = tuple((f"{count} times", text) for count, text in found)
        yield Finding("repeated_replies", "warning", total, message, examples)


def repetition_numbers(tally: Tally, texts: Kinds) -> dict[str, Any]:
    """The numbers, jsonable."""
    turns = texts.turns
    return {
        "user_turns": {
            "total": turns.total,
            "distinct": turns.distinct,
            "distinct_share": round(turns.distinct / turns.total, 4) if turns.total else 1.0,
            "near_duplicate_turns": turns.near,
            "near_method": _method(turns),
            "families": _families(turns),
            "repeated_conversations": len(repeats(tally.bodies)),
        },
        "repetition": {
            name: {
                "total": numbers.total,
                "distinct": numbers.distinct,
                "near": numbers.near,
                "again": numbers.again,
                "method": _method(numbers),
                "families": _families(numbers),
            }
            for name, numbers in (("replies", texts.replies), ("conversations", texts.talks))
        },
    }


def _method(numbers: TextNumbers) -> str:
    return "every pair" if numbers.exact else "MinHash, confirmed"


def _families(numbers: TextNumbers) -> list[dict[str, Any]]:
    """Those of at least two texts."""
    return [{"count": count, "text": text} for count, text in numbers.families if count > 1]
