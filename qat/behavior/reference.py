"""What every check says of itself in docstrings and parameters: for docs/checks.md and `qat suite checks`."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

import regex
from pydantic import BaseModel

from qat.behavior.checks.base import Params, check_names, registered
from qat.behavior.checks.tools import Matcher


class Parameter(NamedTuple):
    """One parameter of a check; `default` is None where it must be given."""

    name: str
    kind: str
    default: str | None
    meaning: str


class Description(NamedTuple):
    """One check.

    Attributes:
        name: As suites name it.
        text: What it demands, in Markdown.
        about: What its parameters are, as a whole; empty where it takes none.
        parameters: Each of them.
    """

    name: str
    text: str
    about: str
    parameters: list[Parameter]


def suite_checks() -> list[str]:
    """Names of the checks for suites; two more, of the evaluations, register where these are imported."""
    return [name for name in check_names() if registered(name).run.__module__.startswith("qat.behavior.checks.")]


def describe(name: str) -> Description:
    """What a check says of itself.

    Raises:
        ValueError: No check is named so.
    """
    entry = registered(name)
    text = _sections(inspect.getdoc(entry.run) or "")[""]
    if entry.params is Params:
        return Description(name, text, "", [])
    return Description(name, text, _sections(inspect.getdoc(entry.params) or "")[""], _parameters(entry.params))


def _sections(doc: str) -> dict[str, str]:
    """A Google-style docstring by section; the text before the first stands under the empty name."""
    parts = regex.split(r"^(Args|Attributes|Returns|Raises):\n", doc, flags=regex.MULTILINE)
    found = {"": parts[0].strip()}
    return found | {name: textwrap.dedent(body).strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def _parameters(model: type[BaseModel]) -> list[Parameter]:
    meanings = dict(
        regex.findall(
            r"^(\w+): (.*(?:\n[ ]+.*)*)", _sections(inspect.getdoc(model) or "").get("Attributes", ""), regex.MULTILINE
        )
    )
    schema = model.model_json_schema()
    required = schema.get("required", ())
    return [
        Parameter(
            name,
            _kind(entry, schema.get("$defs", {})),
            None if name in required else json.dumps(entry.get("default", {}), ensure_ascii=False),
            " ".join(meanings.get(name, "").split()),
        )
        for name, entry in schema["properties"].items()
    ]


_KINDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false",
          "object": "mapping", "null": "null"}  # fmt: skip


def _kind(schema: Mapping[str, Any], blocks: Mapping[str, Any]) -> str:
    """The type of a value in words, from its JSON schema."""
    if "$ref" in schema:
        return f"as in `{schema['$ref'].rsplit('/', 1)[1].lower()}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(each, blocks) for each in schema["anyOf"]))
    if schema.get("type") == "array":
        items = schema.get("items", {})
        return f"list: {_kind(items, blocks)}" if items else "list"
    return _KINDS.get(schema.get("type", ""), "any value")


_HEAD = """# Checks

*Written by `scripts/make_docs.py` from the checks' own docstrings; do not edit by hand.*

A check stands in a case, a turn or `common_checks` of a [suite](behavior.md), by name with its parameters beside it:
`{check: max_sentences, n: 2}`. Every check of a case must pass. `qat suite checks` lists them, `qat suite checks NAME`
shows one. How often each is right, on labelled replies that were held out, stands in
[benchmarks/checks.md](benchmarks/checks.md).
"""
_BLANK = "\n\n"
_MATCHERS = """## Matching arguments

`arguments` of `calls` and `parallel_calls`, and of scripted tool results, name what an argument must be: a plain value
stands for `equals`; keys that are not named are free.
"""


def page() -> str:
    """The whole text of docs/checks.md."""
    found = [describe(name) for name in suite_checks()]
    lines = [_HEAD, "| check | |", "|---|---|"]
    lines += [f"| [`{each.name}`](#{each.name}) | {_cell(each.text.partition(_BLANK)[0])} |" for each in found]
    for each in found:
        lines += ["", f"## `{each.name}`", "", each.text]
        if each.parameters:
            lines += ["", f"Parameters: {each.about}", "", *_table(each.parameters)]
    return "\n".join([*lines, "", _MATCHERS, *_table(_parameters(Matcher))]) + "\n"


def _table(parameters: list[Parameter]) -> list[str]:
    rows = ["| parameter | type | default | meaning |", "|---|---|---|---|"]
    for each in parameters:
        default = "required" if each.default is None else f"`{each.default}`"
        rows.append(f"| `{each.name}` | {_cell(each.kind)} | {_cell(default)} | {_cell(each.meaning)} |")
    return rows


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
