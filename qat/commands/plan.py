"""`plan`: what a recipe will take, before anything is downloaded or loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qat.commands.common import JsonOption, SetOption, emit, exits, print_pairs, print_table
from qat.errors import ExitCode, UserError

if TYPE_CHECKING:
    from qat.plan.estimate import PlanReport, StageEstimate
    from qat.plan.rehearse import RehearsedStage


@exits()
def plan(
    recipe: Annotated[str | None, typer.Option("--recipe", help="Shipped recipe or YAML file.")] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="h100, h200, b200 or dgx-spark; without it one line for each.")
    ] = None,
    overrides: SetOption = None,
    errors: Annotated[
        bool, typer.Option("--errors", help="How far off the estimate is on every measured case that it has not seen.")
    ] = False,
    json_: JsonOption = False,
) -> ExitCode:
    """Estimate hours, memory and disk of a recipe, without a GPU; exit 1 where a stage does not fit into its memory."""
    if errors:
        _show_errors(json_)
        return ExitCode.DONE
    if recipe is None:
        raise UserError("`qat plan` needs a recipe.", where="--recipe", remedy="qat recipes list")
    from qat.plan.estimate import plan as estimate
    from qat.plan.gpus import GPUS, find_gpu
    from qat.recipe.load import load_recipe

    read = load_recipe(recipe, overrides or ())
    reports = estimate(read, *([find_gpu(gpu)] if gpu else GPUS.values()))
    if gpu is None:
        emit([report.to_json() for report in reports], json_, lambda: _show_gpus(reports))
        return ExitCode.DONE
    emit(reports[0].to_json(), json_, lambda: _show(reports[0]))
    return ExitCode.DONE if reports[0].fits else ExitCode.FAIL


def _show_gpus(reports: list[PlanReport]) -> None:
    rows = []
    for report in reports:
        peak = max(stage.peak.total for stage in report.stages if stage.peak is not None) / (1 << 30)
        room = f"{peak:.1f} of {report.gpu.memory / (1 << 30):.1f}"
        rows.append((report.gpu.name, _hours(report.seconds), room, "yes" if report.fits else "no", report.basis))
    print_table(("gpu", "hours", "GiB at peak", "fits", "the hours rest on"), rows, left=("fits", "the hours rest on"))
    print(f"\nbase: {reports[0].parameters / 1e9:.2f} G parameters; details: --gpu {reports[0].gpu.name}")


def _show(report: PlanReport) -> None:
    print_pairs(
        {
            "recipe": report.recipe,
            "gpu": f"{report.gpu.title} ({report.gpu.source})",
            "base": f"{report.parameters / 1e9:.2f} G parameters, sizes from {report.shape}",
            "rows": report.rows,
            "hours rest on": report.basis,
        }
    )
    print()
    print_table(("stage", "hours", "GiB at peak", "spent on"), [_row(stage) for stage in report.stages], ("spent on",))
    print(f"\ntotal: {_hours(report.seconds)} hours, without {'; '.join(report.missing)}")
    disk = "; ".join(f"{name} {value / 1e9:.1f}" for name, value in report.disk.items())
    print(f"disk, GB: {disk}")
    for stage in report.stages:
        if not stage.fits:
            fitting = "; ".join(stage.would_fit) or "nothing smaller does"
            print(f"{stage.name} does not fit into {report.gpu.memory / (1 << 30):.1f} GiB; this would: {fitting}")


def _row(stage: StageEstimate) -> tuple[str, str, str, str]:
    peak = "--" if stage.peak is None else f"{stage.peak.total / (1 << 30):.1f}" + ("" if stage.fits else " !")
    spent = ", ".join(f"{name} {value:,.0f} s" for name, value in stage.parts.items())
    return stage.name, _hours(stage.seconds), peak, spent


def show_rehearsal(recipe: str | None, overrides: list[str] | None, as_json: bool) -> None:
    """`qat train --rehearse`: measure on this machine and print what the whole training takes."""
    if recipe is None:
        raise UserError("A rehearsal needs a recipe.", where="--recipe", remedy="qat recipes list")
    from qat.plan.rehearse import rehearse
    from qat.recipe.load import load_recipe

    def told(stage: RehearsedStage) -> None:
        how = "by what was measured before"
        if stage.peak_gib is not None:
            how = f"{stage.peak_gib:.1f} GiB, measured in {stage.took:.0f} s"
        typer.echo(f"{stage.name}: {how}", err=True)

    done = rehearse(load_recipe(recipe, overrides or ()), told)

    def text() -> None:
        print_pairs({"recipe": done.recipe, "device": done.device, "base": done.shape, "rows": done.rows})
        print()
        rows = [
            (
                stage.name,
                _hours(stage.seconds),
                "--" if stage.peak_gib is None else f"{stage.peak_gib:.2f}",
                ", ".join(f"{name} {value:,.0f} s" for name, value in stage.parts.items()),
            )
            for stage in done.stages
        ]
        print_table(("stage", "hours", "GiB at peak", "projected"), rows, ("projected",))
        print(f"\ntotal: {_hours(done.seconds)} hours; {done.to_json()['how']}")

    emit(done.to_json(), as_json, text)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f}"


def _show_errors(as_json: bool) -> None:
    from qat.plan.check import error_rows, memory_rows

    timed, held = error_rows(), memory_rows()

    def text() -> None:
        print_table(("measured step", "measured s", "estimated s", "error"), [row.cells() for row in timed])
        print()
        print_table(("measured peak", "measured GiB", "estimated GiB", "error"), [row.cells() for row in held])

    emit({"seconds": [row._asdict() for row in timed], "gib": [row._asdict() for row in held]}, as_json, text)
