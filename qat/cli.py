"""The command line: what is registered, and nothing else; `tests/unit/cli/surface.json` freezes it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import qat
from qat.commands import (
    baseline,
    calibrate,
    common,
    conversations,
    doctor,
    endpoint,
    engine,
    fetch,
    patches,
    pipeline,
    plan,
    recipes,
    results,
    suite,
)
from qat.commands import eval as evaluation

app = typer.Typer(
    name="qat",
    help="Ship a chat persona at four bits and prove that it still behaves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug keeps its plain traceback
    rich_markup_mode=None,  # help in plain text starts in a third of the time
    context_settings={"max_content_width": 120},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(qat.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Ship a chat persona at four bits and prove that it still behaves."""


for command in (
    pipeline.run,
    pipeline.train,
    calibrate.sensitivity,
    pipeline.export,
    endpoint.serve,
    pipeline.test,
    pipeline.report,
    recipes.validate,
    plan.plan,
    fetch.fetch,
    doctor.doctor,
    results.compare,
    endpoint.chat,
    results.env,
):
    app.command(command.__name__)(command)
app.add_typer(recipes.app, name="recipes")
app.add_typer(conversations.app, name="data")
app.add_typer(suite.app, name="suite")
app.add_typer(evaluation.app, name="eval")
app.add_typer(baseline.app, name="baseline")
app.add_typer(engine.app, name="engine")
app.add_typer(patches.app, name="patches")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: What stands behind `qat`; by default the process's own arguments.

    Returns:
        The exit code (`qat.errors.ExitCode`); a bug leaves with its traceback instead.
    """
    # Idle OpenMP threads spin before they sleep; beside any other busy process that makes every parallel region wait
    # for the scheduler (1.5 s instead of 1.0 s a training step, measured). libgomp reads this once, as torch loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    given = tuple(sys.argv[1:] if argv is None else argv)
    token = common.arguments.set(given)
    try:
        app(list(given), prog_name="qat")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    finally:
        common.arguments.reset(token)
    return 0
