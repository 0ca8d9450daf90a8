r"""From a conversation to token ids and labels, by the tokenizer's own chat template.

What is supervised: of every assistant turn exactly the tokens that the served model has to write, from the first one
after the generation prompt to the end-of-turn token, which it must learn to write in order to stop. Two neighbours are
often supervised by mistake and are not here:

* The generation prompt. With `enable_thinking=False` Nemotron's template ends the prompt with
  `<|im_start|>assistant\n<think></think>`: the server writes the empty think block, never the model, so it carries no
  label, whatever the template's own markers say.
* What the template puts behind the end-of-turn token (`\n`): the server has stopped before it.

Where the turns stand is found by rendering prefixes: the prompt of a turn is `messages[:i]` with the generation
prompt, the turn ends where `messages[:i + 1]` ends. A template with `{% generation %}` markers says the end itself.
Both need the row to be what the server saw: each prompt must be a prefix of the whole row, in characters and in
tokens. Templates that rewrite history (Nemotron drops earlier thinking, Qwen3 drops earlier empty think blocks) break
that for conversations of several turns: `render` refuses them and names the
turn, `render_rows` falls back to one row per reply, each exactly as it is served.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.data.schema import Conversation, Message, Tool
from qat.data.templates import HTML_QUOTE, require_bounded
from qat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not supervised (PyTorch's cross entropy ignores it)."""

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    """One training row.

    Attributes:
        input_ids: Token ids, at most `max_length`.
        labels: Same length; the id where it is supervised, else `IGNORED`. Not shifted.
        dropped: Tokens cut off at the end because of `max_length`.
    """

    input_ids: list[int]
    labels: list[int]
    dropped: int = 0


class HistoryRewritten(UserError):
    """The template renders an earlier turn otherwise than the server saw it; one row per reply is still exact."""


class _Span(NamedTuple):
    start: int
    end: int


def render(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> Rendered:
    """Render a conversation as one row with every assistant turn supervised.

    Args:
        conversation: The conversation, arguments as mappings.
        tokenizer: A tokenizer with a chat template.
        max_length: Longest row in tokens; what is beyond is cut and counted in `dropped`.

    Returns:
        The row.

    Raises:
        HistoryRewritten: The template changes an earlier turn when later ones follow.
        UserError: No template, one that does not end or is no Jinja, the template refuses the conversation or leaves
            part of it out, a turn without end-of-turn token, or no supervised token (left).
    """
    messages = conversation["messages"]
    turns = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    source = _Source(conversation, tokenizer)
    spans = source.marked_spans(turns) if source.marked else source.prefix_spans(messages, turns)
    return _row(conversation, source.ids(messages), spans, max_length)


def render_replies(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> list[Rendered]:
    """Render one row per assistant turn: what the server sees before it, and only this turn supervised.

    For templates that rewrite earlier turns, where `render` refuses; costs the repetition of the history.

    Args:
        conversation: The conversation, arguments as mappings.
        tokenizer: A tokenizer with a chat template.
        max_length: Longest row in tokens; what is beyond is cut and counted in `dropped`.

    Returns:
        The rows, in the order of the turns.

    Raises:
        UserError: As for `render`, save that earlier turns may change.
    """
    rows = []
    for position, message in enumerate(conversation["messages"]):
        if message["role"] == "assistant":
            part = conversation["messages"][: position + 1]
            source = _Source(conversation, tokenizer)
            rows.append(_row(conversation, source.ids(part), source.prefix_spans(part, [position]), max_length))
    if not rows:
        raise UserError(
            "The conversation has no assistant turn to learn from.", where=f"conversation {conversation['id']!r}"
        )
    return rows


def render_rows(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> list[Rendered]:
    """Render a conversation as one row where its template keeps history, else as one row per reply.

    This is what training wants: exact under every template, and without repetition where none is needed. The audit
    counts the conversations that take several rows.

    Args:
        conversation: The conversation, arguments as mappings.
        tokenizer: A tokenizer with a chat template.
        max_length: Longest row in tokens; what is beyond is cut and counted in `dropped`.

    Returns:
        At least one row.

    Raises:
        UserError: As for `render_replies`.
    """
    try:
        return [render(conversation, tokenizer, max_length=max_length)]
    except HistoryRewritten:
        return render_replies(conversation, tokenizer, max_length=max_length)


def _row(conversation: Conversation, ids: list[int], spans: Sequence[_Span], max_length: int | None) -> Rendered:
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    length = len(ids) if max_length is None else min(max_length, len(ids))
    if all(label == IGNORED for label in labels[:length]):
        cut = f" within the first {length} of {len(ids)} tokens" if length < len(ids) else ""
        raise UserError(
            f"The conversation has no supervised token{cut}.",
            where=f"conversation {conversation['id']!r}",
            remedy="raise data.max_length, or shorten the system prompt and the tools"
            if cut
            else "add an assistant turn",
        )
    return Rendered(ids[:length], labels[:length], len(ids) - length)


class _Source:
    """Renders prefixes of one conversation and tokenizes them, each once."""

    def __init__(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
        self._conversation = conversation
        self._tokenizer = tokenizer
        self._where = f"conversation {conversation['id']!r}"
        self._tools: list[Tool] | None = conversation.get("tools") or None
        self._texts: dict[tuple[int, bool], str] = {}
        self._ids: dict[int, list[int]] = {}
        self._special = _special_tokens(tokenizer, len(tokenizer))
        try:
            template = tokenizer.get_chat_template(None, self._tools)
        except ValueError as error:
            raise UserError(
                "The tokenizer has no chat template.", where=str(tokenizer.name_or_path), value=str(error)
            ) from error
        require_bounded(template)
        self.marked = bool(_MARKER.search(template))

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tools=self._tools, enable_thinking=False, **options
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise UserError(
                "The chat template refuses the conversation.",
                where=f"{self._where}, first {len(messages)} messages",
                value=f"{type(error).__name__}: {error}",
                remedy="bring the messages into the form the template wants, or choose another base.chat_template",
            ) from error

    def text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Rendered text of the first messages; `prompt` adds the generation prompt."""
        key = (len(messages), prompt)
        if key not in self._texts:
            self._texts[key] = str(self._apply(messages, tokenize=False, add_generation_prompt=prompt))
        return self._texts[key]

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the first messages; the template has written the special tokens."""
        if len(messages) not in self._ids:
            self._ids[len(messages)] = self._encode(self.text(messages))
        return self._ids[len(messages)]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _tokens_of(self, prefix: str, ids: Sequence[int]) -> int | None:
        """How many of a row's tokens a prefix of its text makes; None where it ends inside a token.

        Tokenizers cut the text at special tokens before anything else, so only the piece after the prefix's last
        special token is tokenized again; its place among the row's tokens follows from counting special tokens.
        """
        starts = [match.start() for match in self._special.pattern.finditer(prefix)]
        places = [index for index, identity in enumerate(ids) if identity in self._special.ids]
        if not starts or len(places) < len(starts):
            first, tail = 0, prefix
        else:
            first, tail = places[len(starts) - 1], prefix[starts[-1] :]
        tail_ids = self._encode(tail)
        count = first + len(tail_ids)
        return count if list(ids[first:count]) == tail_ids else None

    def prefix_spans(self, messages: Sequence[Message], turns: Sequence[int]) -> list[_Span]:
        """Token spans of the turns by rendering prefixes."""
        whole, ids = self.text(messages), self.ids(messages)
        self._require_everything(messages)
        spans = []
        for turn in turns:
            start = self._prompt_length(messages, turn)
            upto = self.text(messages[: turn + 1])
            if not whole.startswith(upto):
                raise self._changed(turn, upto, whole, "once later turns follow")
            # White space behind the end-of-turn token is the template's, not the model's.
            end = self._tokens_of(upto.rstrip(), ids)
            spans.append(self._checked(turn, ids, start, start if end is None else end))
        return spans

    def marked_spans(self, turns: Sequence[int]) -> list[_Span]:
        """Token spans of the turns by the template's markers, less generation prompt and trailing white space."""
        messages = self._conversation["messages"]
        self._require_everything(messages)
        marked = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, runs = marked["input_ids"], _runs(marked["assistant_masks"])
        if ids != self.ids(messages) or len(runs) != len(turns):
            raise UserError(
                f"The template's generation markers give {len(runs)} stretches for {len(turns)} assistant turns.",
                where=self._where,
                remedy="put every assistant turn of the template between {% generation %} and {% endgeneration %}",
            )
        spans = []
        for turn, run in zip(turns, runs, strict=True):
            end = run.end
            while (
                end > run.start
                and ids[end - 1] not in self._special.ids
                and not self._tokenizer.decode([ids[end - 1]]).strip()
            ):
                end -= 1
            spans.append(self._checked(turn, ids, max(run.start, self._prompt_length(messages, turn)), end))
        return spans

    def _require_everything(self, messages: Sequence[Message]) -> None:
        """Refuse a template that leaves something out in silence, as plain ChatML does with tools."""
        whole = self.text(messages)
        for tool in self._tools or ():
            if tool["function"]["name"] not in whole:
                raise self._left_out(f"the tool {tool['function']['name']!r}")
        for position, message in enumerate(messages):
            if not any(form in whole for form in _forms(message["content"].strip())):
                raise self._left_out(f"the content of messages[{position}] ({message['role']})")
        if HTML_QUOTE in whole and HTML_QUOTE not in json.dumps(self._conversation):
            raise UserError(
                f"The chat template writes {HTML_QUOTE} for quotes: neither the server's parser nor anyone reads that.",
                where=self._where,
                remedy="take `|safe` out of the template, or choose another base.chat_template",
            )

    def _left_out(self, what: str) -> UserError:
        return UserError(
            f"The chat template leaves out {what}.",
            where=self._where,
            remedy="choose a base.chat_template that renders it",
        )

    def _prompt_length(self, messages: Sequence[Message], turn: int) -> int:
        """Tokens of the prompt that the server builds for a turn; the row must begin with it, text and tokens."""
        whole, prompt = self.text(messages), self.text(messages[:turn], prompt=True)
        if not whole.startswith(prompt):
            raise self._changed(turn, prompt, whole, "against the prompt that the server builds for it")
        count = self._tokens_of(prompt, self.ids(messages))
        if count is None:
            raise UserError(
                f"messages[{turn}] begins inside a token: the served prompt is tokenized otherwise than the row.",
                where=self._where,
                value=f"…{prompt[-20:]!r} + {whole[len(prompt) : len(prompt) + 20]!r}…",
                remedy="let the reply not begin with white space, or end the template's generation prompt elsewhere",
            )
        return count

    def _checked(self, turn: int, ids: Sequence[int], start: int, end: int) -> _Span:
        if end <= start or ids[end - 1] not in self._special.ids:
            last = self._tokenizer.decode(list(ids[max(start, end - 3) : end]))
            raise UserError(
                f"messages[{turn}] does not end with a special token: the model would never learn to stop.",
                where=self._where,
                value=last,
                remedy="the template must close an assistant turn with a special token such as <|im_end|>",
            )
        message = self._conversation["messages"][turn]
        said = _packed(self._tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False))
        for call in message.get("tool_calls", ()):
            if any(_packed(name) not in said for name in (call["function"]["name"], *call["function"]["arguments"])):
                raise self._left_out(f"the call of {call['function']['name']!r} in messages[{turn}]")
        if _packed(message["content"]) not in said:
            raise self._left_out(f"the content of messages[{turn}] from the reply")
        return _Span(start, end)

    def _changed(self, turn: int, expected: str, whole: str, when: str) -> HistoryRewritten:
        position = next(
            (index for index, (a, b) in enumerate(zip(expected, whole, strict=False)) if a != b),
            min(len(expected), len(whole)),
        )
        window = slice(max(0, position - 30), position + 30)
        return HistoryRewritten(
            f"The chat template renders the conversation differently {when}: messages[{turn}].",
            where=self._where,
            value=f"served …{expected[window]!r}…, in the row …{whole[window]!r}…",
            remedy="use one row per reply, or leave reasoning out of the replies",
        )


def _forms(content: str) -> tuple[str, str, str]:
    """The content as it is and inside a JSON string, which is how some templates write tool results."""
    return content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1]


def _packed(text: str) -> str:
    """Without white space, which templates trim and some decoders add."""
    return "".join(text.split())


class _Special(NamedTuple):
    ids: frozenset[int]
    pattern: re.Pattern[str]


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> _Special:
    """The special tokens, as ids and as one pattern; `size` (of the vocabulary) renews them when tokens are added."""
    del size
    added = {identity: token.content for identity, token in tokenizer.added_tokens_decoder.items() if token.special}
    added |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    longest_first = sorted(added.values(), key=len, reverse=True)
    return _Special(frozenset(added), re.compile("|".join(map(re.escape, longest_first)) or "(?!)"))


def _runs(mask: Sequence[int]) -> list[_Span]:
    """Maximal stretches of ones."""
    edges = [
        index
        for index in range(len(mask) + 1)
        if (mask[index - 1] if index else 0) != (mask[index] if index < len(mask) else 0)
    ]
    return [_Span(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]
