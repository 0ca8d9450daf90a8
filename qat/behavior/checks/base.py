"""What a check sees, what it says, and the table of all checks.

A check is a pure function `(reply, params) -> CheckResult`; only `judge` and `python` reach beyond the reply. Its
parameters are a pydantic model that refuses unknown keys, so a misspelt parameter is found when the suite is loaded
and not when the server has been running for an hour.
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


LONGEST = 100_000
"""Characters of a text that the checks look at."""


class CheckError(Exception):
    """The check could not judge: a judge out of reach or talking nonsense, a time that nobody measured.

    An error is neither a pass nor a fail: the result carries it as its `error` and counts in no rate.
    """


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
        latency_s: Wall seconds of the whole reply; None where nobody measured.
        first_token_s: Seconds to the first token of the first answer; None where the answers were not streamed.
    """

    produced: Sequence[Mapping[str, Any]]
    context: Sequence[Mapping[str, Any]] = ()
    tool_results: Sequence[str] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    latency_s: float | None = None
    first_token_s: float | None = None

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Every non-empty text that the model spoke, also those beside a tool call: a voice reads them all.

        Each is judged by its first 100,000 characters, which take a voice two hours: a server that sends megabytes must
        not stop the run.
        """
        texts = (str(message.get("content") or "")[:LONGEST] for message in self.produced)
        return tuple(text for text in texts if text.strip())

    @cached_property
    def final(self) -> str:
        """The text of the last message; empty where the model ended with a tool call alone."""
        return str(self.produced[-1].get("content") or "")[:LONGEST].strip() if self.produced else ""

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
    except (ValueError, RecursionError):  # brackets within a thousand brackets are read by nobody
        value = None
    return ToolCall(str(function.get("name")), value if isinstance(value, dict) else None, str(raw))


P = TypeVar("P", bound=Params)
CheckFunction = Callable[[Reply, P], CheckResult]


class Check(NamedTuple):
    """A registered check; `waits` marks one that waits for a network or a user's code."""

    name: str
    params: type[Params]
    run: Callable[[Reply, Any], CheckResult]
    waits: bool = False


_CHECKS: dict[str, Check] = {}


def check(name: str, params: type[P], *, waits: bool = False) -> Callable[[CheckFunction[P]], CheckFunction[P]]:
    """Register a check function under a name; a second function of that name is refused."""

    def enter(function: CheckFunction[P]) -> CheckFunction[P]:
        if name in _CHECKS:
            raise ValueError(f"two checks named {name!r}")
        _CHECKS[name] = Check(name, params, function, waits)
        return function

    return enter


def check_names() -> list[str]:
    """Names of all checks."""
    return sorted(_CHECKS)


def registered(name: str) -> Check:
    """The check of this name.

    Raises:
        ValueError: There is none; the text has the nearest name.
    """
    if name in _CHECKS:
        return _CHECKS[name]
    near = difflib.get_close_matches(name, _CHECKS, n=1)
    raise ValueError(
        f"no check is named {name!r}"
        + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(check_names())}")
    )


class BoundCheck(NamedTuple):
    """A check with its parameters; one that `waits` belongs in a thread of its own, off an event loop."""

    name: str
    params: Params
    run: Callable[[Reply, Any], CheckResult]
    waits: bool = False

    def __call__(self, reply: Reply) -> CheckResult:
        """Judge a reply.

        Raises:
            CheckError: The check could not judge.
        """
        try:
            return self.run(reply, self.params)
        except RecursionError as error:
            raise CheckError("the reply is nested too deeply to be judged") from error


def bind(name: str, params: Mapping[str, Any]) -> BoundCheck:
    """Join a check with parameters.

    Raises:
        ValueError: An unknown check (with the nearest name) or parameters that it does not take; the text says which.
    """
    entry = registered(name)
    try:
        return BoundCheck(name, entry.params.model_validate(params), entry.run, entry.waits)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(entry.params.model_fields) or "none"
        raise ValueError(f"check {name}: {where or 'parameters'}: {first['msg']} (parameters: {known})") from error
