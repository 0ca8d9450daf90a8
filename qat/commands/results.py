"""`compare` and `env`: two results side by side, this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from qat.commands.common import (
    RUNS,
    JsonOption,
    RunOption,
    RunsDirOption,
    difference,
    divergence_line,
    emit,
    existing_run,
    exits,
    print_pairs,
    print_table,
)
from qat.errors import ExitCode, UserError


@exits()
def compare(
    a: Annotated[str, typer.Argument(help="Arm of the run, or a results file.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Arm of the run, or a results file.", metavar="B")],
    run: RunOption = None,
    runs_dir: RunsDirOption = RUNS,
    sampling: Annotated[str | None, typer.Option("--sampling", help="Only this one; by default all.")] = None,
    margin: Annotated[float, typer.Option("--margin", help="Of equivalence, as a share.", min=0.001, max=0.5)] = 0.03,
    json_: JsonOption = False,
) -> ExitCode:
    """Compare A with the reference B, case by case."""
    from qat.behavior.compare import compare as compare_results

    arm, reference = (results_of(name, run, runs_dir) for name in (a, b))
    found = compare_results(reference, arm, sampling=sampling, margin=margin)
    drift = _divergence(arm, found[0].reference)
    result: dict[str, Any] = {"a": str(arm), "b": str(reference), "comparisons": [entry.to_json() for entry in found]}
    if drift is not None:
        result["divergence"] = drift

    def text() -> None:
        columns = ("sampling", "pairs", "A minus B", "only A passes", "only B passes", "A against itself",
                   "B against itself", "McNemar p", "equivalent")  # fmt: skip
        print_table(columns, [_row(entry.to_json()) for entry in found])
        for entry in found:
            print(f"{entry.sampling}: only {b} passes: {', '.join(entry.flips_worse) or '--'}")
            print(f"{entry.sampling}: only {a} passes: {', '.join(entry.flips_better) or '--'}")
        if drift is not None:
            print(divergence_line(drift))

    emit(result, json_, text)
    return ExitCode.DONE


def _divergence(arm: Path, reference: str) -> dict[str, Any] | None:
    """What was measured of the arm on the reference's replies; None where nothing was, or against another one."""
    from qat.behavior.records import divergence_path

    path = divergence_path(arm)
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found if found["reference"] == reference else None
    except (ValueError, LookupError, TypeError) as error:
        raise UserError("The divergence of the arm cannot be read.", where=str(path), value=str(error)) from error


def _row(entry: dict[str, Any]) -> list[str]:
    p_value, equivalent = entry["p_mcnemar"], entry["equivalent"]
    return [
        entry["sampling"],
        str(entry["pairs"]),
        difference(entry),
        str(len(entry["flips_better"])),
        str(len(entry["flips_worse"])),
        _self_flips(entry["self_flips"]),
        _self_flips(entry["reference_self_flips"]),
        "--" if p_value is None else f"{p_value:.3g}",
        "--"
        if equivalent is None
        else f"{'yes' if equivalent else 'not shown'} within {100 * entry['margin']:g} points",
    ]


def _self_flips(found: dict[str, Any] | None) -> str:
    """Flips of an arm that was asked twice; `--` where it was not."""
    return "--" if found is None else f"{found['flips']}/{found['pairs']}"


def results_of(name: str, run: str | None, runs_dir: Path) -> Path:
    """The result file that an argument names: an arm of a run, or the path of a `.jsonl` file."""
    if name.endswith(".jsonl"):
        path = Path(name)
        if not path.is_file():
            raise UserError("no such results file", where=name)
        return path
    folder = existing_run(run, runs_dir)
    path = folder / "behavior" / f"{name}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in (folder / "behavior").glob("*.jsonl"))) or "none yet"
        raise UserError("no results of this arm", where=str(folder), value=name, remedy=f"arms with results: {known}")
    return path


@exits()
def env(json_: JsonOption = False) -> ExitCode:
    """Show versions, processor, memory and disk of this machine."""
    import os
    import shutil

    import qat
    from qat.receipt import environment

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    result = {
        "qat": qat.__version__,
        **environment(),
        "memory_gb": round(memory / 1e9, 1),
        "free_disk_gb": round(shutil.disk_usage(".").free / 1e9, 1),
    }
    emit(result, json_, lambda: print_pairs(result))
    return ExitCode.DONE
