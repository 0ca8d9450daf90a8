"""Every reply of the data as the suite would judge it, and the suite's questions looked for in the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from qat.data.audit.findings import Place
from qat.data.audit.tally import Tally
from qat.data.duplicates import NearIndex, normalise_turn, user_turns
from qat.data.schema import Conversation, Message

_LEAST_WORDS = 4
"""A question of fewer words ("thank you very much") belongs to nobody."""


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
    """Judges replies and looks for the suites' questions."""

    def __init__(self, demands: Demands) -> None:
        self._demands = demands
        asked = {normalise_turn(text): case for case, text in demands.turns}
        self._asked = {turn: case for turn, case in asked.items() if len(turn.split()) >= _LEAST_WORDS}
        self._turns = list(self._asked)
        self._near = NearIndex(self._turns)

    def check(self, conversation: Conversation, place: Place, tally: Tally) -> None:
        """Judge the replies of one conversation and count words and languages."""
        tools = conversation.get("tools", [])
        for reply in recorded_replies(conversation["messages"]):
            tally.numbers["replies"] += 1
            failures = self._demands.judge(reply.produced, reply.context, reply.tool_results, tools)
            tally.numbers["replies_failing"] += bool(failures)
            for name, detail in failures:
                tally.groups.add(name, place, f"messages[{reply.start}] {detail}", subject="reply")
            text = " ".join(message["content"] for message in reply.produced if message["content"])
            if text:
                tally.histograms["reply_words"][len(text.split())] += 1
                tally.tables["reply_languages"][self._demands.language(text) or "unknown"] += 1
        for turn in user_turns(conversation):
            tally.tables["user_languages"][self._demands.language(turn) or "unknown"] += 1
            self._check_leak(normalise_turn(turn), turn, place, tally)

    def _check_leak(self, key: str, turn: str, place: Place, tally: Tally) -> None:
        if key in self._asked:
            tally.groups.add("leak", place, f"{turn!r} is case {self._asked[key]}")
        elif found := self._near.nearest(key):
            near = self._turns[found[0]]
            tally.groups.add("near_leak", place, f"{turn!r} is like case {self._asked[near]} ({found[1]:.2f})")
