"""The forms that conversations come in, and how each becomes the one that the rest reads: OpenAI's.

* `openai`: `messages` of `role` and `content`, `tools` beside them (also as a JSON text, as tables keep them).
* `sharegpt`: `conversations` of `from` and `value`, with LLaMA-Factory's `function_call`, `observation`, `system` and
  `tools`.
* `alpaca`: `instruction`, `input`, `output`, with `system` and `history`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from qat.data.schema import kind_of

Form = Literal["openai", "sharegpt", "alpaca"]
FORMS: tuple[Form, ...] = ("openai", "sharegpt", "alpaca")

CONVERSATION_KEYS = ("messages", "tools", "category", "id")
_READ_KEYS: dict[Form, frozenset[str]] = {
    "openai": frozenset(CONVERSATION_KEYS),
    "sharegpt": frozenset(("conversations", "system", "tools", "category", "id")),
    "alpaca": frozenset(("instruction", "input", "output", "system", "history", "tools", "category", "id")),
}
_SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "bing": "assistant", "bard": "assistant",
    "function_call": "function_call", "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip


class Converted(NamedTuple):
    """A record in OpenAI's form.

    Attributes:
        record: The record; its contents are as unchecked as before.
        faults: What could not be converted.
        unread: Keys of the record that the form does not know.
    """

    record: Any
    faults: list[str]
    unread: tuple[str, ...] = ()


def detect(records: Sequence[Mapping[str, Any]]) -> Form:
    """Tell of which form most of these records are; those of none are read as OpenAI's and hear what they lack."""
    votes: Counter[Form] = Counter(form for record in records if (form := _form_of(record)) is not None)
    return votes.most_common(1)[0][0] if votes else "openai"


def _form_of(record: Mapping[str, Any]) -> Form | None:
    if "messages" in record:
        return "openai"
    if "conversations" in record:
        return "sharegpt"
    return "alpaca" if "instruction" in record and "output" in record else None


def convert(record: Any, form: Form, *, table: bool = False) -> Converted:
    """Bring one record into OpenAI's form.

    Args:
        record: A parsed record.
        form: Its form.
        table: It is the row of a table, which may hold columns that are none of our business.

    Returns:
        The converted record with its faults.
    """
    if not isinstance(record, dict):
        return Converted(record, [])
    unread: tuple[str, ...] = ()
    if form != "openai" or table:
        unread = tuple(key for key in record if key not in _READ_KEYS[form])
        record = {key: value for key, value in record.items() if key in _READ_KEYS[form] and value is not None}
    faults = _read_tools(record, bare=form != "openai")
    if form == "sharegpt":
        record, more = _from_sharegpt(record)
    elif form == "alpaca":
        record, more = _from_alpaca(record)
    else:
        more = []
    return Converted(record, faults + more, unread)


def _read_tools(record: dict[str, Any], *, bare: bool) -> list[str]:
    """Tools that are a JSON text, or bare functions where the form has them, become OpenAI's list; in place."""
    tools = record.get("tools")
    if tools == "":
        del record["tools"]
    elif isinstance(tools, str):
        bare = True
        try:
            tools = record["tools"] = json.loads(tools)
        except ValueError as error:
            return [f"tools is no JSON: {error}"]
    if isinstance(tools, list) and bare:
        record["tools"] = [{"type": "function", "function": tool} if _is_function(tool) else tool for tool in tools]
    return []


def _is_function(tool: object) -> bool:
    return isinstance(tool, dict) and "name" in tool


def _from_sharegpt(record: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    turns = record.pop("conversations", None)
    if not isinstance(turns, list):
        return record, [f"conversations is {kind_of(turns)}, not a list"]
    messages: list[dict[str, Any]] = []
    faults: list[str] = []
    system = record.pop("system", None)
    if isinstance(system, str) and system:
        messages.append({"role": "system", "content": system})
    for position, turn in enumerate(turns):
        where = f"conversations[{position}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
            faults.append(f"{where} is not of the form {{from, value}}")
            continue
        role = _SPEAKERS.get(turn["from"])
        if role is None:
            faults.append(f"{where}: from is {turn['from']!r} (known: {', '.join(_SPEAKERS)})")
        elif role == "function_call":
            faults += _add_call(messages, turn.get("value"), where)
        else:
            messages.append({"role": role, "content": turn.get("value")})
    return {**record, "messages": messages}, faults


def _add_call(messages: list[dict[str, Any]], value: object, where: str) -> list[str]:
    """One or several calls as JSON; those that follow one another belong to one message."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        return [f"{where}: the function call is no JSON: {error}"]
    calls: list[Any] = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return [f"{where}: a function call has no name"]
    made = [{"function": {"name": call["name"], "arguments": call.get("arguments", {})}} for call in calls]
    if messages and messages[-1]["role"] == "assistant" and "tool_calls" in messages[-1]:
        messages[-1]["tool_calls"] += made
    else:
        messages.append({"role": "assistant", "content": "", "tool_calls": made})
    return []


def _from_alpaca(record: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    faults = [
        f"{key} is {kind_of(record.get(key))}, not a text"
        for key in ("instruction", "output")
        if not isinstance(record.get(key), str)
    ]
    history = record.pop("history", None) or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        return record, [*faults, "history is no list of pairs (question, answer)"]
    messages: list[dict[str, Any]] = []
    system, extra = record.pop("system", None), record.pop("input", None)
    if system:
        messages.append({"role": "system", "content": system})
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = "\n".join(str(part) for part in (record.pop("instruction", ""), extra) if part)
    messages += [
        {"role": "user", "content": question},
        {"role": "assistant", "content": record.pop("output", "")},
    ]
    return {**record, "messages": messages}, faults
