"""Checks of tool calls: the right tool, the right arguments, and no call where none was due."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

import regex
from pydantic import Field, field_validator, model_validator

from qat.behavior.checks.base import PASSED, CheckResult, Params, Reply, ToolCall, check, failed, parse_call
from qat.behavior.checks.names import fold

Scalar = str | int | float | bool | None


class Matcher(Params):
    """What an argument must be; exactly one of the four is given.

    Attributes:
        equals: This value. Numbers compare as numbers; texts without regard to case and outer white space.
        contains: This text, or all of these, occur in the argument.
        any_of: One of these values equals the argument.
        regex: The pattern is found in the argument.
        ignore_case: Compare texts without regard to case.
    """

    equals: Scalar | list[Any] | dict[str, Any] = None
    contains: str | list[str] | None = None
    any_of: list[Scalar] | None = None
    regex: str | None = None
    ignore_case: bool = True

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = self.model_fields_set & {"equals", "contains", "any_of", "regex"}
        if len(given) != 1:
            raise ValueError("give exactly one of equals, contains, any_of, regex")
        return self

    @field_validator("regex")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern

    def fault(self, value: object) -> str | None:
        """Why the value does not match, or None."""
        text = value if isinstance(value, str) else str(value)
        if self.contains is not None:
            wanted = [self.contains] if isinstance(self.contains, str) else self.contains
            missing = [piece for piece in wanted if self._fold(piece) not in self._fold(text)]
            return f"{text!r} does not contain {missing[0]!r}" if missing else None
        if self.any_of is not None:
            return (
                None if any(self._equal(one, value) for one in self.any_of) else f"{value!r} is none of {self.any_of}"
            )
        if self.regex is not None:
            found = regex.search(self.regex, text, regex.IGNORECASE if self.ignore_case else 0)
            return None if found else f"{text!r} does not match /{self.regex}/"
        return None if self._equal(self.equals, value) else f"{value!r} is not {self.equals!r}"

    def _fold(self, text: str) -> str:
        return fold(text) if self.ignore_case else text.strip()

    def _equal(self, wanted: object, value: object) -> bool:
        if isinstance(wanted, str) and isinstance(value, str):
            return self._fold(wanted) == self._fold(value)
        # True == 1 in Python; an argument of the wrong JSON type is a wrong argument.
        return isinstance(wanted, bool) == isinstance(value, bool) and wanted == value


class Calls(Params):
    """The call that is due: the tool and what its arguments must be; a plain value stands for `equals`."""

    tool: str
    arguments: dict[str, Matcher] = Field(default_factory=dict)

    @field_validator("arguments", mode="before")
    @classmethod
    def _plain(cls, arguments: object) -> object:
        if not isinstance(arguments, Mapping):
            return arguments
        return {
            key: value if isinstance(value, Mapping | Matcher) else {"equals": value}
            for key, value in arguments.items()
        }


@check("calls", Calls)
def calls(reply: Reply, params: Calls) -> CheckResult:
    """One of the calls is of `tool`, its arguments are valid by the tool's JSON schema, and every matcher holds."""
    mine = [call for call in reply.calls if call.name == params.tool]
    if not mine:
        named = ", ".join(call.name for call in reply.calls)
        return failed(f"{params.tool} was not called" + (f"; called: {named}" if named else ""))
    faults = [_call_fault(call, params, reply) for call in mine]
    return PASSED if None in faults else failed(f"{params.tool}: {faults[-1]}")


def _call_fault(call: ToolCall, params: Calls, reply: Reply) -> str | None:
    if call.arguments is None:
        return f"the arguments are no JSON object: {call.raw[:80]}"
    for key, matcher in params.arguments.items():
        if key not in call.arguments:
            return f"argument {key!r} is missing"
        if fault := matcher.fault(call.arguments[key]):
            return f"argument {key!r}: {fault}"
    return schema_fault(call, reply.tools)


def schema_fault(call: ToolCall, tools: object) -> str | None:
    """What the JSON schema of the tool says against the arguments, or None; None too where the tool is not offered."""
    from qat.data.schema import argument_faults

    offered = [
        tool for tool in (tools if isinstance(tools, list | tuple) else ()) if tool["function"]["name"] == call.name
    ]
    if not offered or call.arguments is None:
        return None
    faults = argument_faults(call.name, call.arguments, offered)
    return faults[0] if faults else None


class ParallelCalls(Params):
    """The calls that are due in one message.

    Attributes:
        calls: Each as in `calls`; their order is free, and each is met by a call of its own.
        extra: Further calls beside them are allowed.
    """

    calls: Annotated[list[Calls], Field(min_length=2)]
    extra: bool = False


@check("parallel_calls", ParallelCalls)
def parallel_calls(reply: Reply, params: ParallelCalls) -> CheckResult:
    """One message of the model makes all the calls that are due, in any order, and no other."""
    best = "no tool was called"
    for message in reply.produced:
        made = [parse_call(call) for call in message.get("tool_calls") or ()]
        if not made:
            continue
        if not params.extra and len(made) > len(params.calls):
            best = f"{len(made)} calls, {len(params.calls)} due"
            continue
        fits = [
            [call.name == due.tool and _call_fault(call, due, reply) is None for call in made] for due in params.calls
        ]
        unmet = _unmatched(fits)
        if unmet is None:
            return PASSED
        due = params.calls[unmet]
        faults = [fault for call in made if call.name == due.tool and (fault := _call_fault(call, due, reply))]
        best = f"no call for {due.tool} (number {unmet + 1} of those due)" + (f": {faults[0]}" if faults else "")
    return failed(best)


def _unmatched(fits: list[list[bool]]) -> int | None:
    """Match every row to a column of its own, by augmenting paths (Kuhn); the first row that finds none, or None.

    Args:
        fits: (due, made); whether a made call meets a due one.
    """
    owner: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column, fit in enumerate(fits[row]):
            if fit and column not in seen:
                seen.add(column)
                if column not in owner or place(owner[column], seen):
                    owner[column] = row
                    return True
        return False

    return next((row for row in range(len(fits)) if not place(row, set())), None)


class NoCall(Params):
    """The tools that must not be called; none named: any."""

    tools: list[str] | None = Field(None, min_length=1)


@check("no_call", NoCall)
def no_call(reply: Reply, params: NoCall) -> CheckResult:
    """No tool (or none of `tools`) is called."""
    for call in reply.calls:
        if params.tools is None or call.name in params.tools:
            return failed(f"{call.name} was called")
    return PASSED


class WrongTool(Params):
    """The only tools that may be called; none named: every tool offered."""

    allowed: list[str] | None = None


@check("wrong_tool", WrongTool)
def wrong_tool(reply: Reply, params: WrongTool) -> CheckResult:
    """Every call is of an allowed and offered tool, with arguments that the tool's JSON schema accepts."""
    for call in reply.calls:
        if call.name not in reply.tool_names:
            return failed(f"{call.name} is not offered")
        if params.allowed is not None and call.name not in params.allowed:
            return failed(f"{call.name} was called; allowed: {', '.join(params.allowed) or 'none'}")
        if call.arguments is None:
            return failed(f"{call.name}: the arguments are no JSON object: {call.raw[:80]}")
        if fault := schema_fault(call, reply.tools):
            return failed(fault)
    return PASSED
