"""Suites: which cases are asked. A suite is a YAML file with written cases, a generator's parameters, or both.

    name: annie_tiny
    version: "1"
    persona: annie_tiny            # its system prompt opens every case that brings none, its tools are offered where a
    case names none
    description: …
    generate: {persona: annie_tiny, count: 120, seed: 101}
    common_checks: [{check: no_emoji}]     # added to every written case that does not have a check of that name itself
    cases: [...]

A loaded suite is resolved: each case stands complete, its checks bound to valid parameters, and the whole has one hash,
which result files carry so that answers to other questions are never mixed in.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qat.behavior.checks import BoundCheck, bind
from qat.behavior.records import Case, CheckSpec, canonical_json
from qat.errors import UserError

SUITE_FOLDER = Path(__file__).resolve().parent / "suites"


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Generate(_Block):
    persona: str
    count: Annotated[int, Field(gt=0)]
    seed: int


class _SuiteFile(_Block):
    name: Annotated[str, Field(min_length=1)]
    version: str
    persona: str
    description: str = ""
    generate: _Generate | None = None
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
        checks: Case id to its checks, ready to run.
    """

    name: str
    version: str
    persona: str
    description: str
    cases: tuple[Case, ...]
    sha256: str
    checks: Mapping[str, tuple[BoundCheck, ...]] = field(repr=False)

    @property
    def by_id(self) -> dict[str, Case]:
        """Cases by id, in the suite's order."""
        return {case.id: case for case in self.cases}


def load_suite(name_or_path: str | Path) -> Suite:
    """Read and resolve a suite.

    Args:
        name_or_path: A shipped suite by name (`annie_tiny`) or the path of a YAML file.

    Raises:
        UserError: Unknown name, unreadable file, or faults in it; faults of cases come all at once.
    """
    path = _suite_path(name_or_path)
    file = _read(path)
    from qat.data.schema import load_persona

    persona = load_persona(_beside(path, file.persona))
    raw = list(file.cases)
    if file.generate is not None:
        raw += _generated(path, file.generate)
    if not raw:
        raise UserError("The suite has no cases.", where=str(path), remedy="give cases, generate or both")
    cases: list[Case] = []
    faults: list[str] = []
    checks: dict[str, tuple[BoundCheck, ...]] = {}
    for position, entry in enumerate(raw):
        label = f"cases[{position}]" + (f" ({entry['id']})" if entry.get("id") else "")
        common = file.common_checks if position < len(file.cases) else []
        case, bound, problems = _resolve(entry, common, persona.system_prompt, persona.tools)
        faults += [f"{label}: {problem}" for problem in problems]
        if case is None:
            continue
        if case.id in checks:
            faults.append(f"{label}: a second case of this id")
        cases.append(case)
        checks[case.id] = bound
    if faults:
        shown = faults[:20] + ([f"… and {len(faults) - 20} more"] if len(faults) > 20 else [])
        raise UserError(
            f"The suite has {len(faults)} fault{'s' * (len(faults) > 1)}.",
            where=str(path),
            value="\n          ".join(shown),
        )
    digest = hashlib.sha256(canonical_json([case.model_dump(mode="json") for case in cases])).hexdigest()
    return Suite(file.name, file.version, file.persona, file.description, tuple(cases), digest, checks)


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
        remedy=f"use one of {', '.join(known)}, or the path of a YAML file",
    )


def _read(path: Path) -> _SuiteFile:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError("The suite cannot be read.", where=str(path), value=str(error)) from error
    try:
        return _SuiteFile.model_validate(content)
    except ValidationError as error:
        raise UserError(
            "The suite file is not right.", where=str(path), value="\n          ".join(_faults(error))
        ) from error


def _beside(path: Path, persona: str) -> str | Path:
    """A persona given as a relative path is looked for beside the suite file."""
    return path.parent / persona if "/" in persona or persona.endswith((".yaml", ".yml")) else persona


def _generated(path: Path, block: _Generate) -> list[dict[str, Any]]:
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
    entry: Mapping[str, Any], common: list[CheckSpec], system_prompt: str, tools: list[dict[str, Any]]
) -> tuple[Case | None, tuple[BoundCheck, ...], list[str]]:
    """Complete one case with the persona's prompt and tools, and bind its checks."""
    complete = dict(entry)
    messages = complete.get("messages")
    if (
        isinstance(messages, list)
        and messages
        and isinstance(messages[0], Mapping)
        and messages[0].get("role") != "system"
    ):
        complete["messages"] = [{"role": "system", "content": system_prompt}, *messages]
    if complete.get("tools") is None:
        complete["tools"] = tools
    own = [spec for spec in complete.get("checks") or [] if isinstance(spec, Mapping)]
    names = {spec.get("check") for spec in own}
    added = [{"check": spec.check, **spec.params} for spec in common if spec.check not in names]
    complete["checks"] = [*(complete.get("checks") or []), *added]
    try:
        case = Case.model_validate(complete)
    except ValidationError as error:
        return None, (), _faults(error)
    problems: list[str] = []
    bound: list[BoundCheck] = []
    for spec in case.checks:
        try:
            bound.append(bind(spec.check, spec.params))
        except ValueError as error:
            problems.append(str(error))
    return case, tuple(bound), problems + _tool_problems(case)


def _tool_problems(case: Case) -> list[str]:
    """Faults that would make a case impossible to pass: results or due calls of tools that are not offered."""
    problems = list(_faults_of_tools(canonical_json(case.tools)))
    if problems:
        return problems
    offered = {tool["function"]["name"] for tool in case.tools or []}
    problems += [
        f"tool_results names {name!r}, which is not offered" for name in case.tool_results if name not in offered
    ]
    due = [spec.params.get("tool") for spec in case.checks if spec.check == "calls"]
    problems += [f"check calls: {name!r} is not offered" for name in due if name not in offered]
    return problems


@functools.lru_cache(maxsize=256)
def _faults_of_tools(tools: bytes) -> tuple[str, ...]:
    """`tool_faults`, once for the tools that a thousand cases share."""
    from qat.data.schema import tool_faults

    return tuple(tool_faults(json.loads(tools)))


def _faults(error: ValidationError) -> list[str]:
    return [f"{'.'.join(str(part) for part in fault['loc']) or 'file'}: {fault['msg']}" for fault in error.errors()]
