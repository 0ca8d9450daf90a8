"""Every reply of the data as the suite would judge it; the suite's questions and reference answers looked for in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from qat.data.audit.findings import Place
from qat.data.audit.tally import Tally
from qat.data.duplicates import OWN_FROM, NearIndex, normalise_turn, user_turns
from qat.data.schema import Conversation, Message

_LEAST_WORDS = 4
"""A question of fewer words ("thank you very much") belongs to nobody."""
_SHOWN_CHARACTERS = 200
_BELOW_ONE = 0.9999
"""Two texts of the same 4-grams need not be the same text."""


class Demands(Protocol):
    """What suites demand of every reply (`qat.behavior.demands`)."""

    @property
    def suites(self) -> tuple[str, ...]:
        """Names of the suites."""

    @property
    def checks(self) -> tuple[tuple[str, str], ...]:
        """Name and parameters (JSON) of every check."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Checks that no recorded reply can be held to."""

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """Case and question of every case."""

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """Case and reference answer of every case that has one."""

    def judge(
        self,
        produced: Sequence[Mapping[str, Any]],
        context: Sequence[Mapping[str, Any]],
        tool_results: Sequence[str],
        tools: Sequence[Mapping[str, Any]],
    ) -> list[tuple[str, str]]:
        """Name and finding of every check that a reply fails."""

    def language(self, text: str) -> str | None:
        """The language of a text; None where it says too little."""

    def words(self, text: str) -> int:
        """How many words a text has."""


class RecordedReply(NamedTuple):
    """All that the assistant says and does between two turns of the user.

    Attributes:
        start: Position of the first of its messages.
        produced: The assistant's messages.
        context: The messages before.
        tool_results: What the tools returned within it.
    """

    start: int
    produced: list[Message]
    context: list[Message]
    tool_results: list[str]

    @property
    def text(self) -> str:
        """All that is said in it."""
        return " ".join(message["content"] for message in self.produced if message["content"])


def recorded_replies(messages: Sequence[Message]) -> Iterator[RecordedReply]:
    """The replies of a conversation, each with what the assistant had to go by."""
    start = 0
    while start < len(messages):
        if messages[start]["role"] in ("system", "user"):
            start += 1
            continue
        end = start
        while end < len(messages) and messages[end]["role"] in ("assistant", "tool"):
            end += 1
        part = messages[start:end]
        yield RecordedReply(
            start,
            [message for message in part if message["role"] == "assistant"],
            list(messages[:start]),
            [message["content"] for message in part if message["role"] == "tool"],
        )
        start = end


class Replies:
    """Judges replies and looks for the suites' questions and reference answers."""

    def __init__(self, demands: Demands) -> None:
        self._demands = demands
        asked = {normalise_turn(text): case for case, text in demands.turns}
        self._asked = _Known({turn: case for turn, case in asked.items() if demands.words(turn) >= _LEAST_WORDS})
        answers = {normalise_turn(text): case for case, text in demands.references}
        self._answers = _Known({text: case for text, case in answers.items() if len(text) >= OWN_FROM})

    def check(self, conversation: Conversation, place: Place, tally: Tally) -> None:
        """Judge the replies of one conversation and count words and languages."""
        tools = conversation.get("tools", [])
        for reply in recorded_replies(conversation["messages"]):
            tally.numbers["replies"] += 1
            failures = self._demands.judge(reply.produced, reply.context, reply.tool_results, tools)
            tally.numbers["replies_failing"] += bool(failures)
            for name, detail in failures:
                tally.groups.add(name, place, f"messages[{reply.start}] {detail}", subject="reply")
            if text := reply.text:
                tally.histograms["reply_words"][self._demands.words(text)] += 1
                tally.tables["reply_languages"][self._demands.language(text) or "unknown"] += 1
                if found := self._answers.nearest(normalise_turn(text)):
                    detail = f"messages[{reply.start}] is like the reference of case {found[0]} ({found[1]:.2f})"
                    tally.groups.add("reference_leak", place, detail)
        for turn in user_turns(conversation):
            tally.tables["user_languages"][self._demands.language(turn) or "unknown"] += 1
            if found := self._asked.nearest(normalise_turn(turn)):
                self._add_leak(turn, *found, place, tally)

    def _add_leak(self, turn: str, case: str, similarity: float, place: Place, tally: Tally) -> None:
        if similarity == 1.0:
            tally.groups.add("leak", place, f"{_beginning(turn)!r} is case {case}")
        else:
            tally.groups.add("near_leak", place, f"{_beginning(turn)!r} is like case {case} ({similarity:.2f})")


class _Known:
    """Texts of a suite, in which those of the data are looked up.

    Args:
        cases: Normalised text to the case that it belongs to.
    """

    def __init__(self, cases: Mapping[str, str]) -> None:
        self._cases = cases
        self._texts = list(cases)
        self._near = NearIndex(self._texts)

    def nearest(self, key: str) -> tuple[str, float] | None:
        """Case and similarity of the text that is most like a normalised one; 1 only for the same text."""
        if key in self._cases:
            return self._cases[key], 1.0
        found = self._near.nearest(key)
        return None if found is None else (self._cases[self._texts[found[0]]], min(found[1], _BELOW_ONE))


def _beginning(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
