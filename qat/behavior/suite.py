"""Suites: which cases are asked. A suite is a YAML file; docs/behavior.md is the reference of its keys.

    name: annie_tiny
    version: "1"
    persona: annie_tiny            # its system prompt opens every case that brings none, its tools are offered where a
    case names none
    description: …
    include: [{suite: annie_core, version: "1", sha256: 6d0559…}]
    generate: {persona: annie_tiny, count: 120, seed: 101}
    common_checks: [{check: no_emoji}]     # added to every written case that does not have a check of that name itself
    variables: {city: [Mysuru, Hassan]}
    cases: [...]

A loaded suite is resolved: each case stands complete, its checks bound to valid parameters, and the whole has one hash,
which result files carry so that answers to other questions are never mixed in.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qat.behavior.checks import BoundCheck
from qat.behavior.conversation import Script, bind_case
from qat.behavior.expand import expand
from qat.behavior.records import Case, CheckSpec, canonical_json
from qat.behavior.source import Key, Source
from qat.errors import UserError

SUITE_FOLDER = Path(__file__).resolve().parent / "suites"


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Generate(_Block):
    persona: str
    count: Annotated[int, Field(gt=0)]
    seed: int


class _Include(_Block):
    """Another suite whose cases come first, pinned: what it asks cannot change unseen."""

    suite: Annotated[str, Field(min_length=1)]
    version: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{12,64}$")]


class _SuiteFile(_Block):
    name: Annotated[str, Field(min_length=1)]
    version: str
    persona: str
    description: str = ""
    include: list[_Include] = Field(default_factory=list)
    generate: _Generate | None = None
    variables: dict[str, Any] = Field(default_factory=dict)
    common_checks: list[CheckSpec] = Field(default_factory=list)
    cases: list[dict[str, Any]] = Field(default_factory=list)


@dataclass(frozen=True)
class Suite:
    """A resolved suite.

    Attributes:
        name: From the file.
        version: From the file; raised by whoever changes what the cases mean.
        persona: Whose system prompt and tools the cases stand on.
        description: One line for people.
        cases: In the order in which they are asked.
        sha256: Of the resolved cases.
        scripts: Case id to its turns, tool results and checks, ready to be played.
    """

    name: str
    version: str
    persona: str
    description: str
    cases: tuple[Case, ...]
    sha256: str
    scripts: Mapping[str, Script] = field(repr=False)

    @cached_property
    def by_id(self) -> dict[str, Case]:
        """Cases by id, in the suite's order."""
        return {case.id: case for case in self.cases}

    @cached_property
    def checks(self) -> dict[str, tuple[BoundCheck, ...]]:
        """Case id to the checks on its whole; those of turns stand in its script."""
        return {identity: script.checks for identity, script in self.scripts.items()}

    def script(self, case: Case) -> Script:
        """How a case is played."""
        return self.scripts[case.id]


def load_suite(name_or_path: str | Path) -> Suite:
    """Read and resolve a suite.

    Args:
        name_or_path: A shipped suite by name (`annie_tiny`), the path of a YAML file, or a suite of `qat eval`:
            `extraction`, `bfcl:FOLDER`.

    Raises:
        UserError: Unknown name, unreadable file, or faults in it, all at once with their lines.
    """
    made = _evaluation(str(name_or_path))
    return _load(_suite_path(name_or_path), ()) if made is None else made


def _evaluation(name: str) -> Suite | None:
    """The suite of `qat eval` that goes by this name, as the command asks it by default."""
    kind, _, folder = name.partition(":")
    if name == "extraction":
        from qat.behavior.extraction import extraction_suite

        return extraction_suite()
    if kind == "bfcl" and folder:
        from qat.behavior.bfcl import load_bfcl

        return load_bfcl(Path(folder))
    return None


class _Entry(NamedTuple):
    """A case before it is resolved: where it stands, and what it is called in a fault."""

    raw: dict[str, Any]
    place: Key
    common: Sequence[CheckSpec]


def _load(path: Path, within: tuple[Path, ...]) -> Suite:
    if path.resolve() in within:
        chain = " -> ".join(str(step) for step in (*within, path.resolve()))
        raise UserError("The suite includes itself.", where=str(path), value=chain)
    source = Source(path)
    file = _read(source)
    from qat.data.schema import load_persona

    persona = load_persona(_beside(path, file.persona))
    included = [_included(source, n, entry, (*within, path.resolve())) for n, entry in enumerate(file.include)]
    entries = [*_written(source, file), *(_Entry(raw, ("generate",), ()) for raw in _generated(path, file.generate))]
    cases = [case for suite in included for case in suite.cases]
    scripts: dict[str, Script] = {}
    first: dict[str, Key] = {}
    for number, suite in enumerate(included):
        for case in suite.cases:
            if case.id in scripts:
                source.fault(("include", number), f"a second case of the id {case.id!r}")
            scripts[case.id] = suite.scripts[case.id]
            first[case.id] = ("include", number)
    for entry in entries:
        if identity := _label(entry.raw):
            if identity in first:
                problem = f"a second case of this id, {identity!r}; the first: line {source.line(first[identity])}"
                source.fault((*entry.place, "id"), problem, identity)
            first.setdefault(identity, entry.place)
        if found := _resolve(source, entry, persona.system_prompt, persona.tools):
            case, scripts[found[0].id] = found
            cases.append(case)
    source.raise_faults()
    if not cases:
        raise UserError("The suite has no cases.", where=str(path), remedy="give cases, include, generate or several")
    digest = hashlib.sha256(canonical_json([case.canonical() for case in cases])).hexdigest()
    return Suite(file.name, file.version, file.persona, file.description, tuple(cases), digest, scripts)


def _included(source: Source, number: int, entry: _Include, within: tuple[Path, ...]) -> Suite:
    """The suite that an entry of `include` names, which must be the one that is pinned."""
    suite = _load(_suite_path(_beside(source.path, entry.suite)), within)
    place = ("include", number)
    if suite.version != entry.version:
        source.fault((*place, "version"), f"{entry.suite} is of version {suite.version!r}, not {entry.version!r}")
    if not suite.sha256.startswith(entry.sha256):
        problem = f"{entry.suite} asks other questions than those pinned; its sha256 is {suite.sha256}"
        source.fault((*place, "sha256"), problem)
    return suite


def _written(source: Source, file: _SuiteFile) -> Iterator[_Entry]:
    """The written cases, those with variables expanded."""
    for position, raw in enumerate(file.cases):
        place: Key = ("cases", position)
        made, faults = expand(raw, file.variables, source.path.parent)
        for key, problem in faults:
            source.fault((*place, *key), problem, _label(raw))
        for case in made:
            yield _Entry(case, place, file.common_checks)


def _label(raw: Mapping[str, Any]) -> str:
    identity = raw.get("id")
    return "" if identity is None else str(identity)


def _suite_path(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith((".yaml", ".yml")):
        return Path(name_or_path)
    path = SUITE_FOLDER / f"{text}.yaml"
    if path.is_file():
        return path
    known = sorted(entry.stem for entry in SUITE_FOLDER.glob("*.yaml"))
    near = difflib.get_close_matches(text, known, n=1)
    raise UserError(
        f"There is no suite named {text!r}" + (f"; did you mean {near[0]!r}?" if near else "."),
        where=str(SUITE_FOLDER),
        remedy=f"use one of {', '.join(known)}, extraction, bfcl:FOLDER, or the path of a YAML file",
    )


def _read(source: Source) -> _SuiteFile:
    try:
        return _SuiteFile.model_validate(source.data)
    except ValidationError as error:
        for key, problem in _faults(error, _SuiteFile):
            source.fault(key, problem)
        source.raise_faults()
        raise


def _beside(path: Path, persona: str) -> str | Path:
    """A persona or suite given as a relative path is looked for beside the suite file."""
    return path.parent / persona if "/" in persona or persona.endswith((".yaml", ".yml")) else persona


def _generated(path: Path, block: _Generate | None) -> list[dict[str, Any]]:
    if block is None:
        return []
    from qat.data.generate import cases as generate_cases
    from qat.data.schema import load_persona

    cases: list[dict[str, Any]] = generate_cases(load_persona(_beside(path, block.persona)), block.count, block.seed)
    if len(cases) != block.count:
        raise UserError(
            "The generator gave another number of cases than asked for.",
            where=f"persona {block.persona}, seed {block.seed}",
            value=f"{len(cases)} of {block.count}",
        )
    return cases


def _resolve(
    source: Source, entry: _Entry, system_prompt: str, tools: list[dict[str, Any]]
) -> tuple[Case, Script] | None:
    """Complete a case with the persona's prompt and tools, and bind it; None, its faults noted, where it is none."""
    complete, label = dict(entry.raw), _label(entry.raw)
    messages, turns = complete.get("messages"), complete.get("turns")
    opened = _lacks_prompt(messages, bool(turns))
    if opened:
        complete["messages"] = [{"role": "system", "content": system_prompt}, *(messages or ())]
    if complete.get("tools") is None:
        complete["tools"] = tools
    written = complete.get("checks") or []
    own = {spec.get("check") for spec in written if isinstance(spec, Mapping)} if isinstance(written, list) else set()
    if isinstance(written, list):
        added = [{"check": spec.check, **spec.params} for spec in entry.common if spec.check not in own]
        complete["checks"] = [*written, *added]
    try:
        case = Case.model_validate(complete)
    except ValidationError as error:
        for key, problem in _faults(error, Case):
            if opened and len(key) > 1 and key[0] == "messages" and isinstance(key[1], int):
                key = ("messages", key[1] - 1, *key[2:])  # as they are written, without the persona's prompt
            source.fault((*entry.place, *key), problem, label)
        return None
    script, faults = bind_case(case)
    for key, problem in [*faults, *_tool_problems(case)]:
        source.fault((*entry.place, *key), problem, label)
    return case, script


def _lacks_prompt(messages: object, turns: bool) -> bool:
    """Whether the persona's prompt opens the case: it brings no system message of its own."""
    if messages is None or messages == []:
        return turns
    first = messages[0] if isinstance(messages, list) else None
    return isinstance(first, Mapping) and first.get("role") != "system"


def _tool_problems(case: Case) -> Iterator[tuple[Key, str]]:
    """Faults that would make a case impossible to pass: results or due calls of tools that are not offered."""
    if problems := _faults_of_tools(canonical_json(case.tools)):
        yield from ((("tools",), problem) for problem in problems)
        return
    offered = {tool["function"]["name"] for tool in case.tools or []}
    parts: Iterable[tuple[Key, Iterable[str], Sequence[CheckSpec]]] = [
        ((), case.tool_results, case.checks),
        *((("turns", n), turn.tool_results, turn.checks) for n, turn in enumerate(case.turns)),
    ]
    for place, named, checks in parts:
        for name in named:
            if name not in offered:
                yield (*place, "tool_results", name), f"tool_results names {name!r}, which is not offered"
        for position, spec in enumerate(checks):
            for tool in _tools_named(spec):
                if tool not in offered:
                    yield (*place, "checks", position), f"check {spec.check}: {tool!r} is not offered"


def _tools_named(spec: CheckSpec) -> Iterator[str]:
    """Tools that a check names; a slip in one would make it fail every reply, or none."""
    given = spec.params
    if spec.check == "calls":
        yield str(given.get("tool"))
    elif spec.check == "no_call":
        yield from given.get("tools") or ()
    elif spec.check == "wrong_tool":
        yield from given.get("allowed") or ()
    elif spec.check == "parallel_calls":
        yield from (str(due.get("tool")) for due in given.get("calls") or () if isinstance(due, Mapping))


@functools.lru_cache(maxsize=256)
def _faults_of_tools(tools: bytes) -> tuple[str, ...]:
    """`tool_faults`, once for the tools that a thousand cases share."""
    from qat.data.schema import tool_faults

    return tuple(tool_faults(json.loads(tools)))


def _faults(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[Key, str]]:
    """Key path and problem of every error; an unknown key with the nearest known one."""
    for fault in error.errors():
        key = tuple(part for part in fault["loc"] if not str(part).startswith(("str", "list[", "ToolResult")))
        problem = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(key[-1]), model.model_fields, n=1)
            problem = "unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
        yield key, problem
