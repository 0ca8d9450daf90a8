"""BFCL's data files as a suite. The user names the folder; the files are those of `bfcl_eval/data` (Apache-2.0).

A file is JSON lines of `id`, `question` and `function`; the ground truth lies beside it in `possible_answer`. Functions
are offered as BFCL offers them to OpenAI-compatible models: its names of types become those of JSON schema, dots in
names become underscores, and descriptions gain BFCL's hints; parameters of Java and JavaScript are texts.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from qat.behavior.bfcl.literals import WITH_ITEMS, Language
from qat.behavior.bfcl.matching import Function, Kind, wire_name
from qat.behavior.conversation import Script, bind_case
from qat.behavior.records import Case, canonical_json
from qat.behavior.suite import Suite
from qat.errors import UserError


class Split(NamedTuple):
    """How the calls of a split are judged, and the language of its functions."""

    kind: Kind
    language: Language = "python"

    @property
    def answered(self) -> bool:
        """Whether its cases have a ground truth."""
        return self.kind not in ("irrelevance", "relevance")


SPLITS: dict[str, Split] = {
    "simple_python": Split("simple"),
    "simple_java": Split("simple", "java"),
    "simple_javascript": Split("simple", "javascript"),
    "multiple": Split("multiple"),
    "parallel": Split("parallel"),
    "parallel_multiple": Split("parallel"),
    "irrelevance": Split("irrelevance"),
    "live_simple": Split("simple"),
    "live_multiple": Split("multiple"),
    "live_parallel": Split("parallel"),
    "live_parallel_multiple": Split("parallel"),
    "live_irrelevance": Split("irrelevance"),
    "live_relevance": Split("relevance"),
}
"""The single-turn splits of BFCL v4, which are those that can be asked."""

GROUPS: dict[str, tuple[str, ...]] = {
    "live": tuple(name for name in SPLITS if name.startswith("live_")),
    "non_live": tuple(name for name in SPLITS if not name.startswith("live_")),
    "single_turn": tuple(SPLITS),
    "python": tuple(name for name, split in SPLITS.items() if split.language == "python"),
    "non_python": tuple(name for name, split in SPLITS.items() if split.language != "python"),
}
"""BFCL's names for several splits together."""

_SIMULATED = ("multi_turn", "memory", "web_search", "format_sensitivity", "agentic", "all")
_SCHEMA_TYPES = {
    "integer": "integer",
    "number": "number",
    "float": "number",
    "string": "string",
    "boolean": "boolean",
    "array": "array",
    "dict": "object",
    "object": "object",
    "tuple": "array",
    "any": "string",
}
_HINTS: dict[Language, str] = {
    "python": " Note that the provided function is in Python 3 syntax.",
    "java": " Note that the provided function is in Java 8 SDK syntax.",
    "javascript": " Note that the provided function is in JavaScript syntax.",
}
_FLOAT_HINT = " This is a float type value."


def load_bfcl(folder: Path, splits: Sequence[str] = ()) -> Suite:
    """The named splits as one suite; categories are the splits.

    Args:
        folder: With `BFCL_v4_<split>.json` and `possible_answer/`.
        splits: Keys of `SPLITS` or `GROUPS`; none: all splits whose files are there.

    Raises:
        UserError: An unknown split, a missing or broken file, or no file of BFCL at all.
    """
    names = _chosen(splits) or [name for name in SPLITS if _file(folder, name).is_file()]
    if not names:
        raise UserError(
            "There is no data file of BFCL." if folder.is_dir() else "There is no such folder.",
            where=str(folder),
            remedy="name the folder with BFCL_v4_<split>.json and possible_answer, as bfcl_eval/data",
        )
    cases: list[Case] = []
    scripts: dict[str, Script] = {}
    for name in names:
        for line, case in _cases(folder, name):
            script, faults = bind_case(case)
            if faults or case.id in scripts:
                problem = faults[0][1] if faults else "a second case of this id"
                raise UserError("A case of BFCL cannot be judged.", where=line, value=f"{case.id}: {problem}")
            cases.append(case)
            scripts[case.id] = script
    digest = hashlib.sha256(canonical_json([case.canonical() for case in cases])).hexdigest()
    return Suite("bfcl_v4", "4", "bfcl", "Berkeley Function Calling Leaderboard", tuple(cases), digest, scripts)


def _chosen(named: Iterable[str]) -> list[str]:
    """The splits that the names mean, each once."""
    chosen: dict[str, None] = {}
    for name in named:
        if name not in SPLITS and name not in GROUPS:
            simulated = name.startswith(_SIMULATED)
            known = [*SPLITS, *GROUPS]
            near = [one for one in known if name in one] or difflib.get_close_matches(name, known, n=3)
            raise UserError(
                "BFCL runs this on simulators of its own, wholly or in part."
                if simulated
                else "BFCL has no such split.",
                value=name,
                remedy=f"one of {', '.join(known if simulated else near or known)}",
            )
        chosen |= dict.fromkeys(GROUPS.get(name, (name,)))
    return list(chosen)


def _file(folder: Path, split: str) -> Path:
    return folder / f"BFCL_v4_{split}.json"


def _answer_file(folder: Path, split: str) -> Path:
    return folder / "possible_answer" / _file(folder, split).name


def _cases(folder: Path, split: str) -> list[tuple[str, Case]]:
    """The cases of a split, each with its file and line."""
    asked = _read(_file(folder, split), ("question", "function"))
    path = _answer_file(folder, split)
    answers: dict[str, Any] = {}
    for line, entry in _read(path, ("ground_truth",)) if SPLITS[split].answered else ():
        if entry["id"] in answers:
            raise UserError("A case of BFCL has two ground truths.", where=line, value=entry["id"])
        answers[entry["id"]] = entry["ground_truth"]
    for line, entry in asked:
        if SPLITS[split].answered and entry["id"] not in answers:
            raise UserError(
                "A case of BFCL has no ground truth.",
                where=line,
                value=entry["id"],
                remedy=f"add its line to {path}, or take both files from one version of bfcl-eval",
            )
    return [(line, _case(line, split, entry, answers.get(entry["id"]))) for line, entry in asked]


def _read(path: Path, keys: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """The entries of a file, each with its file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            "A data file of BFCL is missing.",
            where=str(path),
            remedy="copy it from bfcl_eval/data, with its folder possible_answer",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("A data file of BFCL cannot be read.", where=str(path), value=str(error)) from error
    entries = []
    # Not `splitlines`: JSON allows its other line breaks, such as U+2028, inside texts.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError("A line is no JSON.", where=where, value=str(error)) from error
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            raise UserError("A line is no case of BFCL: it has no id.", where=where, value=line[:120])
        if missing := [key for key in keys if key not in entry]:
            raise UserError(
                f"A line is no case of BFCL: it has no {' and no '.join(missing)}.", where=where, value=entry["id"]
            )
        entries.append((where, entry))
    if not entries:
        raise UserError("A data file of BFCL is empty.", where=str(path))
    return entries


def _case(line: str, split: str, entry: Mapping[str, Any], answers: Any) -> Case:
    kind, language = SPLITS[split]
    try:
        spec: dict[str, Any] = {"check": "bfcl", "kind": kind}
        if SPLITS[split].answered:
            functions = [described(function, language) for function in entry["function"]]
            spec |= {"functions": [f.model_dump(mode="json") for f in functions], "answers": answers}
        (messages,) = entry["question"]
        return Case.model_validate(
            {
                "id": entry["id"],
                "category": split,
                "messages": messages,
                "tools": [offered(function, language) for function in entry["function"]],
                "checks": [spec],
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except KeyError as error:
        problem = f"a function or parameter has no {error}"
    except (TypeError, ValueError, AttributeError) as error:
        problem = str(error)
    raise UserError("A case of BFCL is not of the known form.", where=line, value=f"{entry['id']}: {problem}")


def described(function: Mapping[str, Any], language: Language = "python") -> Function:
    """What the matching needs of a function as BFCL describes it."""
    parameters = function["parameters"]
    types = {
        name: (one["type"], one["items"]["type"] if one["type"] in WITH_ITEMS else None)
        for name, one in parameters["properties"].items()
    }
    return Function(name=function["name"], types=types, required=parameters["required"], language=language)


def offered(function: Mapping[str, Any], language: Language = "python") -> dict[str, Any]:
    """The function as an OpenAI tool."""
    parameters = dict(function["parameters"])
    if language != "python":
        names = parameters["properties"]
        parameters["properties"] = {name: _as_text(one, language) for name, one in names.items()}
    return {
        "type": "function",
        "function": {
            "name": wire_name(function["name"]),
            "description": function["description"] + _HINTS[language],
            "parameters": _schema(parameters),
        },
    }


def _as_text(parameter: Mapping[str, Any], language: Language) -> dict[str, Any]:
    """The parameter as one whose text holds a literal of the language."""
    made, declared = dict(parameter), parameter["type"]
    name = "Java" if language == "java" else "JavaScript"
    described_as = (
        f"This parameter can be of any type of {name} object in string representation."
        if declared == "any"
        else f"This is {name} {declared} type parameter in string representation."
    )
    hints = [parameter.get("description", ""), described_as]
    if declared in WITH_ITEMS:
        items = made.pop("items")["type"]
        hints.append(f"The list elements are of type {items}; they are not in string representation.")
    if declared == "dict" and "properties" in made:
        schema = json.dumps(made.pop("properties"))
        hints.append(
            f"The dictionary entries have the following schema; they are not in string representation. {schema}"
        )
    return made | {"type": "string", "description": " ".join(hints)}


def _schema(value: Mapping[str, Any], hinted: bool = True) -> dict[str, Any]:
    """JSON schema of a parameter as BFCL describes it; its items are not `hinted` to be floats."""
    made = dict(value)
    declared = value.get("type", "string")
    made["type"] = _SCHEMA_TYPES.get(declared, "string")
    if declared == "float" and hinted:
        made |= {"format": "float", "description": value.get("description", "") + _FLOAT_HINT}
    if isinstance(value.get("properties"), Mapping):
        made["properties"] = {name: _schema(one) for name, one in value["properties"].items()}
    if isinstance(value.get("items"), Mapping):
        made["items"] = _schema(value["items"], hinted=False)
    return made
