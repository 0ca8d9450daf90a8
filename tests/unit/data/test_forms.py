from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat.data.forms import convert, detect
from qat.data.load import form_of, load_conversations, read_entry
from qat.data.records import Entry, Source
from qat.errors import UserError

TOOL = {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}}


def test_sharegpt_with_a_call_by_hand() -> None:
    record = {
        "conversations": [
            {"from": "human", "value": "What time is it?"},
            {"from": "function_call", "value": '{"name": "now", "arguments": {"zone": "IST"}}'},
            {"from": "function_call", "value": '{"name": "now", "arguments": "{}"}'},
            {"from": "observation", "value": "six"},
            {"from": "observation", "value": "noon"},
            {"from": "gpt", "value": "Six."},
        ],
        "system": "Be brief.",
        "tools": json.dumps([TOOL]),
        "source": "made up",
    }
    converted = convert(record, "sharegpt")
    assert converted.faults == [] and converted.unread == ("source",)
    assert converted.record["tools"] == [{"type": "function", "function": TOOL}]
    calls = [
        {"function": {"name": "now", "arguments": {"zone": "IST"}}},
        {"function": {"name": "now", "arguments": "{}"}},
    ]
    assert converted.record["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "six"},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "Six."},
    ]


def test_alpaca_by_hand() -> None:
    record = {"instruction": "Add.", "input": "2 and 3", "output": "5", "history": [["Hi", "Hello."]], "system": "S"}
    assert convert(record, "alpaca").record["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Add.\n2 and 3"},
        {"role": "assistant", "content": "5"},
    ]


@pytest.mark.parametrize(
    ("record", "form", "expected"),
    [
        ({"conversations": "x"}, "sharegpt", "conversations is a text, not a list"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "sharegpt", "from is 'alien'"),
        ({"conversations": [{"role": "user"}]}, "sharegpt", "not of the form {from, value}"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "sharegpt", "the function call is no JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "sharegpt", "has no name"),
        ({"conversations": [], "tools": "[{"}, "sharegpt", "tools is no JSON"),
        ({"instruction": 5, "output": "x"}, "alpaca", "instruction is a number, not a text"),
        ({"instruction": "a", "output": "x", "history": [["a"]]}, "alpaca", "history is no list of pairs"),
    ],
)
def test_what_cannot_be_converted_is_named(record: Any, form: Any, expected: str) -> None:
    faults = convert(record, form).faults
    assert any(expected in fault for fault in faults), faults


def test_detection_is_by_most() -> None:
    assert detect([{"messages": []}, {"conversations": []}, {"conversations": []}]) == "sharegpt"
    assert detect([{"instruction": "", "output": ""}]) == "alpaca"
    assert detect([{"question": ""}]) == "openai"


def test_columns_of_tables_are_no_faults_and_keys_of_lines_are() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    row = {"messages": messages, "score": 3, "tools": "[]"}
    read = read_entry(Entry(0, 4, json.loads(json.dumps(row))), "openai", stem="t")
    assert read.unread == ("score",) and read.conversation is not None and read.conversation["id"] == "t-4"
    assert "unknown key 'score'" in read_entry(Entry(0, 4, json.dumps(row).encode()), "openai", stem="t").faults[0]


def test_any_form_loads(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    path.write_text(json.dumps([{"conversations": turns}] * 3, indent=1))
    loaded = load_conversations(path)
    assert [each["id"] for each in loaded] == ["set-2", "set-14", "set-26"]
    assert [message["role"] for message in loaded[2]["messages"]] == ["user", "assistant"]
    with pytest.raises(UserError, match="messages is missing"):
        load_conversations(path, "openai")


REAL = {
    "llamafactory_demo/glaive_toolcall_en_demo.json": "sharegpt",
    "llamafactory_demo/identity.json": "alpaca",
    "rasbt_instruction/instruction-data.json": "alpaca",
    "fastchat/dummy_conversation.json": "sharegpt",
}


@pytest.mark.parametrize(("name", "form"), REAL.items())
def test_real_files(real: Path, name: str, form: str) -> None:
    source = Source(real / name)
    assert form_of(source) == form
    reads = [read_entry(entry, form_of(source), stem="r") for entry in source]
    whole = json.loads((real / name).read_text("utf-8"))
    assert len(reads) == len(whole)
    # Oracle: the words of every text of the file, in order, are those of the conversations.
    for raw, read in zip(whole, reads, strict=True):
        if read.conversation is None or "function_call" in json.dumps(raw):
            continue
        keys = ("instruction", "input", "output")
        texts = [turn["value"] for turn in raw["conversations"]] if form == "sharegpt" else [raw[key] for key in keys]
        said = [m["content"] for m in read.conversation["messages"] if m["role"] != "system" or "system" not in raw]
        assert " ".join(texts).split() == " ".join(said).split()
    assert sum(read.conversation is not None for read in reads) >= 0.9 * len(reads)
