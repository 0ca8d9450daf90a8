"""`run`, `train`, `export`, `test`, `report`: the chain and its parts on one run folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat.commands.common import (
    RUNS,
    AllowPythonOption,
    FreshOption,
    JsonOption,
    RecipeOption,
    RunOption,
    RunsDirOption,
    SetOption,
    difference,
    emit,
    existing_run,
    exits,
    open_run,
    print_table,
    run_recipe,
    terminable,
    user_code,
)
from qat.errors import ExitCode, UserError

if TYPE_CHECKING:
    from qat.recipe.schema import BehaviorBlock
    from qat.runs import Run


class Format(StrEnum):
    """What `qat export` writes."""

    NVFP4 = "nvfp4"
    BF16 = "bf16"


_EXIT_OF = {"PASS": ExitCode.DONE, "FAIL": ExitCode.FAIL, "INCONCLUSIVE": ExitCode.INCONCLUSIVE}


@exits(resumable=True)
def run(
    recipe: RecipeOption = None,
    run: RunOption = None,
    runs_dir: RunsDirOption = RUNS,
    fresh: FreshOption = False,
    overrides: SetOption = None,
    allow_python: AllowPythonOption = False,
    json_: JsonOption = False,
) -> ExitCode:
    """Run the whole chain, from the data to the verdict; an earlier call's finished stages are kept."""
    with terminable(), open_run(recipe, run, runs_dir, fresh, overrides) as opened:
        from qat import chain

        with user_code(opened.recipe.behavior.suite, allow_python):
            chain.run_all(opened)
        return _show_verdict(opened.folder, json_)


@exits(resumable=True)
def train(
    recipe: RecipeOption = None,
    run: RunOption = None,
    runs_dir: RunsDirOption = RUNS,
    fresh: FreshOption = False,
    overrides: SetOption = None,
    gpus: Annotated[
        int, typer.Option("--gpus", help="Fine-tune and distil on so many GPUs, on all machines together.", min=1)
    ] = 1,
    launch_flags: Annotated[
        str, typer.Option("--launch-flags", help="For `accelerate launch`, such as those of several machines.")
    ] = "",
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Time a few steps on random weights and project the training; no run.")
    ] = False,
    json_: JsonOption = False,
) -> ExitCode:
    """Prepare the data, fine-tune, calibrate and distil; measure the divergence of every arm."""
    if rehearse:
        from qat.commands.plan import show_rehearsal

        with terminable():
            show_rehearsal(recipe, overrides, json_)
        return ExitCode.DONE
    with terminable(), open_run(recipe, run, runs_dir, fresh, overrides) as opened:
        from qat import chain
        from qat.train.launch import Processes

        chain.train(opened, Processes(gpus, tuple(shlex.split(launch_flags))))
        _show_stages(opened, json_)
    return ExitCode.DONE


@exits(resumable=True)
def export(
    format_: Annotated[
        Format | None, typer.Option("--format", help="Only arms of this format; by default all.")
    ] = None,
    recipe: RecipeOption = None,
    run: RunOption = None,
    runs_dir: RunsDirOption = RUNS,
    overrides: SetOption = None,
    json_: JsonOption = False,
) -> ExitCode:
    """Write deployable checkpoints of a trained run; the base arm is served from its own folder."""
    with terminable(), open_run(recipe, run, runs_dir, overrides=overrides) as opened:
        from qat import chain

        kinds = {Format.NVFP4: chain.NVFP4_KINDS, Format.BF16: ("persona",), None: ("persona", *chain.NVFP4_KINDS)}
        arms = [arm for arm in opened.recipe.arms if arm.kind in kinds[format_]]
        folders = dict(zip([arm.name for arm in arms], chain.export_arms(opened, arms), strict=True))
        result = {"run": str(opened.folder), "arms": {name: str(folder) for name, folder in folders.items()}}

        def text() -> None:
            print_table(
                ("arm", "MB", "folder"),
                [(name, f"{_megabytes(opened, name):,.1f}", str(folder)) for name, folder in folders.items()],
            )

        emit(result, json_, text)
    return ExitCode.DONE


@exits(resumable=True)
def test(
    recipe: RecipeOption = None,
    run: RunOption = None,
    runs_dir: RunsDirOption = RUNS,
    overrides: SetOption = None,
    power: Annotated[bool, typer.Option("--power", help="Only say how many cases and repeats are needed.")] = False,
    drop: Annotated[
        float | None, typer.Option("--drop", help="That --power shall show, as a share.", min=0.001, max=0.5)
    ] = None,
    power_target: Annotated[
        float | None, typer.Option("--power-target", help="Chance to show it; by default 0.8.", min=0.5, max=0.999)
    ] = None,
    flips: Annotated[
        float | None,
        typer.Option("--flips", help="Share that flips each way without any change.", min=0.0, max=0.25),
    ] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", help="That --power measures the flips in.")] = None,
    url: Annotated[str | None, typer.Option("--url", help="Test the model behind this URL and no run.")] = None,
    suite: Annotated[str | None, typer.Option("--suite", help="For --url or --power; by default the recipe's.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Name at --url; by default its first.")] = None,
    repeats: Annotated[int, typer.Option("--n", help="For --url: ask everything so often.", min=1, max=100)] = 1,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="For --url: cases of this id, category or tag (* allowed).")
    ] = None,
    shard: Annotated[str | None, typer.Option("--shard", help="For --url: the i-th of n parts, as i/n.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Result file of --url; continued where it exists.")] = None,
    divergence_from: Annotated[
        Path | None,
        typer.Option("--divergence-from", help="For --url: KL on the replies in this result file; --out's: reference."),
    ] = None,
    allow_python: AllowPythonOption = False,
    json_: JsonOption = False,
) -> ExitCode:
    """Serve every exported arm in turn, run the suite on it and judge; exit 0 PASS, 1 FAIL, 3 INCONCLUSIVE."""
    if url is not None:
        from qat.commands.ask import Wanted, ask_endpoint

        if power or run is not None:
            raise UserError("--url tests an endpoint alone.", remedy="leave --power and --run out")
        asked = (url, suite, model, recipe, overrides or (), repeats, only or (), shard, out)
        return ask_endpoint(Wanted(*asked, divergence_from, allow_python), json_)
    misplaced = any(given is not None for given in (None if power else suite, model, only, shard, out, divergence_from))
    if repeats != 1 or misplaced:
        raise UserError(
            "--suite, --model, --n, --only, --shard, --out and --divergence-from belong to --url.", remedy="add --url"
        )
    if power:
        from qat.commands.power import show_power

        block, results = _to_be_asked(recipe, run, runs_dir, overrides or (), suite)
        with user_code(block.suite, allow_python):
            return show_power(block, results, drop, power_target or 0.8, flips, baseline, json_)
    if any(given is not None for given in (drop, power_target, flips, baseline)):
        raise UserError("--drop, --power-target, --flips and --baseline belong to --power.", remedy="add --power")
    with terminable(), open_run(recipe, run, runs_dir, overrides=overrides) as opened:
        from qat import chain

        with user_code(opened.recipe.behavior.suite, allow_python):
            chain.judge(opened)
        return _show_verdict(opened.folder, json_)


def _to_be_asked(
    recipe: str | None, run: str | None, runs_dir: Path, overrides: Sequence[str], suite: str | None
) -> tuple[BehaviorBlock, Path | None]:
    """What `--power` plans for, and the folder of earlier answers to it; a suite named by itself has none."""
    if suite is not None:
        from qat.commands.ask import asked_block

        if run is not None:
            raise UserError("--run names its own suite.", remedy="leave --suite or --run out")
        return asked_block(recipe, suite, overrides), None
    if recipe is None:
        folder = existing_run(run, runs_dir)
        return run_recipe(folder, overrides).behavior, folder / "behavior"
    from qat.recipe.load import load_recipe

    read = load_recipe(recipe, overrides)
    return read.behavior, runs_dir / (run or read.name) / "behavior"


@exits(resumable=True)
def report(
    run: RunOption = None,
    runs_dir: RunsDirOption = RUNS,
    json_: JsonOption = False,
) -> ExitCode:
    """Write report.html from whatever the run holds so far."""
    with terminable(), open_run(None, run, runs_dir) as opened:
        from qat import chain

        path = chain.report(opened)
        emit({"run": str(opened.folder), "report": str(path)}, json_, lambda: print(path))
    return ExitCode.DONE


def _megabytes(run: Run, arm: str) -> float:
    return float(run.record(f"export/{arm}")["bytes"][f"export/{arm}"]) / 1e6


def _show_stages(run: Run, as_json: bool) -> None:
    stages = run.stages

    def text() -> None:
        rows = [
            (name, record["status"], f"{record['seconds']:.0f}", f"{record['peak_rss_mb'] or 0:,.0f}")
            for name, record in stages.items()
        ]
        print_table(("stage", "status", "seconds", "peak MB"), rows)
        print(f"run: {run.folder}")

    emit({"run": str(run.folder), "stages": stages}, as_json, text)


def _show_verdict(folder: Path, as_json: bool) -> ExitCode:
    verdict = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))

    def text() -> None:
        print_table(*arms_table(folder, verdict))
        print(f"\nverdict: {verdict['verdict']}")
        for reason in verdict["reasons"]:
            print(f"  {reason}")
        print(f"report:  {folder / 'report.html'}")

    emit({"run": str(folder), **verdict}, as_json, text)
    return _EXIT_OF[verdict["verdict"]]


def arms_table(folder: Path, verdict: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the arms table, from a run's files.

    Args:
        folder: The run; `divergence.json` (the forward on held-out replies) and `behavior/<arm>.divergence.json` (the
            servers on the suite's replies) are read where they are there.
        verdict: Contents of `verdict.json`.

    Returns:
        Headings, and one row of texts per arm. `--` stands where a figure does not apply or was not measured.
    """
    divergence = _read_json(folder / "divergence.json")
    replies = {name: _read_json(folder / "behavior" / f"{name}.divergence.json") for name in verdict["arms"]}
    passes = list(dict.fromkeys(name for arm in verdict["arms"].values() for name in arm["samplings"]))
    compared = {entry["arm"]: entry for entry in verdict["comparisons"]}
    gate = verdict["gate"]
    interval = f"{100 * gate['confidence']:g} % interval"
    columns = ["arm", *passes, f"{interval} ({gate['sampling']})", f"minus {gate['reference']}, points", "KL", "top-1"]
    if any(replies.values()):
        columns += ["KL, suite", "top-1, suite"]
    rows = []
    for name, arm in verdict["arms"].items():
        row = [name, *(_rate(arm["samplings"].get(sampling)) for sampling in passes), _interval(arm["overall"])]
        row.append(difference(compared.get(name)))
        drifts = [divergence.get(name, {}), *([replies[name]] if any(replies.values()) else [])]
        for drift in drifts:
            row.append(f"{drift['kl']:.4f}" if "kl" in drift else "--")
            row.append(f"{drift['top1']:.3f}" if "top1" in drift else "--")
        rows.append(row)
    return columns, rows


def _read_json(path: Path) -> dict[str, Any]:
    """A file of the run; empty where it was not written."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _rate(rate: dict[str, Any] | None) -> str:
    if rate is None or rate.get("rate") is None:
        return "--" if rate is None else f"{rate['passed']}/{rate['n']}"
    return f"{100 * rate['rate']:.1f} % ({rate['passed']}/{rate['n']})"


def _interval(rate: dict[str, Any]) -> str:
    low, high = rate.get("low"), rate.get("high")
    return "too few" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f} %"
