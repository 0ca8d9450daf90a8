"""What a check sees, what it says, and the table of all checks.

A check is a pure function `(reply, params) -> CheckResult`. Its parameters are a pydantic model that refuses unknown
keys, so a misspelt parameter is found when the suite is loaded and not when the server has been running for an hour.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Params(BaseModel):
    """Parameters of a check; this one takes none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckResult(NamedTuple):
    """Whether the reply passed, and in words what was found where it did not."""

    passed: bool
    detail: str = ""


PASSED = CheckResult(True)


def failed(detail: str) -> CheckResult:
    """A result that names what was found."""
    return CheckResult(False, detail)


class ToolCall(NamedTuple):
    """One call of the model: `arguments` is None where `raw` is not a JSON object."""

    name: str
    arguments: dict[str, Any] | None
    raw: str


@dataclass(frozen=True)
class Reply:
    """What the model wrote, with what it had to go by.

    Attributes:
        produced: The model's messages, in order: `content`, `tool_calls`, `finish_reason`.
        context: The messages of the case, system message first.
        tool_results: What the scripted tools returned to this reply, in order.
        tools: The OpenAI tools offered.
    """

    produced: Sequence[Mapping[str, Any]]
    context: Sequence[Mapping[str, Any]] = ()
    tool_results: Sequence[str] = ()
    tools: Sequence[Mapping[str, Any]] = ()

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Every non-empty text that the model spoke, also those beside a tool call: a voice reads them all."""
        return tuple(text for message in self.produced if (text := message.get("content") or "").strip())

    @cached_property
    def final(self) -> str:
        """The text of the last message; empty where the model ended with a tool call alone."""
        return (self.produced[-1].get("content") or "").strip() if self.produced else ""

    @cached_property
    def calls(self) -> tuple[ToolCall, ...]:
        """Every tool call, in order."""
        return tuple(parse_call(call) for message in self.produced for call in message.get("tool_calls") or ())

    @cached_property
    def system_prompt(self) -> str:
        """The system message; empty where the case has none."""
        first = self.context[0] if self.context else {}
        return str(first.get("content") or "") if first.get("role") == "system" else ""

    @cached_property
    def tool_names(self) -> tuple[str, ...]:
        """Names of the tools offered."""
        return tuple(str(tool["function"]["name"]) for tool in self.tools)


def parse_call(call: Mapping[str, Any]) -> ToolCall:
    """Read one entry of `tool_calls`; arguments may be a JSON text (as OpenAI writes them) or a mapping."""
    function = call.get("function") or {}
    raw = function.get("arguments")
    if isinstance(raw, Mapping):
        return ToolCall(str(function.get("name")), dict(raw), json.dumps(raw, ensure_ascii=False))
    try:
        value = json.loads(raw or "{}")
    except ValueError:
        value = None
    return ToolCall(str(function.get("name")), value if isinstance(value, dict) else None, str(raw))


P = TypeVar("P", bound=Params)
CheckFunction = Callable[[Reply, P], CheckResult]


class Check(NamedTuple):
    """A registered check."""

    name: str
    params: type[Params]
    run: Callable[[Reply, Any], CheckResult]


_CHECKS: dict[str, Check] = {}


def check(name: str, params: type[P]) -> Callable[[CheckFunction[P]], CheckFunction[P]]:
    """Register a check function under a name; a second function of that name is refused."""

    def enter(function: CheckFunction[P]) -> CheckFunction[P]:
        if name in _CHECKS:
            raise ValueError(f"two checks named {name!r}")
        _CHECKS[name] = Check(name, params, function)
        return function

    return enter


def check_names() -> list[str]:
    """Names of all checks."""
    return sorted(_CHECKS)


class BoundCheck(NamedTuple):
    """A check with its parameters."""

    name: str
    params: Params
    run: Callable[[Reply, Any], CheckResult]

    def __call__(self, reply: Reply) -> CheckResult:
        """Judge a reply."""
        return self.run(reply, self.params)


def bind(name: str, params: Mapping[str, Any]) -> BoundCheck:
    """Join a check with parameters.

    Raises:
        ValueError: An unknown check (with the nearest name) or parameters that it does not take; the text says which.
    """
    entry = _CHECKS.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, _CHECKS, n=1)
        raise ValueError(
            f"no check is named {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(check_names())}")
        )
    try:
        return BoundCheck(name, entry.params.model_validate(params), entry.run)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(entry.params.model_fields) or "none"
        raise ValueError(f"check {name}: {where or 'parameters'}: {first['msg']} (parameters: {known})") from error
