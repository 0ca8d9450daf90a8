"""What every chat template in a folder can do, as a page: docs/chat_templates.md is this over real templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from qat.data.templates import Survey, survey
from qat.errors import UserError

_COLUMNS = ("template", "plain", "mapping", "string", "normalised", "marks", "empty think", "why not")
_YES, _NO = "yes", "–"


class Row(NamedTuple):
    """One template.

    Attributes:
        name: Its path below the folder.
        found: What it can do; None where it was stopped.
        refusal: Why it was stopped.
    """

    name: str
    found: Survey | None
    refusal: str = ""


def templates_in(folder: Path) -> dict[str, str]:
    """Every chat template below a folder: `*.jinja` files, and what `tokenizer_config.json` files hold.

    Args:
        folder: Searched at any depth.

    Returns:
        Path below the folder -> text, sorted; `path#name` where a tokenizer has several.

    Raises:
        UserError: There is none.
    """
    found = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*.jinja")}
    for path in folder.rglob("tokenizer_config.json"):
        held = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        name = str(path.relative_to(folder))
        if isinstance(held, str):
            found[name] = held
        elif isinstance(held, list):
            found |= {f"{name}#{one['name']}": one["template"] for one in held}
    if not found:
        raise UserError("There is no chat template in this folder.", where=str(folder))
    return dict(sorted(found.items()))


def rows(templates: Mapping[str, str]) -> list[Row]:
    """Survey templates, two at a time (each in a process of its own)."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(_row, templates.items()))


def page(table: list[Row]) -> str:
    """The table as Markdown, with its sums.

    Args:
        table: From `rows`.
    """
    known = [row.found for row in table if row.found]
    can = [found for found in known if not found.normalised]
    wrong = sum(_word(found.string) == "wrong" for found in can)
    sums = [
        f"{len(table)} templates.",
        f"{sum(not found.plain for found in known)} render a plain conversation,",
        f"{len(can)} a tool conversation once it is read;",
        f"with JSON strings as they stand in the file only {sum(not found.string for found in known)} do:",
        f"of the {len(can)}, {wrong} then write a wrong text without an error and",
        f"{sum(bool(found.string) for found in can) - wrong} refuse.",
        f"{sum(found.marked for found in known)} mark what the assistant wrote;",
        f"{sum(found.empty_think for found in known)} of these supervise an empty think block.",
    ]
    lines = [" ".join(sums), "", f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(row))} |" for row in table)]) + "\n"


def _row(entry: tuple[str, str]) -> Row:
    name, text = entry
    try:
        return Row(name, survey(text))
    except UserError as error:
        return Row(name, None, f"{error.what} {error.value}")


def _cells(row: Row) -> list[str]:
    found = row.found
    if found is None:
        return [f"`{row.name}`", *(_NO for _ in _COLUMNS[2:]), _escaped(row.refusal)]
    able = (found.plain, found.mapping, found.string, found.normalised)
    marks = [_NO, ""] if not found.marked else [_YES, "supervised" if found.empty_think else _NO]
    return [
        f"`{row.name}`",
        *map(_word, able),
        *marks,
        _escaped(found.reason or found.plain),
    ]


def _word(fault: str) -> str:
    if "quoted string" in fault or "another text" in fault:
        return "wrong"
    return _NO if fault else _YES


def _escaped(text: str) -> str:
    """On one line, at most 160 characters, and nothing in it that Markdown reads."""
    line = " ".join(text.split())
    line = line if len(line) <= 160 else line[:159] + "…"
    return "".join(f"\\{c}" if c in "\\|`*_<{&" else c for c in line)
