"""A byte-level tokenizer of the tests' own (one token a byte), small chat templates, and the folder of real files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# ChatML in Nemotron's manner: an empty think block stands before a reply without reasoning; earlier reasoning goes.
NEMOTRON_LIKE = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == "user" %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == "assistant" %}
{{- "<|im_start|>assistant\n" }}
{%- if m.reasoning_content and loop.index0 > ns.last %}{{- "<think>\n" ~ m.reasoning_content ~ "\n</think>\n" }}
{%- else %}{{- "<think></think>" }}{%- endif %}
{{- m.content }}
{%- for c in m.tool_calls or [] %}{{- "\n<tool_call>" ~ c.function.name }}
{%- for k, v in c.function.arguments|items %}{{- " " ~ k ~ "=" ~ v }}{%- endfor %}{{- "</tool_call>" }}{%- endfor %}
{{- "<|im_end|>\n" }}
{%- else %}{{- "<|im_start|>" ~ m.role ~ "\n" ~ m.content ~ "<|im_end|>\n" }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n<think></think>" }}{%- endif %}
"""


def make_tokenizer(template: str, special: tuple[str, ...], merges: tuple[tuple[str, str], ...] = ()) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=special[0], bos_token=special[1 % len(special)]
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[..., Any]:
    return make_tokenizer


@pytest.fixture(scope="session")
def nemotron_like() -> Any:
    return make_tokenizer(NEMOTRON_LIKE, ("<|im_end|>", "<|im_start|>", "<think>", "</think>"))


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real third-party files, or a skip."""
    folder = Path(os.environ.get("QAT_REAL_DATA", Path(__file__).resolve().parents[4] / "shared" / "real"))
    if not folder.is_dir():
        pytest.skip(f"no real files at {folder} (set QAT_REAL_DATA)")
    return folder


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "The city."},
                "day": {"type": "string", "enum": ["now", "tomorrow"], "description": "The day."},
            },
            "required": ["city"],
        },
    },
}


@pytest.fixture
def weather_tool() -> dict[str, Any]:
    import copy

    return copy.deepcopy(WEATHER)


@pytest.fixture
def tool_conversation() -> dict[str, Any]:
    call = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Mysuru"}}}
    return {
        "id": "one",
        "category": "tool_result_responses",
        "tools": [WEATHER],
        "messages": [
            {"role": "system", "content": "You are Annie."},
            {"role": "user", "content": "Weather in Mysuru?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": "31 degrees"},
            {"role": "assistant", "content": "It is thirty-one degrees."},
            {"role": "user", "content": "ಧನ್ಯವಾದ"},
            {"role": "assistant", "content": "Any time."},
        ],
    }
