"""Whether tool calls are those that a BFCL case wants, by the rules of BFCL's own `ast_checker`.

The package `bfcl_eval` cannot be depended on: importing its checker imports the clients of some twenty vendors, and it
pins NumPy. So the rules stand here again, oddities included, because a number is only a BFCL number if it is counted
alike; `qat.behavior.bfcl.agreement` holds the two against each other.

The rules: every argument is one of those that the case knows; its type is the declared one (an integer passes for a
float; a tuple is a list) or that of the answers, which then stand for a variable; texts are compared without case and
without blanks and the marks `,./-_*^`, on the first level of lists and mappings too; an answer `""` says that the
argument may be left out. Parallel calls come in any order and are matched greedily. Arguments of the Java and
JavaScript splits are texts, whose values `literals` reads first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from qat.behavior.bfcl.literals import TYPES, WITH_ITEMS, Language, read_literal
from qat.behavior.checks.base import PASSED, CheckResult, Params, Reply, check, failed

Kind = Literal["simple", "multiple", "parallel", "irrelevance", "relevance"]
"""How the calls of a case are judged: one call, one of several functions, all of several calls, none, at least one."""

Call = Mapping[str, Mapping[str, Any]]
"""One call as BFCL writes it: `{name: arguments}`."""
_MARKS = re.compile(r"[ ,./\-_*^]")


class Function(Params):
    """What the matching needs of a function's description.

    Attributes:
        name: As BFCL writes it, dots included.
        types: Parameter to its type and, where that has items, theirs.
        required: Parameters that a call must give.
        language: Whose names the types are, and whose literals the arguments hold.
    """

    name: str
    types: dict[str, tuple[str, str | None]]
    required: list[str] = Field(default_factory=list)
    language: Language = "python"

    @model_validator(mode="after")
    def _known(self) -> Self:
        for parameter, (outer, inner) in self.types.items():
            for name in (outer, *([] if inner is None else [inner])):
                if name not in TYPES[self.language]:
                    raise ValueError(f"parameter {parameter!r}: no type {name!r} of {self.language} can be matched")
            if (outer in WITH_ITEMS) != (inner is not None):
                raise ValueError(f"parameter {parameter!r}: a type of items belongs to lists, and only there")
        return self


def wire_name(name: str) -> str:
    """The function's name as it is offered: OpenAI's protocol allows no dots."""
    return name.replace(".", "_")


def match(
    kind: Kind, functions: Sequence[Function], answers: Sequence[Mapping[str, Mapping[str, Any]]], calls: Sequence[Call]
) -> str | None:
    """Why the calls are not those that are due, or None.

    Args:
        kind: How they are judged.
        functions: Those offered.
        answers: BFCL's ground truth: per due call `{name: {parameter: [allowed values]}}`; empty for (ir)relevance.
        calls: Those made, with names as they were offered.
    """
    if kind == "irrelevance":
        return f"{next(iter(calls[0]))} was called" if calls else None
    if kind == "relevance":
        return None if calls else "no function was called"
    if len(calls) != len(answers):
        return f"{len(calls)} calls, {len(answers)} due"
    by_name = {function.name: function for function in functions}
    left = list(calls)
    for answer in answers:
        name, allowed = next(iter(answer.items()))
        function = functions[0] if kind == "simple" else by_name[name]
        faults = [_call_fault(function, allowed, call) for call in left]
        if None not in faults:
            return faults[0] if len(answers) == 1 else f"no call for {name}: {faults[0]}"
        left.pop(faults.index(None))
    return None


def _call_fault(function: Function, allowed: Mapping[str, Any], call: Call) -> str | None:
    name = wire_name(function.name)
    if name not in call:
        return f"{name} was not called, but {next(iter(call), 'nothing')}"
    arguments = call[name]
    for parameter in function.required:
        if parameter not in arguments:
            return f"required argument {parameter!r} is missing"
    for parameter, value in arguments.items():
        if parameter not in function.types or parameter not in allowed:
            return f"argument {parameter!r} is not known"
        if not _fits(function.language, function.types[parameter], value, allowed[parameter]):
            return f"argument {parameter!r}: {value!r:.300} is none of {allowed[parameter]!r}"
    for parameter, values in allowed.items():
        if parameter not in arguments and "" not in values:
            return f"argument {parameter!r} is missing"
    return None


def _fits(language: Language, declared: tuple[str, str | None], value: Any, answers: Sequence[Any]) -> bool:
    types = TYPES[language]
    outer, inner = types[declared[0]], None if declared[1] is None else types[declared[1]]
    if language != "python":
        if not isinstance(value, str):
            return False
        value = read_literal(language, value, *declared)
    elif outer is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            return False
    well_typed, variable = _type_fits(value, answers, outer, inner)
    if not well_typed:
        return False
    if not variable:
        if outer is dict:
            return _mapping_fits(value, answers)
        if outer is list and inner is dict:
            return _mappings_fit(value, answers)
        if outer is str:
            return _folded(value) in [_folded(answer) for answer in answers if isinstance(answer, str)]
        if outer is list:
            # An answer "" (may be left out) folds to the empty list here, as it does in BFCL's package.
            return [_folded(item) for item in value] in [[_folded(item) for item in answer] for answer in answers]
    return value in answers


def _type_fits(value: Any, answers: Sequence[Any], declared: type, inner: type | None) -> tuple[bool, bool]:
    """Whether the value's type is right, and whether the value is compared as the name of a variable.

    Where the answers are of another type than the declared one, BFCL takes them for names of variables, whose values
    nobody knows, and compares them exactly.
    """
    of_answers = next((type(answer) for answer in answers if answer != ""), None)
    if type(value) is declared:
        if inner is not None and not any(_items_fit(value, answer, inner) for answer in answers):
            return False, False
        return True, of_answers not in (None, declared)
    return of_answers is not None and type(value) is of_answers, True


def _items_fit(value: Any, answer: Any, inner: type) -> bool:
    return not isinstance(answer, list) or all(_type_fits(item, answer, inner, None)[0] for item in value)


def _mapping_fits(value: Mapping[str, Any], answers: Sequence[Any]) -> bool:
    for answer in answers:
        if answer == "":
            continue
        given = all(key in answer and _folded(one) in [_folded(a) for a in answer[key]] for key, one in value.items())
        if given and all(key in value or "" in allowed for key, allowed in answer.items()):
            return True
    return False


def _mappings_fit(values: Sequence[Any], answers: Sequence[Any]) -> bool:
    return any(
        len(values) == len(answer)
        and all(
            isinstance(one, Mapping) and _mapping_fits(one, [want]) for one, want in zip(values, answer, strict=True)
        )
        for answer in answers
    )


def _folded(value: Any) -> Any:
    return _MARKS.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value


class Bfcl(Params):
    """One case of BFCL.

    Attributes:
        kind: How the calls are judged.
        functions: Those offered.
        answers: The ground truth.
    """

    kind: Kind
    functions: list[Function] = Field(default_factory=list)
    answers: list[dict[str, dict[str, list[Any]]]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _judgeable(self) -> Self:
        if self.kind in ("irrelevance", "relevance"):
            return self
        if not self.answers or (self.kind != "parallel" and len(self.answers) > 1):
            raise ValueError(f"{len(self.answers)} calls in the ground truth of a case of kind {self.kind}")
        known = {function.name for function in self.functions}
        for answer in self.answers:
            if len(answer) != 1 or not answer.keys() <= known:
                raise ValueError(
                    f"the ground truth calls {', '.join(answer) or 'nothing'}; offered: {', '.join(known)}"
                )
        return self


@check("bfcl", Bfcl)
def bfcl(reply: Reply, params: Bfcl) -> CheckResult:
    """The calls are those that the case of BFCL wants.

    A call whose arguments are no JSON object, or no text at all, is no call to BFCL: its decoder fails, which fails a
    case that wants calls and passes one that wants none.
    """
    try:
        fault = _reply_fault(reply, params)
    except RecursionError:  # in reading or showing brackets within a thousand brackets
        fault = None if params.kind == "irrelevance" else "the arguments are nested too deeply to be read"
    return PASSED if fault is None else failed(fault)


def _reply_fault(reply: Reply, params: Bfcl) -> str | None:
    broken = [call for call in reply.calls if call.arguments is None or call.raw in ("", "None")]
    if broken and params.kind != "irrelevance":
        return f"{broken[0].name}: the arguments are no JSON object: {broken[0].raw[:80]}"
    calls = [] if broken else [{call.name: call.arguments or {}} for call in reply.calls]
    return match(params.kind, params.functions, params.answers, calls)
