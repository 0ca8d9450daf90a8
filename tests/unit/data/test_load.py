from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from qat.data.load import load_conversations, save_conversations
from qat.errors import UserError


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def fault(path: Path, *lines: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_conversations(write(path, *lines))
    return str(caught.value)


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello."}


def call(arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}, **more}


def test_round_trip(tmp_path: Path, tool_conversation: dict[str, Any]) -> None:
    path = tmp_path / "folder" / "a.jsonl"
    tool_conversation["messages"][1]["content"] = 'line\u2028break ಕನ್ನಡ "quoted" \n 😀'
    save_conversations(path, [tool_conversation])  # type: ignore[list-item]
    on_disk = json.loads(path.read_text("utf-8"))
    assert on_disk["messages"][2]["tool_calls"][0]["function"]["arguments"] == '{"city": "Mysuru"}'
    assert load_conversations(path) == [tool_conversation]
    assert [entry.name for entry in path.parent.iterdir()] == ["a.jsonl"]


def test_saving_leaves_the_conversation_as_it_was(tmp_path: Path, tool_conversation: dict[str, Any]) -> None:
    before = copy.deepcopy(tool_conversation)
    save_conversations(tmp_path / "a.jsonl", [tool_conversation])  # type: ignore[list-item]
    assert tool_conversation == before


def test_normalises(tmp_path: Path) -> None:
    path = write(
        tmp_path / "set.jsonl",
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [call('{"a": 1}'), call("")], "refusal": None},
                {"role": "tool", "content": "one"},
                {"role": "tool", "content": ""},
                REPLY,
            ]
        },
        "",
        {"messages": [SYSTEM, USER, REPLY], "id": "x", "category": "c", "tools": None},
    )
    first, second = load_conversations(path)
    calls = first["messages"][1]["tool_calls"]
    assert [entry["function"]["arguments"] for entry in calls] == [{"a": 1}, {}]
    assert first["messages"][1] == {"role": "assistant", "content": "", "tool_calls": calls}
    assert [message["tool_call_id"] for message in first["messages"][2:4]] == [entry["id"] for entry in calls]
    assert (first["id"], first["category"]) == ("set-1", "uncategorised")
    assert second == {"messages": [SYSTEM, USER, REPLY], "id": "x", "category": "c"}


def test_text_parts_become_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Look:"}, {"type": "text", "text": "ಕನ್ನಡ"}]
    path = tmp_path / "a.jsonl"
    write(path, {"messages": [{"role": "user", "content": parts}, REPLY]})
    assert load_conversations(path)[0]["messages"][0]["content"] == "Look:\nಕನ್ನಡ"
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    assert "messages[0] (user): content[1] is no text part {type: text, text: …} but type, image_url" in fault(
        path, {"messages": [{"role": "user", "content": [parts[0], picture]}, REPLY]}
    )
    assert "messages[0]: the user message is empty" in fault(
        path, {"messages": [{"role": "user", "content": []}, REPLY]}
    )


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"messages": [USER, REPLY]}).encode())
    assert len(load_conversations(path)) == 1


RESULT = {"role": "tool", "content": "1", "tool_call_id": "c1"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [call(id="c1")]}
TOOL = {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}}
FAULTS: list[tuple[Any, str]] = [
    ('{"messages": [', "malformed JSON: Expecting value at column 15"),
    ('{"messages": [], "messages": []}', "key 'messages' stands twice"),
    ('{"messages": NaN}', "NaN is no JSON value"),
    ("[" * 100_000, "malformed JSON"),
    ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half of a surrogate pair"),
    ("[1]", "the line holds a list"),
    ({"messages": []}, "messages is missing, empty or no list"),
    (
        {"conversations": [USER, REPLY]},
        "messages is missing (read in OpenAI's form, which this is not); keys of the record: conversations",
    ),
    ({"messages": [{"content": "Hi"}, REPLY]}, "messages[0]: role is missing"),
    ({"messages": [{"role": "human", "content": "Hi"}, REPLY]}, "messages[0]: role is 'human'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}, REPLY]},
        "content[0] is no text part {type: text, text: …} but type",
    ),
    ({"messages": [{"role": "user"}, REPLY]}, "messages[0] (user): content is missing"),
    ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "messages[1]: the assistant message is empty"),
    ({"messages": [USER, {**REPLY, "weight": 0}]}, "messages[1] (assistant): unknown key 'weight'"),
    ({"messages": [SYSTEM, SYSTEM, USER, REPLY]}, "two system messages (messages[0] and messages[1])"),
    ({"messages": [USER, SYSTEM, REPLY]}, "messages[1]: the system message does not stand first"),
    ({"messages": [REPLY, USER, REPLY]}, "the first message after the system message is of the assistant"),
    ({"messages": [USER, REPLY, REPLY]}, "messages[2]: an assistant message follows an assistant message"),
    ({"messages": [USER, REPLY, USER]}, "ends with a user message"),
    ({"messages": [USER, CALLING, RESULT]}, "ends with a tool result"),
    ({"messages": [USER, CALLING]}, "messages[1].tool_calls[0]: tool call without a result (c1)"),
    ({"messages": [USER, CALLING, USER, REPLY]}, "messages[1].tool_calls[0]: tool call without a result (c1)"),
    ({"messages": [USER, CALLING, USER, RESULT, REPLY]}, "messages[3]: a tool result without a call (c1)"),
    ({"messages": [USER, RESULT, REPLY]}, "messages[1]: a tool result without a call (c1)"),
    ({"messages": [USER, CALLING, RESULT, RESULT, REPLY]}, "messages[3]: a tool result without a call (c1)"),
    (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call("{oops")]}, RESULT, REPLY]},
        "messages[1].tool_calls[0] (f): arguments is no JSON",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call("[1]")]}, RESULT, REPLY]},
        "arguments is a list, not an object",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, RESULT, REPLY]},
        "messages[1].tool_calls[0] has no function with a name",
    ),
    (
        {"messages": [USER, {**CALLING, "tool_calls": [call(id="c1"), call(id="c1")]}, RESULT, RESULT, REPLY]},
        "id 'c1' is used twice",
    ),
    ({"messages": [USER, CALLING, RESULT, REPLY], "tools": [TOOL]}, "calls 'f', which `tools` does not offer"),
    ({"messages": [USER, REPLY], "tools": [{"name": "g"}]}, "tools[0] is not of the form"),
    ({"messages": [USER, REPLY], "id": 3}, "id is a number, not a text"),
]


@pytest.mark.parametrize(("line", "expected"), FAULTS)
def test_each_fault_is_named_with_its_line(tmp_path: Path, line: Any, expected: str) -> None:
    text = fault(tmp_path / "a.jsonl", {"messages": [USER, REPLY]}, line)
    assert f"line 2: {expected}" in text or (expected in text and "line 2: " in text)
    assert "line 1:" not in text


def test_all_faults_at_once(tmp_path: Path) -> None:
    text = fault(tmp_path / "a.jsonl", "{", {"messages": [USER, USER]}, {"messages": [USER, REPLY]}, "nope")
    assert "3 faults in 3 lines" in text
    assert all(f"line {number}:" in text for number in (1, 2, 4))


def test_many_faults_are_cut_but_counted(tmp_path: Path) -> None:
    text = fault(tmp_path / "a.jsonl", *["{"] * 50)
    assert "50 faults in 50 lines" in text and "… and 30 more" in text


def test_equal_ids(tmp_path: Path) -> None:
    entry = {"messages": [USER, REPLY], "id": "same"}
    assert "line 2: id 'same' is already used in line 1" in fault(tmp_path / "a.jsonl", entry, entry)


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(UserError, match=r"line 1: no UTF-8: byte 0xff at column 15"):
        load_conversations(path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_conversations(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no conversation"):
        load_conversations(tmp_path / "empty.jsonl")


def test_real_tool_conversations(real: Path, tmp_path: Path) -> None:
    """ToolAlpaca's real calls, brought into OpenAI's form, load and come back as they were."""
    entries = json.loads((real / "toolalpaca/eval_simulated.json").read_text())
    lines: list[dict[str, Any]] = []
    for entry in entries:
        for index, instruction in enumerate(entry["Instructions"]):
            for answer in entry["Golden_Answers"][index]:
                function = {"name": answer["Action"], "arguments": answer["Action_Input"]}
                message = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
                lines.append(
                    {
                        "messages": [
                            {"role": "user", "content": instruction},
                            message,
                            {"role": "tool", "content": "ok"},
                            REPLY,
                        ]
                    }
                )
    assert len(lines) > 50
    valid, invalid = [], 0
    for line in lines:
        try:
            json.loads(line["messages"][1]["tool_calls"][0]["function"]["arguments"])
            valid.append(line)
        except (ValueError, TypeError):
            invalid += 1
    loaded = load_conversations(write(tmp_path / "real.jsonl", *valid))
    assert len(loaded) == len(valid)
    save_conversations(tmp_path / "again.jsonl", loaded)
    assert load_conversations(tmp_path / "again.jsonl") == loaded
