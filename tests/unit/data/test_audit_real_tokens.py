"""The audit's token counts on real conversations, by real tokenizers and templates.

The expectation takes another way: the template is rendered by Jinja alone, the replies are found in the text by the
template's own markup, and the tokens that lie in them by the offsets that the tokenizer gives.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pytest

from qat.data.audit import audit
from qat.data.load import load_conversations
from qat.data.schema import Persona

SETS = {
    "glaive": "llamafactory_demo/glaive_toolcall_en_demo.json",
    "vicuna": "fastchat/dummy_conversation.json",
    "identity": "llamafactory_demo/identity.json",
}
NANO = "chat_templates_llamacpp/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.jinja"
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]


class Markup(NamedTuple):
    """How a template writes a reply: what the server writes before it, and a pattern whose group is the reply."""

    reply: re.Pattern[str]
    row_per_reply: bool = False


CHATML = Markup(re.compile(r"<\|im_start\|>assistant\n<think></think>(.*?<\|im_end\|>)", re.DOTALL))
QWEN3 = Markup(
    re.compile(r"<\|im_start\|>assistant\n<think>\n\n</think>\n\n((?:(?!<\|im_start\|>).)*?<\|im_end\|>)", re.DOTALL),
    True,
)


def rendered(template: str, messages: list[Any], tools: Any) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return str(
        environment.from_string(template).render(
            messages=messages,
            tools=tools,
            enable_thinking=False,
            add_generation_prompt=False,
            bos_token="",
            eos_token="",
        )
    )


def rows_of(
    conversation: Mapping[str, Any], template: str, markup: Markup
) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Text of every row, and where the replies that it trains stand in it."""
    messages, tools = conversation["messages"], conversation.get("tools")
    whole = rendered(template, messages, tools)
    replies = [message for message in messages if message["role"] == "assistant"]
    if not markup.row_per_reply or len(replies) == 1:
        yield whole, [match.span(1) for match in markup.reply.finditer(whole)]
        return
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            text = rendered(template, messages[: position + 1], tools)
            yield text, [[match.span(1) for match in markup.reply.finditer(text)][-1]]


def expected(
    conversations: list[Any], template: str, markup: Markup, encode: Callable[[str], list[tuple[int, int]]], limit: int
) -> tuple[dict[str, Counter[str]], list[int]]:
    """Counts by category, and the percentage of supervised tokens of every conversation."""
    counts: dict[str, Counter[str]] = {}
    percents = []
    for conversation in conversations:
        table, before = counts.setdefault(conversation["category"], Counter()), Counter[str]()
        for text, spans in rows_of(conversation, template, markup):
            offsets = encode(text)
            before["tokens"] += len(offsets[:limit])
            table["rows"] += 1
            table["cut_rows"] += len(offsets) > limit
            for start, end in spans:
                inside = [place for place, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
                before["supervised"] += sum(place < limit for place in inside)
                table["cut_turns"] += inside[0] < limit <= inside[-1]
                table["lost_turns"] += inside[0] >= limit
        table.update(before)
        percents.append(100 * before["supervised"] // before["tokens"])
    return counts, percents


def tokenizer(real: Path, name: str) -> Any:
    """Qwen3's (byte-level), or Phi-3's (SentencePiece with byte fallback) with the control tokens of ChatML added."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name == "qwen3":
        return AutoTokenizer.from_pretrained(real / "qwen3_tokenizer")
    file = real / "tokenizers_fixtures" / "phi-3-mini" / "tokenizer.json"
    made = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": CHATML_TOKENS})
    return made


@pytest.mark.parametrize(
    ("data", "name", "template", "markup", "limit"),
    [
        ("glaive", "qwen3", NANO, CHATML, 512),
        ("glaive", "qwen3", None, QWEN3, 300),
        ("vicuna", "qwen3", NANO, CHATML, 40),
        ("glaive", "phi-3", NANO, CHATML, 512),
        ("identity", "phi-3", NANO, CHATML, 30),
    ],
)
def test_counts_on_real_data(
    real: Path, data: str, name: str, template: str | None, markup: Markup, limit: int
) -> None:
    conversations = load_conversations(real / SETS[data])[-30:]
    for number, each in enumerate(conversations):
        each["category"] = "odd" if number % 2 else "even"
    made = tokenizer(real, name)
    if template is not None:
        made.chat_template = (real / template).read_text("utf-8")
    report = audit(conversations, Persona("p", "", [], {}), made, limit)
    assert not any(finding.code == "template" for finding in report.findings)

    def offsets(text: str) -> list[tuple[int, int]]:
        found = made(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [(start, end) for start, end in found]

    counts, percents = expected(conversations, made.chat_template, markup, offsets, limit)
    table = report.numbers["tokens"]["by_category"]
    keys = ("rows", "tokens", "supervised", "cut_rows", "cut_turns", "lost_turns")
    assert {kind: {key: table[kind][key] for key in keys} for kind in table} == {
        kind: {key: count[key] for key in keys} for kind, count in counts.items()
    }
    total: Counter[str] = sum(counts.values(), Counter())
    assert report.numbers["tokens"]["share"] == round(total["supervised"] / total["tokens"], 4)
    spread = report.numbers["tokens"]["percent_a_conversation"]
    assert (spread["min"], spread["max"]) == (min(percents), max(percents))
    assert total["cut_turns"] and total["lost_turns"] and total["cut_rows"]
    several = sum(sum(message["role"] == "assistant" for message in each["messages"]) > 1 for each in conversations)
    assert report.numbers["one_row_per_reply"] == (several if markup.row_per_reply else 0)
