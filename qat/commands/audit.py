"""`data audit`: what is wrong with a set of conversations before anything is trained on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qat.commands.common import JsonOption, SetOption, emit, exits, print_pairs, print_table
from qat.commands.generate import DEFAULT_RECIPE, RecipeForData
from qat.errors import ExitCode, UserError

PARTS = ("schema", "replies", "duplicates", "tokens")
_FORMS = ("openai", "sharegpt", "alpaca")
_LONG = 16 << 20
"""Bytes from which on the audit takes long enough for a bar."""


@exits()
def audit(
    file: Annotated[Path, typer.Argument(help="Conversations: JSONL, JSON, Parquet, or a data set's folder.")],
    recipe: RecipeForData = DEFAULT_RECIPE,
    form: Annotated[
        str | None, typer.Option("--form", help=f"Form of the records: {', '.join(_FORMS)}; by default it is detected.")
    ] = None,
    suites: Annotated[
        list[str] | None,
        typer.Option("--suite", help="Suite that judges the replies and must not leak; repeatable. The recipe's."),
    ] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option("--accept", help="Fault that is no reason to fail, by its code or check; repeatable."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help=f"Part to look at ({', '.join(PARTS)}); repeatable. All.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the audit as a page that needs nothing else.")
    ] = None,
    overrides: SetOption = None,
    json_: JsonOption = False,
) -> ExitCode:
    """Audit conversations against a recipe's persona, suite and tokenizer; exit 1 where there are faults."""
    from qat.data.audit import Settings, audit_source
    from qat.data.records import Source
    from qat.data.schema import load_persona
    from qat.inputs import accepted_faults, demands_on_replies
    from qat.progress import progress_bar
    from qat.recipe.load import load_recipe

    parts = frozenset(_one_of(only or PARTS, PARTS, "--only"))
    if form is not None:
        _one_of([form], _FORMS, "--form")
    loaded = load_recipe(recipe, overrides or ())
    source = Source(file)
    tokenizer = None
    if "tokens" in parts:
        from qat.train.base import load_tokenizer, resolve_base

        tokenizer = load_tokenizer(loaded.base, resolve_base(loaded.base))
    settings = Settings(
        load_persona(loaded.persona),
        loaded.data.max_length,
        tokenizer,
        demands_on_replies(loaded, suites) if "replies" in parts else None,
        duplicates="duplicates" in parts,
        accept=accepted_faults([*loaded.data.accept, *(accept or ())]),
    )
    with progress_bar("audit", source.bytes, enabled=source.bytes > _LONG and not source.table) as progress:
        found = audit_source(source, settings, form, progress=progress)  # type: ignore[arg-type]
    result = found.to_json()
    if html is not None:
        from qat.report.audit import write_audit_page

        write_audit_page(html, file.name, result)
    emit(result, json_, lambda: _show(result, html))
    return ExitCode.FAIL if found.faults else ExitCode.DONE


def _one_of(values: list[str] | tuple[str, ...], known: tuple[str, ...], option: str) -> list[str]:
    for value in values:
        if value not in known:
            raise UserError("unknown value", where=option, value=value, remedy=f"known: {', '.join(known)}")
    return list(values)


def _show(result: Mapping[str, Any], html: Path | None) -> None:
    """The findings, worst first, then the numbers."""
    for finding in result["findings"]:
        print(f"{finding['severity']}: {finding['message']}  [{finding['code']}]")
        for example in finding["examples"][:5]:
            print(f"    {': '.join(part for part in (example['place'], example['detail']) if part)}")
    if not result["findings"]:
        print("no findings")
    print()
    tokens = result.get("tokens")
    if tokens:
        columns = ("category", "rows", "tokens", "supervised", "share", "rows cut", "turns cut", "turns lost")
        rows = [(*_token_row(name, table),) for name, table in tokens["by_category"].items()]
        print_table(columns, [*rows, _token_row("all", _sum(tokens["by_category"]))])
        print()
    print_pairs({name: value for name, value in result.items() if name not in _SHOWN} | _short(result))
    if html is not None:
        print(f"page: {html}")


_SHOWN = ("faults", "warnings", "findings", "tokens", "lengths", "user_turns", "repetition")


def _short(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers without what only a page or a program wants."""
    left_out = {"lengths": ("histogram",), "user_turns": ("families",), "tokens": ("by_category",)}
    short = {
        name: {key: value for key, value in result[name].items() if key not in keys}
        for name, keys in left_out.items()
        if name in result
    }
    if "repetition" in result:
        short["repetition"] = {name: _repetition(numbers) for name, numbers in result["repetition"].items()}
    return short


def _repetition(numbers: Mapping[str, Any]) -> str:
    again = f"{numbers['again']} equal or nearly equal to an earlier one ({numbers['method']})"
    return f"{numbers['distinct']} of {numbers['total']} distinct, {again}"


def _token_row(name: str, table: Mapping[str, Any]) -> tuple[str, ...]:
    share = table["supervised"] / table["tokens"] if table["tokens"] else 0.0
    counts = [str(table[key]) for key in ("cut_rows", "cut_turns", "lost_turns")]
    return (name, str(table["rows"]), str(table["tokens"]), str(table["supervised"]), f"{share:.1%}", *counts)


def _sum(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    keys = ("rows", "tokens", "supervised", "cut_rows", "cut_turns", "lost_turns")
    return {key: sum(table[key] for table in tables.values()) for key in keys}
