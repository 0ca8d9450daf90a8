"""The conversations as training rows: lengths, supervised tokens, what is cut, what the chat template changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import regex

from qat.data.audit.findings import Place
from qat.data.audit.tally import Tally
from qat.data.render import IGNORED, Rendered, render_rows
from qat.data.schema import Conversation
from qat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Turns(NamedTuple):
    """Assistant turns of a row by what the length leaves of them."""

    whole: int
    cut: int
    lost: int


def turns_within(labels: Sequence[int], max_length: int) -> Turns:
    """Count the supervised stretches of a row that end, are cut or begin beyond `max_length` tokens."""
    whole = cut = lost = 0
    for start, end in _stretches(labels):
        whole += end <= max_length
        cut += start < max_length < end
        lost += start >= max_length
    return Turns(whole, cut, lost)


def _stretches(labels: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = None
    for position, label in enumerate(labels):
        if (label == IGNORED) == (start is None):
            continue
        if start is None:
            start = position
        else:
            yield start, position
            start = None
    if start is not None:
        yield start, len(labels)


class Rows:
    """Renders conversations and counts their tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._special = regex.compile("|".join(map(regex.escape, longest_first)) or "(?!)")

    def check(self, conversation: Conversation, place: Place, tally: Tally) -> None:
        """Render one conversation as training does and count what is learnt from it."""
        for position, message in enumerate(conversation["messages"]):
            # A control token written inside a message is tokenized as one, and moves where turns begin and end.
            if found := sorted(set(self._special.findall(message["content"]))):
                tally.groups.add("special_token", place, f"messages[{position}]: {', '.join(found)}")
        try:
            rows = render_rows(conversation, self._tokenizer)
        except UserError as error:
            value = error.value if isinstance(error.value, str) else ""
            tally.groups.add("template", place, f"{error.what} {value}".rstrip())
            return
        if len(rows) > 1:
            tally.groups.add("history", place)
        self._count(rows, conversation["category"], place, tally)

    def _count(self, rows: Sequence[Rendered], category: str, place: Place, tally: Tally) -> None:
        limit = self._max_length
        table = tally.tables[f"rows:{category}"]
        tokens = supervised = 0
        for row in rows:
            kept = row.labels[:limit]
            learnt = len(kept) - kept.count(IGNORED)
            turns = turns_within(row.labels, limit)
            tokens, supervised = tokens + len(kept), supervised + learnt
            tally.histograms["lengths"][len(row.input_ids)] += 1
            table.update(rows=1, cut_rows=len(row.input_ids) > limit, cut_turns=turns.cut, lost_turns=turns.lost)
            if turns.cut or turns.lost:
                detail = f"{turns.cut} cut, {turns.lost} lost of {sum(turns)}, {len(row.input_ids)} tokens"
                tally.groups.add("truncated", place, detail)
            if not learnt:
                tally.groups.add("untrained", place, f"{len(row.input_ids)} tokens")
        table.update(tokens=tokens, supervised=supervised)
        tally.histograms["supervised_percent"][100 * supervised // tokens if tokens else 0] += 1
