"""`patches list`, `patches check`, `patches explain`: defects of the libraries below, and what repairs them."""

from __future__ import annotations

import difflib
from typing import Annotated

import typer

from qat.commands.common import JsonOption, emit, exits, print_pairs, print_table
from qat.errors import ExitCode, UserError

app = typer.Typer(no_args_is_help=True, help="Defects of the libraries below and their repairs.")
_FIELDS = ("name", "title", "affects", "breaks", "upstream")


@app.command("list")
@exits()
def list_(json_: JsonOption = False) -> ExitCode:
    """List the known defects."""
    from qat.patches.registry import all_patches

    rows = [{field: str(getattr(patch, field)) for field in _FIELDS} for patch in all_patches()]
    emit(
        rows,
        json_,
        lambda: print_table(("patch", "title"), [(row["name"], row["title"]) for row in rows], left=("title",)),
    )
    return ExitCode.DONE


@app.command("check")
@exits()
def check(json_: JsonOption = False) -> ExitCode:
    """Probe every defect in the installed versions; exit 1 where a probe cannot tell."""
    from qat.patches.protocol import Status
    from qat.patches.registry import all_patches

    probed = [(patch.name, patch.probe()) for patch in all_patches()]
    rows = [{"name": name, "status": str(found.status), "detail": found.detail} for name, found in probed]

    def text() -> None:
        cells = [(row["name"], row["status"], row["detail"]) for row in rows]
        print_table(("patch", "status", "detail"), cells, left=("status", "detail"))

    emit(rows, json_, text)
    return ExitCode.FAIL if any(found.status is Status.CANNOT_TELL for _, found in probed) else ExitCode.DONE


@app.command("explain")
@exits()
def explain(
    name: Annotated[str, typer.Argument(help="Name of the patch, as `qat patches list` prints it.")],
    json_: JsonOption = False,
) -> ExitCode:
    """Say what a defect breaks, in which versions, and where it is reported."""
    from qat.patches.registry import all_patches

    known = {patch.name: patch for patch in all_patches()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError("no patch of this name", value=name, remedy=f"{hint}known: {', '.join(known)}")
    patch = known[name]
    result = {field: str(getattr(patch, field)) for field in _FIELDS}
    emit(result, json_, lambda: print_pairs(result))
    return ExitCode.DONE
