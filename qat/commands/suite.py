"""`suite`: what a suite asks, and result files of shards joined."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from qat.commands.common import AllowPythonOption, JsonOption, emit, exits, print_pairs, user_code
from qat.errors import ExitCode

app = typer.Typer(help="Check a suite, and join the results of its shards.", no_args_is_help=True,
                  rich_markup_mode=None)  # fmt: skip


@app.command("check")
@exits()
def check(
    suite: Annotated[str, typer.Argument(help="Shipped suite, or a YAML file.", metavar="SUITE")],
    allow_python: AllowPythonOption = False,
    json_: JsonOption = False,
) -> ExitCode:
    """Read a suite; show its version and hash, as `include` pins them, and its cases by category."""
    from qat.behavior.suite import load_suite

    with user_code(suite, allow_python):
        found = load_suite(suite)
    result = {
        "name": found.name,
        "version": found.version,
        "sha256": found.sha256,
        "persona": found.persona,
        "cases": len(found.cases),
        "categories": dict(Counter(case.category for case in found.cases)),
    }
    categories = ", ".join(f"{name} {count}" for name, count in Counter(c.category for c in found.cases).items())
    emit(result, json_, lambda: print_pairs(result | {"categories": categories}))
    return ExitCode.DONE


@app.command("merge")
@exits()
def merge(
    out: Annotated[Path, typer.Argument(help="Result file to write.", metavar="OUT")],
    parts: Annotated[list[Path], typer.Argument(help="Result files of the shards.", metavar="PART")],
    json_: JsonOption = False,
) -> ExitCode:
    """Join the results of shards of one arm, as if they had been asked in one run."""
    from qat.behavior.selection import merge_results

    result = {"results": str(out), "answers": merge_results(parts, out)}
    emit(result, json_, lambda: print_pairs(result))
    return ExitCode.DONE
