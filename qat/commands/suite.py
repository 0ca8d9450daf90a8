"""`suite`: what a suite asks, and result files of shards joined."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from qat.commands.common import AllowPythonOption, JsonOption, emit, exits, print_pairs, print_table, user_code
from qat.errors import ExitCode, UserError

app = typer.Typer(help="Check a suite, join the results of its shards, and hold its checks against a reader.",
                  no_args_is_help=True, rich_markup_mode=None)  # fmt: skip


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


@app.command("checks")
@exits()
def checks(
    name: Annotated[str | None, typer.Argument(help="One check; by default all.", metavar="NAME")] = None,
    json_: JsonOption = False,
) -> ExitCode:
    """List the checks that a suite may name, or show what one demands and its parameters."""
    from qat.behavior.reference import describe, suite_checks

    try:
        found = [describe(each) for each in ([name] if name else suite_checks())]
    except ValueError as error:
        raise UserError("There is no such check.", value=str(error)) from error
    result = [one._asdict() | {"parameters": [each._asdict() for each in one.parameters]} for one in found]

    def text() -> None:
        if name is None:
            rows = [(one.name, one.text.partition("\n")[0]) for one in found]
            print_table(("check", "demands"), rows, left=("demands",))
            return
        print("\n\n".join(part for part in (found[0].text, found[0].about) if part))
        for each in found[0].parameters:
            given = "required" if each.default is None else f"default {each.default}"
            print(f"  {each.name}: {each.kind}, {given}" + (f"; {each.meaning}" if each.meaning else ""))

    emit(result, json_, text)
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


@app.command("label")
@exits()
def label(
    results: Annotated[Path, typer.Argument(help="Result file to draw replies from.", metavar="RESULTS")],
    out: Annotated[Path, typer.Argument(help="File of replies to write, one a line.", metavar="OUT")],
    suite: Annotated[str, typer.Option("--suite", help="That the results answer.")],
    check: Annotated[str, typer.Option("--check", help="Whose verdicts are to be compared with yours.")] = "judge",
    n: Annotated[int, typer.Option("--n", help="Most replies.", min=1)] = 100,
    allow_python: AllowPythonOption = False,
    json_: JsonOption = False,
) -> ExitCode:
    """Draw replies for a reader to judge: write pass or fail in the place of null at the end of each line."""
    from qat.behavior.labelling import write_sheet
    from qat.behavior.suite import load_suite

    with user_code(suite, allow_python):
        drawn = write_sheet(load_suite(suite), results, check, out, n, seed=0)
    result = {"replies": str(out), "check": check, "drawn": drawn}
    emit(result, json_, lambda: print_pairs(result))
    return ExitCode.DONE


@app.command("agree")
@exits()
def agree(
    labels: Annotated[Path, typer.Argument(help="Labelled replies.", metavar="LABELS")],
    url: Annotated[str | None, typer.Option("--url", help="Another judge's server, on the same labels.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Another judge's name there.")] = None,
    allow_python: AllowPythonOption = False,
    json_: JsonOption = False,
) -> ExitCode:
    """Compare the verdicts of checks, a judge's among them, with a reader's: precision, recall, agreement, kappa."""
    from qat.behavior.labelling import compare_with_reader, read_sheet

    sheet = read_sheet(labels)
    if not sheet.records:
        raise UserError("No reply has a label yet.", where=str(labels), value=f"{sheet.open} are open",
                        remedy="write pass or fail in the place of null")  # fmt: skip
    judge = {key: value for key, value in (("url", url), ("model", model)) if value is not None}
    with user_code(str(labels), allow_python):
        found = compare_with_reader(sheet.records, {"judge": judge})
    result: dict[str, Any] = {"labels": str(labels), "open": sheet.open, "checks": {}}
    for name, one in found.items():
        quality, kappa = one.quality, one.agreement
        result["checks"][name] = {
            **quality._asdict(), "precision": quality.precision._asdict(), "recall": quality.recall._asdict(),
            "equal": one.equal._asdict(), "kappa": kappa and kappa.kappa,
            "kappa_interval": kappa and kappa.interval and kappa.interval._asdict(), "errors": one.errors,
        }  # fmt: skip
    emit(result, json_, lambda: _print_agreement(result))
    return ExitCode.DONE


def _print_agreement(result: dict[str, Any]) -> None:
    columns = ("check", "replies", "faults", "precision, %", "recall, %", "equal verdicts, %", "kappa", "errors")
    rows = []
    for name, found in result["checks"].items():
        shares = (_share(found[key]) for key in ("precision", "recall", "equal"))
        rows.append((name, str(found["n"]), str(found["faulty"]), *shares, _kappa(found), str(len(found["errors"]))))
    print_table(columns, rows)
    for name, found in result["checks"].items():
        for what, key in (("fails, the reader passes", "false_alarms"), ("passes, the reader fails", "missed")):
            if found[key]:
                print(f"{name} {what}: {', '.join(found[key])}")
        for reply, reason in found["errors"].items():
            print(f"{name} could not judge {reply}: {reason}")
    if result["open"]:
        print(f"{result['open']} labels are still open")


def _share(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "--"
    return f"{100 * found['value']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def _kappa(found: dict[str, Any]) -> str:
    if found["kappa"] is None:
        return "--"
    ends = found["kappa_interval"]
    return f"{found['kappa']:.2f}" + ("" if ends is None else f" ({ends['low']:.2f} to {ends['high']:.2f})")
