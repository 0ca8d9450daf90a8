"""A case as a script: the turns in order, what each tool call gets, and the checks of every turn and of the whole.

The script plays both other parts of the conversation, the user and the tools. It never decides whether a reply is good;
where the model leaves the script (a call without a scripted result, arguments that no template could render back, a
fifth call in a row), the conversation ends and is judged as it is. Turns that were not reached are a failure of their
own: what was never asked has not passed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import ValidationError

from qat.behavior.answers import AnsweredBy
from qat.behavior.checks import BoundCheck, Reply, ToolCall, bind
from qat.behavior.checks.tools import Calls
from qat.behavior.records import Case, CheckSpec, FailedCheck, ToolResult, ToolScript

MAX_TOOL_ROUNDS = 3
"""How often scripted tool results are fed within one turn; a model that calls on and on is stopped there."""

Message = dict[str, Any]
Ask = Callable[[list[Message]], Awaitable[AnsweredBy]]
"""Sends the messages to the model."""


class _Rule(NamedTuple):
    """A scripted result with its conditions."""

    result: str
    call: int | None
    arguments: Calls

    def fits(self, call: ToolCall, number: int) -> bool:
        given = call.arguments or {}
        return (self.call is None or self.call == number) and all(
            key in given and matcher.fault(given[key]) is None for key, matcher in self.arguments.arguments.items()
        )


Rules = Mapping[str, Sequence[_Rule]]


class BoundTurn(NamedTuple):
    """A turn ready to be played."""

    user: str
    rules: Rules
    checks: tuple[BoundCheck, ...]


class Script(NamedTuple):
    """A case ready to be played: its turns, the results of its tools, and the checks on the whole."""

    turns: tuple[BoundTurn, ...]
    rules: Rules
    checks: tuple[BoundCheck, ...]

    @property
    def all_checks(self) -> Iterator[BoundCheck]:
        """The checks of every turn and of the whole."""
        for turn in self.turns:
            yield from turn.checks
        yield from self.checks


def bind_case(case: Case) -> tuple[Script, list[tuple[tuple[str | int, ...], str]]]:
    """Bind checks and matchers of a case.

    Returns:
        The script, and the faults found as (key path in the case, problem).
    """
    faults: list[tuple[tuple[str | int, ...], str]] = []

    def checks(specs: Sequence[CheckSpec], path: tuple[str | int, ...]) -> tuple[BoundCheck, ...]:
        bound = []
        for position, spec in enumerate(specs):
            params = spec.params
            if spec.check == "judge" and case.reference is not None:
                params.setdefault("reference", case.reference)
            try:
                bound.append(bind(spec.check, params))
            except ValueError as error:
                faults.append(((*path, position), str(error)))
        return tuple(bound)

    def rules(scripts: Mapping[str, ToolScript], path: tuple[str | int, ...]) -> Rules:
        made = {}
        for tool, script in scripts.items():
            try:
                made[tool] = _rules(tool, script)
            except ValidationError as error:
                first = error.errors()[0]
                faults.append(((*path, tool), f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))
        return made

    turns = tuple(
        BoundTurn(
            turn.user,
            rules(turn.tool_results, ("turns", n, "tool_results")),
            checks(turn.checks, ("turns", n, "checks")),
        )
        for n, turn in enumerate(case.turns)
    )
    return Script(turns, rules(case.tool_results, ("tool_results",)), checks(case.checks, ("checks",))), faults


_ANY = Calls(tool="")


def _rules(tool: str, script: ToolScript) -> tuple[_Rule, ...]:
    if isinstance(script, str):
        return (_Rule(script, None, _ANY),)
    entries = (ToolResult(result=e, call=n) if isinstance(e, str) else e for n, e in enumerate(script, start=1))
    return tuple(
        _Rule(e.result, e.call, Calls.model_validate({"tool": tool, "arguments": e.arguments}) if e.arguments else _ANY)
        for e in entries
    )


@dataclass
class Talk:
    """A conversation under way: what was said, what it took, and why it ended before its script did.

    Attributes:
        produced: What the model wrote, as recorded.
        fed: Tool results that the model was given.
        seconds: That the server took for its answers.
        first_token_s: To the first token of the first answer; None where nothing was streamed.
        completion_tokens: Over all answers.
        replies: One for each turn played, as its checks see it.
        ended: Why turns were left out; None where none was.
    """

    produced: list[Message] = field(default_factory=list)
    fed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    first_token_s: float | None = None
    completion_tokens: int = 0
    replies: list[Reply] = field(default_factory=list)
    ended: str | None = None

    def whole(self, case: Case) -> Reply:
        """All that the model wrote, with all that the user said."""
        context = [*case.messages, *({"role": "user", "content": turn.user} for turn in case.turns)]
        return Reply(self.produced, context, tuple(self.fed), case.tools or (), self.seconds, self.first_token_s)

    def unreached(self, case: Case) -> list[FailedCheck]:
        """The failure of turns that were left out."""
        played = len(self.replies)
        if not case.turns or played == len(case.turns):
            return []
        return [FailedCheck(check="turns", detail=f"only {played} of {len(case.turns)} were played: {self.ended}")]


async def converse(case: Case, script: Script, ask: Ask, talk: Talk) -> None:
    """Play the case; fills `talk`, which holds what was said so far also where `ask` raises."""
    messages = list(case.messages)
    counts: Counter[str] = Counter()
    if not script.turns:
        await _turn(case, (script.rules,), ask, talk, messages, counts, None)
    for number, turn in enumerate(script.turns, start=1):
        messages.append({"role": "user", "content": turn.user})
        await _turn(case, (turn.rules, script.rules), ask, talk, messages, counts, number)
        if talk.ended:
            return


async def _turn(
    case: Case,
    rules: Sequence[Rules],
    ask: Ask,
    talk: Talk,
    messages: list[Message],
    counts: Counter[str],
    number: int | None,
) -> None:
    """One turn of the user: ask, feed scripted tool results and ask again while the model calls."""
    context = list(messages)
    produced, fed, seconds, first_token = len(talk.produced), len(talk.fed), talk.seconds, None
    for round_number in range(MAX_TOOL_ROUNDS + 1):
        answer = await ask(messages)
        message = answer.message if number is None else {**answer.message, "turn": number}
        talk.produced.append(message)
        talk.seconds += answer.seconds
        talk.completion_tokens += answer.completion_tokens
        if round_number == 0:
            first_token = answer.first_token_s
        calls = Reply([message]).calls
        if not calls:
            messages.append(spoken(message))
            break
        results = None if round_number == MAX_TOOL_ROUNDS else _results(case, rules, calls, counts)
        if results is None:
            talk.ended = _why(number, calls, round_number)
            break
        messages.append(spoken(message))
        for raw, result in zip(message["tool_calls"], results, strict=True):
            messages.append({"role": "tool", "tool_call_id": raw.get("id") or "", "content": result})
            talk.fed.append(result)
    if len(talk.replies) == 0:
        talk.first_token_s = first_token
    talk.replies.append(
        Reply(talk.produced[produced:], context, tuple(talk.fed[fed:]), case.tools or (), talk.seconds - seconds,
              first_token)
    )  # fmt: skip


def _results(case: Case, rules: Sequence[Rules], calls: Sequence[ToolCall], counts: Counter[str]) -> list[str] | None:
    """What the calls get, in their order; None where one has broken arguments or gets nothing."""
    results = []
    for call in calls:
        counts[call.name] += 1
        if call.arguments is None:
            return None
        fitting = (r.result for table in rules for r in table.get(call.name, ()) if r.fits(call, counts[call.name]))
        result = next(fitting, case.unscripted)
        if result is None:
            return None
        results.append(result)
    return results


def _why(number: int | None, calls: Sequence[ToolCall], round_number: int) -> str:
    names = ", ".join(call.name for call in calls)
    where = "" if number is None else f"turn {number}: "
    if round_number == MAX_TOOL_ROUNDS:
        return f"{where}{names} called after {MAX_TOOL_ROUNDS} rounds of results"
    if broken := [call for call in calls if call.arguments is None]:
        return f"{where}the arguments of {broken[0].name} are no JSON object"
    return f"{where}a call of {names} has no scripted result"


def spoken(message: Message) -> Message:
    """The message as it is sent back to the server: without what only the record keeps."""
    return {key: value for key, value in message.items() if key in ("role", "content", "tool_calls")}
