"""What training and serving must have in common: the system prompt and the tools, byte for byte, and valid calls."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from qat.data.audit.findings import Place
from qat.data.audit.tally import Tally
from qat.data.schema import Conversation, Persona, argument_faults


class Contract:
    """Holds conversations against the persona that will be served."""

    def __init__(self, persona: Persona) -> None:
        self._persona = persona
        # The order of keys and tools is part of the rendered prompt.
        self._tools = json.dumps(persona.tools, ensure_ascii=False)

    def check(self, conversation: Conversation, place: Place, tally: Tally) -> None:
        """Compare prompt, tools and calls of one conversation."""
        self._check_prompt(conversation, place, tally)
        self._check_tools(conversation, place, tally)
        # Other tools than the persona's are a fault of their own; a call is held against what was offered to it.
        offered = conversation.get("tools") or self._persona.tools
        for position, message in enumerate(conversation["messages"]):
            for call in message.get("tool_calls", ()):
                function = call["function"]
                tally.tables["tools"][function["name"]] += 1
                problems = argument_faults(function["name"], function["arguments"], offered)
                tally.numbers["calls_invalid"] += bool(problems)
                for problem in problems:
                    tally.groups.add("arguments", place, f"messages[{position}] {problem}")

    def _check_prompt(self, conversation: Conversation, place: Place, tally: Tally) -> None:
        first = conversation["messages"][0]
        if first["role"] != "system":
            tally.groups.add("system_prompt", place, subject="none", about="there is none")
        elif first["content"] != self._persona.system_prompt:
            about = _prompt_difference(self._persona.system_prompt, first["content"])
            tally.groups.add("system_prompt", place, subject=about, about=about)
        else:
            tally.numbers["prompt_equal"] += 1

    def _check_tools(self, conversation: Conversation, place: Place, tally: Tally) -> None:
        found = conversation.get("tools", [])
        if json.dumps(found, ensure_ascii=False) == self._tools:
            tally.numbers["tools_equal"] += 1
        else:
            about = tool_difference(self._persona.tools, found)
            tally.groups.add("tools", place, subject=about, about=about)


@lru_cache(maxsize=64)
def _prompt_difference(expected: str, found: str) -> str:
    return prompt_diff(expected, found)


def prompt_diff(expected: str, found: str) -> str:
    """Unified diff of two prompts by lines; where lines only differ in white space, they are shown with `repr`."""
    before, after = expected.splitlines(), found.splitlines()
    if [" ".join(line.split()) for line in before] == [" ".join(line.split()) for line in after]:
        before, after = (
            [repr(line) for line in expected.splitlines(True)],
            [repr(line) for line in found.splitlines(True)],
        )
    return "\n".join(difflib.unified_diff(before, after, "persona", "data", lineterm="", n=1))


def tool_difference(expected: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> str:
    """In a few words, how two lists of tools differ."""
    ours = {tool["function"]["name"]: tool for tool in expected}
    theirs = {tool["function"]["name"]: tool for tool in found}
    parts = [f"{word} {', '.join(names)}" for word, names in (
        ("missing", [name for name in ours if name not in theirs]),
        ("added", [name for name in theirs if name not in ours]),
        ("changed", [name for name in ours if name in theirs and ours[name] != theirs[name]]),
    ) if names]  # fmt: skip
    return "; ".join(parts) or "another order of tools or keys"
