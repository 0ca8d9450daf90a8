"""Reading conversations of any known form, with every fault of a source reported at once, and writing JSONL.

What is repaired on the way in, because the meaning is certain: arguments written as a JSON string become a mapping,
`content: null` beside tool calls becomes an empty text, content in text parts becomes one text, keys whose value is
null are dropped, and calls without ids get one (results then belong to the calls in order). Everything else that is
not as it should be is a fault; nothing is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from qat.data.forms import CONVERSATION_KEYS, Form, convert, detect
from qat.data.records import Entry, Source, sample
from qat.data.schema import ROLES, Conversation, kind_of, tool_faults
from qat.errors import UserError
from qat.storage import write_atomic

_SHOWN_FAULTS = 20
_SAMPLED = 50
_MESSAGE_KEYS = {
    "system": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "reasoning_content", "tool_calls"},
    "tool": {"role", "content", "name", "tool_call_id"},
}


class Read(NamedTuple):
    """One record as it was read.

    Attributes:
        conversation: The conversation; None where it has faults.
        faults: What is wrong with it, one line each.
        unread: Keys of the record that its form does not know.
    """

    conversation: Conversation | None
    faults: list[str]
    unread: tuple[str, ...] = ()


def form_of(source: Source) -> Form:
    """Tell of which form the records of a source are, from its first few.

    Raises:
        UserError: The source cannot be read.
    """
    return detect(sample(list(islice(source, _SAMPLED))))


def read_entry(entry: Entry, form: Form, *, stem: str) -> Read:
    """Bring one record of a source into memory form.

    Args:
        entry: The record.
        form: Its form.
        stem: What the id of a record without one begins with; its number follows.

    Returns:
        The conversation, or what is wrong with the record.
    """
    if isinstance(entry.raw, bytes):
        record, faults = _parse(entry.raw, entry.number)
        if faults:
            return Read(None, faults)
    else:
        record = entry.raw
    record, faults, unread = convert(record, form, table=isinstance(entry.raw, dict))
    if not faults:
        faults = normalise(record, default_id=f"{stem}-{entry.number}")
    return Read(None if faults else record, faults, unread)


def load_conversations(path: str | Path, form: Form | None = None) -> list[Conversation]:
    """Read the conversations of a file or folder (JSONL, JSON, Parquet, a data set saved to disk).

    Args:
        path: The file or folder.
        form: Of its records; None to tell it from the first few.

    Returns:
        The conversations in order, arguments as mappings; `id` defaults to `<stem>-<line>`, `category` to
        `uncategorised`.

    Raises:
        UserError: The source cannot be read, holds no conversation, or has faults: all are listed with line number and
            reason.
    """
    source = Source(path)
    form, stems = form or form_of(source), source.stems
    conversations: list[Conversation] = []
    faults: list[str] = []
    places_of_ids: dict[str, str] = {}
    for entry in source:
        place = source.place(entry.file, entry.number)
        conversation, problems, _ = read_entry(entry, form, stem=stems[entry.file])
        if conversation is not None:
            first = places_of_ids.setdefault(conversation["id"], place)
            if first != place:
                problems = [f"id {conversation['id']!r} is already used in {first}"]
            else:
                conversations.append(conversation)
        faults += [f"{place}: {problem}" for problem in problems]
    if faults:
        raise UserError(
            _headline(faults), where=str(path), value=_listing(faults), remedy="mend these lines; nothing was read"
        )
    if not conversations:
        raise UserError("The file holds no conversation.", where=str(path))
    return conversations


def _headline(faults: Sequence[str]) -> str:
    lines = len({fault.split(":", 1)[0] for fault in faults})
    return f"{len(faults)} fault{'s' * (len(faults) > 1)} in {lines} line{'s' * (lines > 1)} of the conversations."


def _listing(faults: Sequence[str]) -> str:
    shown = list(faults[:_SHOWN_FAULTS])
    if len(faults) > _SHOWN_FAULTS:
        shown.append(f"… and {len(faults) - _SHOWN_FAULTS} more")
    return "\n          ".join(shown)


def _parse(line: bytes, number: int) -> tuple[Any, list[str]]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return None, [f"no UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"]
    try:
        record = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        beyond = f" of line {number + error.lineno - 1}" if error.lineno > 1 else ""
        return None, [f"malformed JSON: {error.msg} at column {error.colno}{beyond}"]
    except ValueError as error:
        return None, [str(error)]
    except RecursionError:
        return None, ["malformed JSON: nested too deeply"]
    # JSON may spell half of a surrogate pair ("\ud83d"); such a text has no UTF-8 form and no tokenizer takes it.
    if "\\ud" in text.lower() and _has_lone_surrogate(record):
        return None, ["malformed text: half of a surrogate pair (\\ud8xx without its second half)"]
    return record, []


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"malformed JSON: key {twice!r} stands twice in one object")
    return mapping


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"malformed JSON: {name} is no JSON value")


def _has_lone_surrogate(record: Any) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def normalise(record: Any, *, default_id: str) -> list[str]:
    """Bring one parsed record into memory form, in place, and say what is wrong with it.

    Args:
        record: The parsed JSON value of one line.
        default_id: The id of a record that has none.

    Returns:
        Its faults, one line each; empty where the record now is a `Conversation`.
    """
    if not isinstance(record, dict):
        return [f"the line holds {kind_of(record)}, not an object with a `messages` list"]
    for key in [key for key, value in record.items() if value is None]:
        del record[key]
    faults = [
        f"unknown key {key!r} (known: {', '.join(CONVERSATION_KEYS)})" for key in record if key not in CONVERSATION_KEYS
    ]
    record.setdefault("id", default_id)
    record.setdefault("category", "uncategorised")
    faults += [
        f"{key} is {kind_of(record[key])}, not a text" for key in ("id", "category") if not isinstance(record[key], str)
    ]
    if "tools" in record:
        faults += _faults_of_tools(json.dumps(record["tools"]))
    messages = record.get("messages")
    if messages is None:
        keys = ", ".join(sorted(set(record) - {"id", "category"})) or "none"
        return [f"messages is missing (read in OpenAI's form, which this is not); keys of the record: {keys}"]
    if not isinstance(messages, list) or not messages:
        return [*faults, "messages is missing, empty or no list"]
    shapes = [fault for position, message in enumerate(messages) for fault in _message_faults(position, message)]
    if shapes:
        return faults + shapes
    return faults + _order_faults(messages) + _call_faults(messages, record.get("tools") if not faults else None)


@lru_cache(maxsize=256)
def _faults_of_tools(tools: str) -> tuple[str, ...]:
    """`tool_faults`, once for the tools that a hundred thousand conversations share."""
    return tuple(tool_faults(json.loads(tools)))


def _message_faults(position: int, message: Any) -> list[str]:
    """Faults of one message alone; brings content, ids and arguments into memory form."""
    where = f"messages[{position}]"
    if not isinstance(message, dict):
        return [f"{where} is {kind_of(message)}, not an object"]
    role = message.get("role")
    if role not in ROLES:
        return [f"{where}: role is {'missing' if role is None else repr(role)} (known: {', '.join(ROLES)})"]
    for key in [key for key, value in message.items() if value is None]:
        del message[key]
    faults = [f"{where} ({role}): unknown key {key!r}" for key in message if key not in _MESSAGE_KEYS[role]]
    if role == "assistant" and message.get("tool_calls") == []:
        del message["tool_calls"]
    if role == "assistant" and "tool_calls" in message:
        message.setdefault("content", "")
        faults += _tool_call_faults(where, message["tool_calls"])
    if isinstance(message.get("content"), list):
        message["content"], unreadable = _joined_parts(message["content"])
        if unreadable:
            return [*faults, f"{where} ({role}): {unreadable}"]
    for key in ("content", "name", "reasoning_content", "tool_call_id"):
        if not isinstance(message.get(key, ""), str):
            faults.append(f"{where} ({role}): {key} is {kind_of(message[key])}, not a text")
    if "content" not in message:
        faults.append(f"{where} ({role}): content is missing")
    elif (
        role != "tool"
        and "tool_calls" not in message
        and isinstance(message["content"], str)
        and not message["content"].strip()
    ):
        faults.append(f"{where}: the {role} message is empty")
    return faults


def _joined_parts(parts: Sequence[Any]) -> tuple[str, str]:
    """Content in OpenAI's parts as one text, joined by line breaks as vLLM does; or what part cannot be read."""
    for position, part in enumerate(parts):
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            shown = ", ".join(part) if isinstance(part, dict) else kind_of(part)
            return "", f"content[{position}] is no text part {{type: text, text: …}} but {shown}"
    return "\n".join(part["text"] for part in parts), ""


def _tool_call_faults(where: str, calls: Any) -> list[str]:
    if not isinstance(calls, list):
        return [f"{where}: tool_calls is {kind_of(calls)}, not a list"]
    faults: list[str] = []
    for position, call in enumerate(calls):
        place = f"{where}.tool_calls[{position}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            faults.append(f"{place} has no function with a name")
            continue
        if call.setdefault("type", "function") != "function":
            faults.append(f"{place}: type is {call['type']!r}, not 'function'")
        if "id" in call and (not isinstance(call["id"], str) or not call["id"]):
            faults.append(f"{place}: id is {kind_of(call['id'])}, not a text of at least one character")
        extra = (set(call) - {"id", "type", "function", "index"}) | (set(function) - {"name", "arguments"})
        faults += [f"{place}: unknown key {key!r}" for key in sorted(extra)]
        faults += _argument_form(place, function)
    return faults


def _argument_form(place: str, function: dict[str, Any]) -> list[str]:
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = (
                json.loads(arguments, object_pairs_hook=_unique, parse_constant=_refuse_constant)
                if arguments.strip()
                else {}
            )
        except json.JSONDecodeError as error:
            return [f"{place} ({function['name']}): arguments is no JSON: {error.msg} at column {error.colno}"]
        except ValueError as error:
            return [f"{place} ({function['name']}): arguments: {error}"]
    if not isinstance(arguments, dict):
        return [f"{place} ({function['name']}): arguments is {kind_of(arguments)}, not an object"]
    function["arguments"] = arguments
    return []


def _order_faults(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    roles = [message["role"] for message in messages]
    faults: list[str] = []
    systems = [position for position, role in enumerate(roles) if role == "system"]
    if len(systems) > 1:
        faults.append(f"two system messages (messages[{systems[0]}] and messages[{systems[1]}])")
    elif systems and systems[0] != 0:
        faults.append(f"messages[{systems[0]}]: the system message does not stand first")
    spoken = [role for role in roles if role != "system"]
    if spoken and spoken[0] != "user":
        faults.append(f"the first message after the system message is of the {spoken[0]}, not of the user")
    faults += [
        f"messages[{position}]: an assistant message follows an assistant message"
        for position in range(1, len(roles))
        if roles[position] == roles[position - 1] == "assistant" and "tool_calls" not in messages[position - 1]
    ]
    if roles[-1] not in ("assistant", "tool") or "assistant" not in roles:
        faults.append(f"the conversation ends with a {roles[-1]} message: nothing is learnt from it")
    elif roles[-1] == "tool":
        faults.append("the conversation ends with a tool result: the assistant never answers it")
    return faults


def _call_faults(messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Faults between calls and results; gives ids to calls and results without."""
    offered = None if tools is None else {tool["function"]["name"] for tool in tools}
    faults: list[str] = []
    waiting: dict[str, str] = {}  # id -> where the call stands
    used: set[str] = set()
    for position, message in enumerate(messages):
        if message["role"] == "tool":
            identity = message.setdefault("tool_call_id", next(iter(waiting), ""))
            if waiting.pop(identity, None) is None:
                faults.append(f"messages[{position}]: a tool result without a call ({identity or 'no call is open'})")
            continue
        faults += [f"{where}: tool call without a result ({identity})" for identity, where in waiting.items()]
        waiting = {}
        for number, call in enumerate(message.get("tool_calls", ())):
            where = f"messages[{position}].tool_calls[{number}]"
            identity = call.setdefault("id", f"call_{position}_{number}")
            if identity in used:
                faults.append(f"{where}: id {identity!r} is used twice")
            if offered is not None and call["function"]["name"] not in offered:
                faults.append(f"{where}: calls {call['function']['name']!r}, which `tools` does not offer")
            used.add(identity)
            waiting[identity] = where
    return faults + [f"{where}: tool call without a result ({identity})" for identity, where in waiting.items()]


def to_line(conversation: Conversation) -> str:
    """One conversation as a JSON line in OpenAI's form: arguments as JSON strings, characters unescaped."""
    messages = [
        {**message, "tool_calls": [_call_on_disk(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in conversation["messages"]
    ]
    return json.dumps({**conversation, "messages": messages}, ensure_ascii=False)


def _call_on_disk(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def save_conversations(path: str | Path, conversations: Sequence[Conversation]) -> None:
    """Write conversations as JSONL, whole or not at all; `load_conversations` gives them back unchanged."""
    write_atomic(Path(path), "".join(to_line(conversation) + "\n" for conversation in conversations))
