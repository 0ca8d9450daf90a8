"""What a conversation and a persona are.

A conversation is one JSON object in OpenAI's chat form: `messages`, optionally `tools`, a `category` and an `id`. In
memory it is a plain dictionary (chat templates take nothing else), typed here. Tool-call `arguments` are JSON strings
on disk, as OpenAI writes them, and mappings in memory, because templates of the Nemotron and Qwen families iterate
them with `|items`.

A persona is a YAML file of `data/personas`: the production system prompt, the tools it may call and what it knows of
its user.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from qat.errors import UserError

PERSONA_FOLDER = Path(__file__).resolve().parent / "personas"

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")

Tool = dict[str, Any]
"""One OpenAI function tool: `{"type": "function", "function": {"name", "description", "parameters"}}`."""


class FunctionCall(TypedDict):
    """The function of a tool call; `arguments` is a mapping in memory and a JSON string on disk."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """One call that an assistant message makes."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(TypedDict):
    """One message; which keys are present depends on the role."""

    role: Role
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class Conversation(TypedDict):
    """One training or held-out conversation."""

    messages: list[Message]
    category: str
    id: str
    tools: NotRequired[list[Tool]]


@dataclass(frozen=True)
class Persona:
    """Who the model is to be.

    Attributes:
        name: Short name, also the file's stem.
        system_prompt: The production prompt, byte for byte.
        tools: OpenAI function tools in the order in which they are offered.
        facts: What the persona knows of its user; free form, for generators and suites.
        description: One line for people.
    """

    name: str
    system_prompt: str
    tools: list[Tool]
    facts: dict[str, Any]
    description: str = ""


def tool_faults(tools: object) -> list[str]:
    """Say what is wrong with a list of OpenAI function tools.

    Args:
        tools: The value of a `tools` key.

    Returns:
        One line per fault; empty where every tool is a named function whose `parameters` are a valid JSON schema of an
        object.
    """
    if not isinstance(tools, list):
        return [f"tools is {kind_of(tools)}, not a list"]
    faults: list[str] = []
    seen: set[str] = set()
    for position, tool in enumerate(tools):
        where = f"tools[{position}]"
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(function, Mapping):
            faults.append(f'{where} is not of the form {{"type": "function", "function": {{…}}}}')
            continue
        name = function.get("name")
        if not isinstance(name, str) or not name:
            faults.append(f"{where}.function.name is missing")
            continue
        if name in seen:
            faults.append(f"{where}: a second tool named {name!r}")
        seen.add(name)
        if not isinstance(function.get("description", ""), str):
            faults.append(f"{where} ({name}): description is not a text")
        faults += [f"{where} ({name}): {problem}" for problem in _parameter_faults(function.get("parameters"))]
    return faults


def _parameter_faults(parameters: object) -> list[str]:
    import jsonschema

    if parameters is None:
        return []
    if not isinstance(parameters, Mapping):
        return [f"parameters is {kind_of(parameters)}, not a JSON schema"]
    try:
        jsonschema.Draft202012Validator.check_schema(parameters)
    except jsonschema.SchemaError as error:
        return [f"parameters is no valid JSON schema: {error.message} at {error.json_path}"]
    if parameters.get("type") != "object":
        return ['parameters must have "type": "object"']
    missing = [key for key in parameters.get("required", []) if key not in parameters.get("properties", {})]
    return [f"required names a property that is not declared: {key!r}" for key in missing]


def argument_faults(name: str, arguments: Mapping[str, Any], tools: Sequence[Tool]) -> list[str]:
    """Check one tool call against the tools offered.

    Args:
        name: The function called.
        arguments: Its arguments, parsed.
        tools: The tools offered (valid by `tool_faults`).

    Returns:
        One line per fault: an unknown tool, an undeclared argument, or what the JSON schema says.
    """
    import jsonschema

    offered = {tool["function"]["name"]: tool["function"] for tool in tools}
    if name not in offered:
        return [
            f"calls {name!r}, which is not offered ({', '.join(offered) or 'no tools'}){_nearest(name, list(offered))}"
        ]
    schema = offered[name].get("parameters") or {"type": "object", "properties": {}}
    faults = [
        f"{name}: unknown argument {key!r}{_nearest(key, list(schema.get('properties', {})))}"
        for key in arguments
        if key not in schema.get("properties", {}) and not schema.get("additionalProperties")
    ]
    # An undeclared argument is reported above, with the nearest name, so the schema's own word on it is left out.
    faults += [
        f"{name}: {error.message} at {error.json_path}"
        for error in jsonschema.Draft202012Validator(schema).iter_errors(dict(arguments))
        if error.validator != "additionalProperties"
    ]
    return faults


def load_persona(name_or_path: str | Path) -> Persona:
    """Read a persona.

    Args:
        name_or_path: A name (`annie` stands for `data/personas/annie.yaml`) or the path of a YAML file.

    Returns:
        The persona, every tool checked.

    Raises:
        UserError: Unknown name, unreadable file, or faults of its content (all of them at once).
    """
    import yaml

    path = _persona_path(name_or_path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError("The persona cannot be read.", where=str(path), value=str(error)) from error
    faults = _persona_faults(content)
    if faults:
        raise UserError(
            f"The persona has {len(faults)} fault{'s' * (len(faults) > 1)}.",
            where=str(path),
            value="\n          ".join(faults),
        )
    return Persona(
        name=content["name"],
        system_prompt=content["system_prompt"],
        tools=content.get("tools") or [],
        facts=content.get("facts") or {},
        description=content.get("description") or "",
    )


def _persona_path(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith((".yaml", ".yml")):
        return Path(name_or_path)
    path = PERSONA_FOLDER / f"{text}.yaml"
    if not path.is_file():
        known = sorted(entry.stem for entry in PERSONA_FOLDER.glob("*.yaml"))
        raise UserError(
            f"There is no persona named {text!r}{_nearest(text, known)}.",
            where=str(PERSONA_FOLDER),
            remedy=f"use one of {', '.join(known)}, or the path of a YAML file",
        )
    return path


_PERSONA_KEYS = ("name", "description", "system_prompt", "tools", "facts")


def _persona_faults(content: object) -> list[str]:
    if not isinstance(content, dict):
        return [f"the file holds {kind_of(content)}, not a mapping with the keys {', '.join(_PERSONA_KEYS)}"]
    faults = [f"unknown key {key!r}{_nearest(str(key), _PERSONA_KEYS)}" for key in content if key not in _PERSONA_KEYS]
    for key in ("name", "system_prompt"):
        if not isinstance(content.get(key), str) or not content[key].strip():
            faults.append(f"{key} is missing or no text")
    prompt = content.get("system_prompt")
    if isinstance(prompt, str) and prompt != prompt.strip():
        # Some chat templates trim the system message and some do not, so that the served bytes would depend on the
        # template.
        faults.append("system_prompt begins or ends with white space; write the block as `system_prompt: |-`")
    if not isinstance(content.get("description") or "", str):
        faults.append("description is no text")
    if not isinstance(content.get("facts") or {}, dict):
        faults.append(f"facts is {kind_of(content['facts'])}, not a mapping")
    if content.get("tools"):
        faults += tool_faults(content["tools"])
    return faults


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def kind_of(value: object) -> str:
    """Name the kind of a JSON value for a message: "a list", "a text", "nothing"."""
    names = {
        dict: "a mapping",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return "nothing" if value is None else names.get(type(value), f"a {type(value).__name__}")
