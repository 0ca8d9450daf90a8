"""`baseline`: answers that are kept, and later candidates judged against them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat.commands.common import (
    RUNS,
    AllowPythonOption,
    JsonOption,
    RunOption,
    RunsDirOption,
    difference,
    emit,
    existing_run,
    exits,
    print_pairs,
    print_table,
    run_recipe,
    user_code,
)
from qat.commands.results import results_of
from qat.errors import ExitCode, UserError

if TYPE_CHECKING:
    from qat.behavior.baseline import Baseline
    from qat.behavior.suite import Suite

app = typer.Typer(help="Keep an arm's answers as a baseline, and judge later candidates against it.",
                  no_args_is_help=True, rich_markup_mode=None)  # fmt: skip

FolderOption = Annotated[Path, typer.Option("--dir", help="Folder of the baselines.")]
ArmArgument = Annotated[str, typer.Argument(help="Arm of the run, or a results file.", metavar="A")]
NameArgument = Annotated[str, typer.Argument(help="Name of the baseline, or its JSON file.", metavar="NAME")]
FOLDER = Path("baselines")
"""Where baselines lie unless another folder is named: below the current folder, to be committed."""


@app.command("save")
@exits()
def save(
    name: Annotated[str, typer.Argument(help="Name of the new baseline.", metavar="NAME")],
    a: ArmArgument,
    suite: Annotated[
        str | None, typer.Option("--suite", help="That the results answer; by default the run's, or a shipped one.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite a baseline of this name.")] = False,
    folder: FolderOption = FOLDER,
    run: RunOption = None,
    runs_dir: RunsDirOption = RUNS,
    allow_python: AllowPythonOption = False,
    json_: JsonOption = False,
) -> ExitCode:
    """Save which questions A passes, without its replies, as one JSON file to be committed."""
    from qat.behavior.baseline import make_baseline, save_baseline

    path = results_of(a, run, runs_dir)
    with user_code(suite or "", allow_python):
        made = make_baseline(name, path, _suite_of(a, path, suite, run, runs_dir))
    target = save_baseline(made, folder, replace)
    # A recipe may ask only the first cases of its suite; whoever meant all of them should see it.
    result: dict[str, Any] = {"baseline": str(target), **_line(made), "suite_cases": len(made.cases)}
    emit(result, json_, lambda: print_pairs(result | {"passes": ", ".join(map(_pass, result["passes"]))}))
    return ExitCode.DONE


def _suite_of(a: str, results: Path, suite: str | None, run: str | None, runs_dir: Path) -> Suite:
    """The suite that is named, that of the run, or the shipped one that the results name."""
    from qat.behavior.records import read_meta
    from qat.behavior.suite import load_suite

    if suite is not None:
        return load_suite(suite)
    if not a.endswith(".jsonl"):
        return load_suite(run_recipe(existing_run(run, runs_dir)).behavior.suite)
    meta = read_meta(results)
    if meta is None:
        raise UserError("Nothing says what these results were made with.", where=a)
    try:
        return load_suite(meta.suite)
    except UserError as error:
        raise UserError(
            "The suite of these results is not a shipped one.", where=a, value=meta.suite,
            remedy="name its file with --suite",
        ) from error  # fmt: skip


@app.command("list")
@exits()
def list_(folder: FolderOption = FOLDER, json_: JsonOption = False) -> ExitCode:
    """List the baselines with the suite, arm and pass rate of each."""
    from qat.behavior.baseline import list_baselines

    found = [_line(baseline) for baseline in list_baselines(folder)]

    def text() -> None:
        columns = ("name", "arm", "suite", "saved", "passes")
        rows = [(e["name"], e["arm"], f"{e['suite']} {e['version']} {e['sha256'][:12]}", e["saved"],
                 ", ".join(map(_pass, e["passes"]))) for e in found]  # fmt: skip
        print_table(columns, rows, left=columns)

    emit(found, json_, text)
    return ExitCode.DONE


@app.command("show")
@exits()
def show(name: NameArgument, folder: FolderOption = FOLDER, json_: JsonOption = False) -> ExitCode:
    """Show a baseline: what it was made with, its rates, and the cases that it fails."""
    from qat.behavior.baseline import load_baseline
    from qat.behavior.compare import arm_rates

    baseline = load_baseline(name, folder)
    weights = baseline.questions().weights
    rates = {
        sampling: arm_rates(baseline.answers(), sampling, weights, 0.95).to_json()
        for sampling in dict.fromkeys(one.sampling for one in baseline.passes)
    }
    result = {**baseline.model_dump(mode="json"), "rates": rates}

    def text() -> None:
        print_pairs({**{k: v for k, v in _line(baseline).items() if k != "passes"}, "model": baseline.meta.model})
        rows = [(sampling, category, f"{rate['passed']}/{rate['n']}", _interval(rate))
                for sampling, found in rates.items()
                for category, rate in {"all": found["overall"], **found["categories"]}.items()]  # fmt: skip
        print_table(("sampling", "category", "passed", "95 % interval"), rows, left=("category",))
        for one in baseline.passes:
            print(f"{one.sampling}, seed {one.seed} fails: {', '.join(one.failed) or '--'}")

    emit(result, json_, text)
    return ExitCode.DONE


@app.command("check")
@exits()
def check(
    a: ArmArgument,
    name: NameArgument,
    floor: Annotated[float, typer.Option("--floor", help="Least pass rate, as a share.", min=0.0, max=1.0)] = 0.90,
    max_drop: Annotated[
        float, typer.Option("--max-drop", help="Largest fall against the baseline.", min=0.001, max=0.999)
    ] = 0.03,
    confidence: Annotated[
        float, typer.Option("--confidence", help="Of all looks together, two-sided.", min=0.501, max=0.9999)
    ] = 0.95,
    sampling: Annotated[
        str | None, typer.Option("--sampling", help="Pass that counts; by default the baseline's first.")
    ] = None,
    look: Annotated[
        int | None,
        typer.Option("--look", help="Which look at this candidate this is; judged stricter.", min=1),
    ] = None,
    looks: Annotated[
        int | None,
        typer.Option("--looks", help="Looks planned; without it any number may follow.", min=1),
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML there.")] = None,
    summary: Annotated[Path | None, typer.Option("--summary", help="Write Markdown for a pull request there.")] = None,
    folder: FolderOption = FOLDER,
    run: RunOption = None,
    runs_dir: RunsDirOption = RUNS,
    json_: JsonOption = False,
) -> ExitCode:
    """Judge A against a baseline; exit 0 PASS, 1 FAIL, 3 INCONCLUSIVE."""
    from qat.behavior.baseline import judge_against, load_baseline
    from qat.behavior.gate import write_junit
    from qat.behavior.sequential import Look
    from qat.behavior.summary import markdown
    from qat.recipe.schema import GateBlock
    from qat.storage import write_atomic

    if looks is not None and look is None:
        raise UserError("Looks are planned, but not which one this is.", remedy="give --look too")
    baseline = load_baseline(name, folder)
    gate = GateBlock(candidate="", reference="", sampling=sampling or baseline.passes[0].sampling,
                     pass_floor=floor, max_drop=max_drop, confidence=confidence)  # fmt: skip
    verdict = judge_against(results_of(a, run, runs_dir), baseline, gate, None if look is None else Look(look, looks))
    result = verdict.to_json()
    if junit is not None:
        write_junit(verdict, junit)
    if summary is not None:
        write_atomic(summary, markdown(result))
    emit(result, json_, lambda: _print_verdict(result))
    return verdict.verdict.exit_code


def _print_verdict(result: dict[str, Any]) -> None:
    columns = ("arm", "passed", "interval", "minus baseline, points", "errors")
    compared = {entry["arm"]: entry for entry in result["comparisons"]}
    rows = [(arm, f"{found['overall']['passed']}/{found['overall']['n']}", _interval(found["overall"]),
             difference(compared.get(arm)), str(found["errors"]))
            for arm, found in result["arms"].items()]  # fmt: skip
    print_table(columns, rows)
    print(f"\nverdict: {result['verdict']}")
    for reason in result["reasons"]:
        print(f"  {reason}")
    if result["look"]["number"] is None:
        print("judged as the only look at this candidate; who looks again says so with --look, and pays in certainty")


def _line(baseline: Baseline) -> dict[str, Any]:
    return {
        "name": baseline.name,
        "arm": baseline.arm,
        "suite": baseline.meta.suite,
        "version": baseline.meta.version,
        "sha256": baseline.meta.sha256,
        "saved": baseline.saved,
        "passes": [
            {"sampling": one.sampling, "seed": one.seed, "passed": len(one.passed),
             "n": len(one.passed) + len(one.failed)}
            for one in baseline.passes
        ],
    }  # fmt: skip


def _pass(entry: dict[str, Any]) -> str:
    return f"{entry['sampling']}/{entry['seed']}: {entry['passed']}/{entry['n']}"


def _interval(rate: dict[str, Any]) -> str:
    return "too few" if rate["low"] is None else f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f} %"
