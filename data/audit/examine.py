"""One stretch of a data set, looked at record by record; what two processes do side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qat.data.audit.contract import Contract
from qat.data.audit.findings import Place
from qat.data.audit.replies import Demands, Replies, recorded_replies
from qat.data.audit.rows import Rows
from qat.data.audit.tally import Tally, digest, pack
from qat.data.duplicates import normalise_turn, user_turns
from qat.data.forms import Form
from qat.data.load import read_entry, to_line
from qat.data.records import Entry
from qat.data.schema import Conversation, Persona

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Settings:
    """What an audit is made with; what is None is not looked at.

    Attributes:
        persona: Who will be served.
        max_length: Longest training row, in tokens.
        tokenizer: The base model's, with the chat template of training and serving.
        demands: What the suites demand of a reply, and what they ask.
        duplicates: Whether repeated and nearly equal turns, replies and conversations are looked for.
        accept: Codes of findings that do not forbid training.
    """

    persona: Persona
    max_length: int
    tokenizer: PreTrainedTokenizerBase | None = None
    demands: Demands | None = None
    duplicates: bool = True
    accept: frozenset[str] = frozenset()


class Examiner:
    """Counts and finds in conversations, one after the other.

    Args:
        settings: What is looked at.
        form: Of the records that `read` gets.
        stems: For each file of the source, what ids of its records begin with.
    """

    def __init__(self, settings: Settings, form: Form = "openai", stems: Sequence[str] = ()) -> None:
        self._form: Form = form
        self._stems = stems
        self._contract = Contract(settings.persona)
        self._replies = None if settings.demands is None else Replies(settings.demands)
        self._rows = None if settings.tokenizer is None else Rows(settings.tokenizer, settings.max_length)
        self._duplicates = settings.duplicates

    def read(self, entries: Sequence[Entry]) -> Tally:
        """Look at records of a source."""
        tally = Tally()
        for entry in entries:
            conversation, faults, unread = read_entry(entry, self._form, stem=self._stems[entry.file])
            tally.numbers["records"] += 1
            tally.numbers["bytes"] += len(entry.raw) + 1 if isinstance(entry.raw, bytes) else 0
            tally.tables["unread"].update(unread)
            if conversation is None:
                place = Place(entry.file, entry.number, "")
                tally.numbers["unsound"] += 1
                for fault in faults:
                    tally.groups.add("schema", place, fault)
            else:
                self.look(conversation, Place(entry.file, entry.number, conversation["id"]), tally)
        return tally

    def look(self, conversation: Conversation, place: Place, tally: Tally) -> None:
        """Look at one sound conversation."""
        tally.places.append(pack(place))
        tally.ids.append(digest(conversation["id"]))
        tally.tables["categories"][conversation["category"]] += 1
        tally.histograms["messages"][len(conversation["messages"])] += 1
        self._contract.check(conversation, place, tally)
        if self._replies is not None:
            self._replies.check(conversation, place, tally)
        if self._duplicates:
            tally.bodies.append(digest(to_line({**conversation, "id": "", "category": ""})))
            tally.turns += [normalise_turn(turn) for turn in user_turns(conversation)]
            said = (normalise_turn(reply.text) for reply in recorded_replies(conversation["messages"]))
            tally.replies += [text for text in said if text]
            tally.talks.append(_talk(conversation))
        if self._rows is not None:
            self._rows.check(conversation, place, tally)


def _talk(conversation: Conversation) -> str:
    """All that is said, called and returned in a conversation, normalised."""
    parts = []
    for message in conversation["messages"]:
        if message["role"] == "system":
            continue
        parts.append(message["content"])
        for call in message.get("tool_calls", ()):
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            parts.append(f"{call['function']['name']} {arguments}")
    return normalise_turn(" ".join(parts))
