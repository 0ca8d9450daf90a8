"""How long the rows of a recipe's data are, before anything is loaded.

Conversations come from the recipe's file or from the generator. Where the base's tokenizer and chat template are here,
every row is rendered and counted; where they are not, bytes are counted, and what a template puts around a message is a
constant. Neither needs torch or transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.errors import UserError

if TYPE_CHECKING:
    from qat.data.schema import Persona
    from qat.recipe.schema import Recipe

BYTES_PER_TOKEN = 3.6
"""Of this package's prompts, tools and turns: 3.4 to 4.3 with Qwen3's vocabulary, 3.1 to 3.8 with Phi-3's."""
MESSAGE_TOKENS = 5
"""What a ChatML-like template puts around one message: `<|im_start|>`, role, line feed, `<|im_end|>`, line feed."""
_TOGETHER = 500
"""Rows that one process of the template renders."""
_SMALL_WORLD = "annie_tiny"
"""The persona whose turns stand in where the generator does not know the recipe's."""


class Row(NamedTuple):
    """One conversation: tokens in all, and those that an assistant wrote."""

    tokens: int
    replies: int


class Rows(NamedTuple):
    """The rows of a recipe.

    Attributes:
        train: Conversations of fine-tuning.
        validation: Held out from them.
        lessons: What is distilled on.
        lessons_validation: What chooses the step of distillation.
        held_out: What the divergence is measured on.
        how: In words, where the lengths come from.
    """

    train: list[Row]
    validation: list[Row]
    lessons: list[Row]
    lessons_validation: list[Row]
    held_out: list[Row]
    how: str


def estimate_rows(recipe: Recipe, folder: Path | None) -> Rows:
    """Count the rows of a recipe.

    Args:
        recipe: Data, persona and prompts.
        folder: Of the base, for its tokenizer; None or without one: bytes are counted.

    Raises:
        UserError: The data is missing, or holds a record that is no conversation.
    """
    from qat.data.schema import load_persona

    persona = load_persona(recipe.persona)
    measure, how = _measure(recipe, folder, persona)
    if recipe.data.count is None:
        everything = measure(_read(Path(recipe.data.source)))
        if not everything:
            raise UserError("The data holds no conversation.", where=recipe.data.source)
        shuffled, held_out = everything, None
        how = f"conversations of {recipe.data.source}, {how}"
    else:
        source = _generator(persona)
        shuffled = measure(source(recipe.data.count, recipe.data.seed))
        held_out = measure(source(_held_out_count(), recipe.data.seed, held_out=True))
        how = f"{source.words}, {how}"
    size = min(len(shuffled) - 1, max(1, round(len(shuffled) * recipe.data.validation_fraction)))
    train, validation = shuffled[size:], shuffled[:size]
    lessons, chooses = train, validation
    prompts = recipe.train.distill.prompts
    if prompts is not None:
        lessons = measure(source(prompts.count, recipe.data.seed + 1, joined=prompts.joined))
        if prompts.validation is not None:
            chooses = measure(source(prompts.validation, recipe.data.seed + 2, joined=prompts.joined))
    return Rows(train, validation, lessons, chooses, held_out or validation, how)


def _held_out_count() -> int:
    from qat.chain import HELD_OUT_COUNT

    return HELD_OUT_COUNT


def _measure(recipe: Recipe, folder: Path | None, persona: Persona) -> tuple[_Measure, str]:
    """How to count rows with what is here, and that in words."""
    template = _template(recipe, folder)
    if folder is not None and template is not None and (folder / "tokenizer.json").is_file():
        try:
            from tokenizers import Tokenizer
        except ImportError:  # it comes with the training extra
            pass
        else:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            return _Rendered(persona, recipe.data.max_length, tokenizer, template), "rendered by the base's template"
    words = f"the base's tokenizer is not here: {BYTES_PER_TOKEN} bytes a token"
    return _Measure(persona, recipe.data.max_length), words


def _template(recipe: Recipe, folder: Path | None) -> str | None:
    if recipe.base.chat_template is not None:
        return Path(recipe.base.chat_template).read_text(encoding="utf-8")
    if folder is None:
        return None
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


class _Generator:
    """The generator with its words for the report."""

    def __init__(self, persona: Persona, words: str) -> None:
        self._persona, self.words = persona, words

    def __call__(self, count: int, seed: int, **further: Any) -> list[dict[str, Any]]:
        from qat.data.generate import conversations

        return conversations(self._persona, count, seed, **further)


def _generator(persona: Persona) -> _Generator:
    from qat.data.generate import conversations
    from qat.data.schema import load_persona

    try:
        conversations(persona, 1, 0)
    except UserError:
        words = f"the generator does not know {persona.name}: turns of {_SMALL_WORLD} under {persona.name}'s prompt"
        return _Generator(load_persona(_SMALL_WORLD), words)
    return _Generator(persona, "generated conversations")


class _Measure:
    """Counts rows by their bytes, under the recipe's prompt and tools."""

    def __init__(self, persona: Persona, limit: int) -> None:
        self._persona, self._limit = persona, limit

    def __call__(self, records: Iterable[Mapping[str, Any]]) -> list[Row]:
        """Tokens of each record."""
        messages = [self._with_prompt(record) for record in records]
        replies = [
            sum(self._count([_spoken(message)])[0] + 1 for message in row if message["role"] == "assistant")
            for row in messages
        ]
        return [
            Row(min(total, self._limit), min(reply, self._limit))
            for total, reply in zip(self._totals(messages), replies, strict=True)
        ]

    def _with_prompt(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        rest = [message for message in record["messages"] if message["role"] != "system"]
        return [{"role": "system", "content": self._persona.system_prompt}, *rest]

    def _totals(self, rows: list[list[dict[str, Any]]]) -> list[int]:
        (tools,) = self._count([json.dumps(self._persona.tools, ensure_ascii=False)])
        return [tools + sum(self._count([_spoken(message)])[0] + MESSAGE_TOKENS for message in row) for row in rows]

    def _count(self, texts: list[str]) -> list[int]:
        return [round(len(text.encode()) / BYTES_PER_TOKEN) for text in texts]


class _Rendered(_Measure):
    """Counts rows as the base's own template and tokenizer make them."""

    def __init__(self, persona: Persona, limit: int, tokenizer: Any, template: str) -> None:
        super().__init__(persona, limit)
        self._tokenizer, self._template = tokenizer, template

    def _totals(self, rows: list[list[dict[str, Any]]]) -> list[int]:
        from qat.data.templates import render_template

        requests = [
            {"messages": [_parsed(message) for message in row], "tools": self._persona.tools, "enable_thinking": False}
            for row in rows
        ]
        texts = []
        for start in range(0, len(requests), _TOGETHER):
            for rendering in render_template(self._template, requests[start : start + _TOGETHER]):
                if rendering.error:
                    raise UserError("The base's chat template refuses a conversation.", value=rendering.error)
                texts.append(rendering.text)
        return self._count(texts)

    def _count(self, texts: list[str]) -> list[int]:
        return [len(found.ids) for found in self._tokenizer.encode_batch(texts, add_special_tokens=False)]


def _spoken(message: dict[str, Any]) -> str:
    """A message's text and calls."""
    calls = [json.dumps(call.get("function"), ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "".join([message.get("content") or "", *calls])


def _parsed(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its calls' arguments as mappings, as templates take them."""
    calls = []
    for call in message.get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        calls.append({**call, "function": {**call["function"], "arguments": parsed}})
    return {**message, "tool_calls": calls} if calls else message


def _read(path: Path) -> Iterable[Mapping[str, Any]]:
    """The conversations of a file or folder; the first one that is none ends it, and the audit says the rest."""
    from qat.data.load import form_of, read_entry
    from qat.data.records import Source

    source = Source(path)
    form, stems = form_of(source), source.stems
    for entry in source:
        conversation, faults, _ = read_entry(entry, form, stem=stems[entry.file])
        if conversation is None:
            raise UserError(
                "The data holds a record that is no conversation.",
                where=f"{path}, {source.place(entry.file, entry.number)}",
                value=faults[0],
                remedy="`qat data audit` says what is wrong with each record",
            )
        yield conversation
