"""`patches list`, `patches check`, `patches explain`: defects of the libraries below, and what repairs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat.commands.common import JsonOption, emit, exits, print_pairs, print_table
from qat.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qat.patches.check import Checked
    from qat.patches.protocol import Defect

app = typer.Typer(no_args_is_help=True, help="Defects of the libraries below and their repairs.")
_FIELDS = ("name", "title", "breaks", "upstream", "affects", "repair")
NamesArgument = Annotated[list[str] | None, typer.Argument(help="Names of defects; without one, all.")]


@app.command("list")
@exits()
def list_(
    evidence: Annotated[bool, typer.Option("--evidence", help="Say what each probe observed.")] = False,
    json_: JsonOption = False,
) -> ExitCode:
    """List the known defects: whether each is present in the installed versions, and what qat does about it.

    What was found before under the same versions and hardware is not looked for again.
    """
    found = _check((), use_cache=True)
    rows = [{**about(defect), **checked.to_json()} for defect, checked in found]

    def text() -> None:
        cells = [(checked.name, _here(checked), checked.outcome, _versions(checked)) for _, checked in found]
        print_table(("defect", "here", "qat", "versions"), cells, left=("here", "qat", "versions"))
        for _, checked in found if evidence else ():
            print(f"\n{checked.name}\n  {checked.evidence}")
            if checked.repaired:
                print(f"  {checked.outcome}: {checked.repaired}")
        _print_counts([checked for _, checked in found])

    emit(rows, json_, text)
    return ExitCode.DONE


@app.command("check")
@exits()
def check(
    names: NamesArgument = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Look again at what was found before.")] = False,
    json_: JsonOption = False,
) -> ExitCode:
    """Look for defects and try their repairs, each in a process of its own; exit 1 where a repair does not help."""
    found = [checked for _, checked in _check(names or (), use_cache=not no_cache)]

    def text() -> None:
        cells = [
            (
                checked.name,
                _here(checked),
                checked.outcome,
                "known" if checked.remembered else f"{checked.seconds:.1f}",
                checked.repaired or checked.evidence,
            )
            for checked in found
        ]
        print_table(("defect", "here", "qat", "seconds", "observed"), cells, left=("here", "qat", "observed"))
        _print_counts(found)

    emit([checked.to_json() for checked in found], json_, text)
    return ExitCode.FAIL if any(checked.failed for checked in found) else ExitCode.DONE


@app.command("explain")
@exits()
def explain(
    name: Annotated[str, typer.Argument(help="Name of the defect, as `qat patches list` prints it.")],
    json_: JsonOption = False,
) -> ExitCode:
    """Say what a defect breaks, in which versions, where it is reported, and what to do about it."""
    from qat.patches.cache import versions
    from qat.patches.registry import find

    (defect,) = find(name)
    result = {**about(defect), "installed": versions(defect)}
    emit(result, json_, lambda: print_pairs(result))
    return ExitCode.DONE


def about(defect: Defect) -> dict[str, Any]:
    """What a defect says of itself, jsonable."""
    return {**{field: getattr(defect, field) for field in _FIELDS}, "place": defect.place.value}


def _check(names: Sequence[str], *, use_cache: bool) -> list[tuple[Defect, Checked]]:
    from qat.patches.check import look, recall
    from qat.patches.registry import all_defects, find
    from qat.progress import progress_bar

    defects = find(*names) if names else all_defects()
    found = {defect.name: known for defect in defects if use_cache and (known := recall(defect)) is not None}
    missing = [defect for defect in defects if defect.name not in found]
    if missing:
        with progress_bar("looking for defects", len(missing)) as bar:
            for done, checked in enumerate(look(missing), 1):
                found[checked.name] = checked
                bar.update(done, checked.name)
    return [(defect, found[defect.name]) for defect in defects]


def _here(checked: Checked) -> str:
    return checked.status.value.replace("_", " ")


def _versions(checked: Checked) -> str:
    return ", ".join(f"{library} {version}" for library, version in checked.versions.items() if version != "absent")


def _print_counts(found: Sequence[Checked]) -> None:
    words = [checked.outcome or _here(checked) for checked in found]
    print("\n" + ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(sorted(words))))
