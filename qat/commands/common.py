"""What the commands share: options that mean one thing everywhere, exit codes, results as text or JSON."""

from __future__ import annotations

import functools
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from qat.errors import ExitCode, UserError

if TYPE_CHECKING:
    from qat.recipe.schema import Recipe
    from qat.runs import Run

P = ParamSpec("P")

arguments: ContextVar[tuple[str, ...]] = ContextVar("arguments", default=())
"""What stood behind `qat` on the command line, to say how an interrupted run is resumed."""

RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="Shipped recipe or YAML file; without it the recipe of the run.")
]
RunOption = Annotated[
    str | None, typer.Option("--run", help="Name of the run; by default the recipe's, or the latest run.")
]
RunsDirOption = Annotated[Path, typer.Option("--runs-dir", help="Folder of all runs.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Throw away what an earlier call left in the run.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the recipe: train.sft.epochs=2; repeatable.")
]
AllowPythonOption = Annotated[
    bool, typer.Option("--allow-python", help="Run the code that `python` checks of the suite name; read it first.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RUNS = Path("runs")


def exits(*, resumable: bool = False) -> Callable[[Callable[P, ExitCode]], Callable[P, None]]:
    """Make a command end with its exit code: the returned one, 2 for a `UserError`, 130 when interrupted.

    Args:
        resumable: An interrupted call goes on where it was when it is repeated; say so.
    """

    def decorate(command: Callable[P, ExitCode]) -> Callable[P, None]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                code = command(*args, **kwargs)
            except UserError as error:
                print(f"error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
                code = ExitCode.USER_ERROR
            except KeyboardInterrupt:
                again = [argument for argument in arguments.get() if argument != "--fresh"]
                print(
                    f"interrupted; resume with: qat {shlex.join(again)}" if resumable else "interrupted",
                    file=sys.stderr,
                )
                code = ExitCode.INTERRUPTED
            raise typer.Exit(int(code))

        return run

    return decorate


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: stages are marked, servers stopped, nothing is left half-written."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def emit(result: object, as_json: bool, text: Callable[[], None]) -> None:
    """Print a result: JSON alone on standard output, or whatever `text` prints."""
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        text()


def user_code(suite: str, allowed: bool) -> AbstractContextManager[None]:
    """Inside, the suite of this name may bind checks that run code of whoever wrote it, where that is allowed."""
    if not allowed:
        return nullcontext()
    from qat.behavior.checks.user_code import allow_user_code

    return allow_user_code(Path(suite).resolve().parent)


def open_run(
    recipe: str | None, run: str | None, runs_dir: Path, fresh: bool = False, overrides: Sequence[str] | None = None
) -> Run:
    """The run that the options name, locked.

    A recipe opens or makes the run of its name; without one the named or latest run goes on with its own recipe.
    """
    from qat.recipe.load import load_recipe
    from qat.runs import Run

    if recipe is not None:
        return Run.open(load_recipe(recipe, overrides or ()), runs_dir, run, fresh)
    folder = existing_run(run, runs_dir)
    return Run.open(run_recipe(folder, overrides), folder.parent, folder.name, fresh)


def existing_run(run: str | None, runs_dir: Path) -> Path:
    """Folder of the named run, or of the latest."""
    from qat.runs import RECIPE, Run, run_folder

    if run is None:
        return Run.latest(runs_dir)
    folder = run_folder(runs_dir, run)
    if not (folder / RECIPE).is_file():
        known = sorted(path.parent.name for path in runs_dir.glob(f"*/{RECIPE}"))
        remedy = f"runs here: {', '.join(known)}" if known else "start one: qat run --recipe annie_tiny"
        raise UserError("there is no run of this name", where=str(runs_dir), value=run, remedy=remedy)
    return folder


def run_recipe(folder: Path, overrides: Sequence[str] | None = None) -> Recipe:
    """The recipe that a run keeps."""
    from qat.recipe.load import load_recipe
    from qat.runs import RECIPE

    return load_recipe(folder / RECIPE, overrides or ())


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> None:
    """A table on standard output; the first column and those in `left` are text, the others figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or column in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # A pipe or log has no width of its own; 80 columns would fold the table.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140)
    console.print(table)


def print_pairs(pairs: dict[str, Any]) -> None:
    """Aligned `name  value` lines; mappings are indented below their name, lists joined."""
    width = max((len(name) for name in pairs), default=0)
    for name, value in pairs.items():
        if isinstance(value, dict):
            print(name)
            inner_width = max((len(str(inner)) for inner in value), default=0)
            for inner, detail in value.items():
                print(f"  {inner:<{inner_width}}  {detail}")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            print(f"{name:<{width}}  {shown}")


def difference(entry: dict[str, Any] | None) -> str:
    """A comparison's difference and interval in percentage points; says so where there are too few cases."""
    if entry is None:
        return "--"
    if entry.get("ci_low") is None or entry.get("difference") is None:
        return "too few"
    return f"{100 * entry['difference']:+.1f} [{100 * entry['ci_low']:+.1f}, {100 * entry['ci_high']:+.1f}]"


def divergence_line(found: dict[str, Any]) -> str:
    """KL and top-1 agreement on the reference's replies (`<arm>.divergence.json`) in one line."""
    error = "" if found["kl_se"] is None else f" (standard error {found['kl_se']:.4f})"
    unscored = f", {found['unscored']} replies not scored" if found["unscored"] else ""
    return (
        f"KL to {found['reference']} on its own {found['sampling']} replies: {found['kl']:.4f} nats a token{error}, "
        f"top-1 agreement {100 * found['top1']:.1f} %, {found['tokens']} tokens of {found['cases']} cases, "
        f"{100 * found['rest']:.2g} % of the mass beyond the lists{unscored}"
    )
