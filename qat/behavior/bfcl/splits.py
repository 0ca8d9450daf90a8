"""BFCL's data files as a suite. The user names the folder; the files are those of `bfcl_eval/data` (Apache-2.0).

A file is JSON lines of `id`, `question` and `function`; the ground truth lies beside it in `possible_answer`. Functions
are offered as BFCL offers them to OpenAI-compatible models: its names of types become those of JSON schema, dots in
names become underscores, and descriptions gain BFCL's hint of the language.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qat.behavior.bfcl.matching import Function, Kind, wire_name
from qat.behavior.conversation import Script, bind_case
from qat.behavior.records import Case, canonical_json
from qat.behavior.suite import Suite
from qat.errors import UserError

SPLITS: dict[str, Kind] = {
    "simple_python": "simple",
    "multiple": "multiple",
    "parallel": "parallel",
    "parallel_multiple": "parallel",
    "irrelevance": "irrelevance",
    "live_simple": "simple",
    "live_multiple": "multiple",
    "live_parallel": "parallel",
    "live_parallel_multiple": "parallel",
    "live_irrelevance": "irrelevance",
    "live_relevance": "relevance",
}
"""Splits that can be asked, with how they are judged. The Java and JavaScript splits ask for literals of those
languages, not for JSON, and the multi-turn ones run BFCL's own simulators."""

_WITHOUT_ANSWERS = ("irrelevance", "relevance")
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
_HINT = " Note that the provided function is in Python 3 syntax."
_FLOAT_HINT = " This is a float type value."


def load_bfcl(folder: Path, splits: Sequence[str] = ()) -> Suite:
    """The named splits as one suite; categories are the splits.

    Args:
        folder: With `BFCL_v4_<split>.json` and `possible_answer/`.
        splits: Keys of `SPLITS`; none: all whose files are there.

    Raises:
        UserError: An unknown split, a missing or broken file, or no file of BFCL at all.
    """
    found = [name for name in SPLITS if _file(folder, name).is_file()]
    for name in splits:
        if name not in SPLITS:
            raise UserError("BFCL has no such split here.", value=name, remedy=f"one of {', '.join(SPLITS)}")
    if not splits and not found:
        raise UserError(
            "There is no data file of BFCL.", where=str(folder), remedy="name the folder with BFCL_v4_<split>.json"
        )
    cases = [case for name in splits or found for case in _cases(folder, name)]
    scripts: dict[str, Script] = {}
    for case in cases:
        script, faults = bind_case(case)
        if faults or case.id in scripts:
            problem = faults[0][1] if faults else "a second case of this id"
            raise UserError("A case of BFCL cannot be judged.", where=str(folder), value=f"{case.id}: {problem}")
        scripts[case.id] = script
    digest = hashlib.sha256(canonical_json([case.canonical() for case in cases])).hexdigest()
    return Suite("bfcl_v4", "4", "bfcl", "Berkeley Function Calling Leaderboard", tuple(cases), digest, scripts)


def _file(folder: Path, split: str) -> Path:
    return folder / f"BFCL_v4_{split}.json"


def _cases(folder: Path, split: str) -> list[Case]:
    kind = SPLITS[split]
    entries = _read(_file(folder, split))
    answers: dict[str, Any] = {}
    if kind not in _WITHOUT_ANSWERS:
        answers = {entry["id"]: entry["ground_truth"] for entry in _read(_answer_file(folder, split))}
    return [_case(folder, split, entry, answers) for entry in entries]


def _answer_file(folder: Path, split: str) -> Path:
    return folder / "possible_answer" / _file(folder, split).name


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("A data file of BFCL cannot be read.", where=str(path), value=str(error)) from error
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError("A line is no JSON.", where=f"{path}, line {number}", value=str(error)) from error
        if not isinstance(entry, dict) or "id" not in entry:
            raise UserError("A line is no case of BFCL.", where=f"{path}, line {number}", value=line[:120])
        entries.append(entry)
    return entries


def _case(folder: Path, split: str, entry: Mapping[str, Any], answers: Mapping[str, Any]) -> Case:
    kind = SPLITS[split]
    if kind not in _WITHOUT_ANSWERS and entry["id"] not in answers:
        raise UserError(
            "A case of BFCL has no ground truth.", where=str(_answer_file(folder, split)), value=entry["id"]
        )
    try:
        spec: dict[str, Any] = {"check": "bfcl", "kind": kind}
        if kind not in _WITHOUT_ANSWERS:
            functions = [described(function) for function in entry["function"]]
            spec |= {"functions": [f.model_dump(mode="json") for f in functions], "answers": answers[entry["id"]]}
        (messages,) = entry["question"]
        return Case.model_validate(
            {
                "id": entry["id"],
                "category": split,
                "messages": messages,
                "tools": [offered(function) for function in entry["function"]],
                "checks": [spec],
            }
        )
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise UserError(
            "A case of BFCL is not of the known form.",
            where=str(_file(folder, split)),
            value=f"{entry['id']}: {type(error).__name__}: {error}",
        ) from error


def described(function: Mapping[str, Any]) -> Function:
    """What the matching needs of a function as BFCL describes it."""
    parameters = function["parameters"]
    types = {
        name: (one["type"], one["items"]["type"] if one["type"] in ("array", "tuple") else None)
        for name, one in parameters["properties"].items()
    }
    return Function(name=function["name"], types=types, required=parameters["required"])


def offered(function: Mapping[str, Any]) -> dict[str, Any]:
    """The function as an OpenAI tool."""
    return {
        "type": "function",
        "function": {
            "name": wire_name(function["name"]),
            "description": function["description"] + _HINT,
            "parameters": _schema(function["parameters"]),
        },
    }


def _schema(value: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema of a parameter as BFCL describes it, of its properties and of its items."""
    made = dict(value)
    declared = value.get("type", "string")
    made["type"] = _SCHEMA_TYPES.get(declared, "string")
    if declared == "float":
        made |= {"format": "float", "description": value.get("description", "") + _FLOAT_HINT}
    # `optional` and a truth value under `required` are BFCL's own and no JSON schema.
    made.pop("optional", None)
    if not isinstance(value.get("required", []), list):
        del made["required"]
    if isinstance(value.get("properties"), Mapping):
        made["properties"] = {name: _schema(one) for name, one in value["properties"].items()}
    if isinstance(value.get("items"), Mapping):
        made["items"] = _schema(value["items"])
    return made
