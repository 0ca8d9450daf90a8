"""`qat test --power`: how much must be asked, said before anything is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.commands.baseline import FOLDER
from qat.commands.common import emit, print_table
from qat.errors import ExitCode, UserError

if TYPE_CHECKING:
    from qat.behavior.power import Assumptions
    from qat.recipe.schema import BehaviorBlock

REPEATS = (1, 2, 3, 5, 10)


def show_power(
    behavior: BehaviorBlock,
    results: Path | None,
    drop: float | None,
    target: float,
    flips: float | None,
    baseline: str | None,
    as_json: bool,
) -> ExitCode:
    """Print cases and repeats for a power.

    Args:
        behavior: Its suite, gate and the gate's sampling count.
        results: The run's folder of result files, read for measured flips where it is there; None: no run.
        drop: That shall be shown, as a share; None: the gate's `max_drop`.
        target: Power.
        flips: Share that flips each way without any change; None: measured where it was, else assumed.
        baseline: Name or file of a baseline to measure the flips in.
        as_json: Print JSON.
    """
    from qat.behavior.power import cases_needed, chance_to_clear, detectable_drop
    from qat.behavior.suite import load_suite

    gate = behavior.gate
    drop = gate.max_drop if drop is None else drop
    assumed = _assumptions(behavior, results, flips, baseline)
    sampling = next(each for each in behavior.sampling if each.name == gate.sampling)
    suite = load_suite(behavior.suite)
    cases, repeats = len(suite.cases[: sampling.limit]), len(sampling.seeds)
    result: dict[str, Any] = {
        "suite": suite.name,
        "cases": cases,
        "repeats": repeats,
        "sampling": sampling.name,
        "drop": drop,
        "power": target,
        "max_drop": gate.max_drop,
        "confidence": gate.confidence,
        "assumed": assumed._asdict(),
        "needed": [
            cases_needed(count, drop, gate.max_drop, target, assumed, gate.confidence)._asdict()
            for count in (REPEATS if assumed.averaged else (1,))
        ],
        "detectable_drop": detectable_drop(cases, repeats, target, assumed, gate.confidence),
        "chance_to_pass_unchanged": chance_to_clear(cases, repeats, gate.max_drop, assumed, gate.confidence),
    }
    emit(result, as_json, lambda: _print(result))
    return ExitCode.DONE


def _assumptions(
    behavior: BehaviorBlock, results: Path | None, flips: float | None, baseline: str | None
) -> Assumptions:
    from qat.behavior.baseline import load_baseline
    from qat.behavior.compare import read_answers
    from qat.behavior.power import ASSUMED_FLIPS, Assumptions, flips_between, flips_within

    gate = behavior.gate
    averaged = any(each.name == gate.sampling and each.temperature > 0 for each in behavior.sampling)
    if flips is not None:
        return Assumptions(flips, "given", averaged)
    if baseline is not None:
        kept = load_baseline(baseline, FOLDER)
        found = flips_within(kept.answers(), gate.sampling)
        if found is None:
            raise UserError(
                "This baseline cannot tell how many answers flip by themselves.",
                where=kept.label,
                value=f"no case was asked twice under sampling {gate.sampling!r}",
                remedy="give --flips, or save a baseline with several seeds or a repeated pass",
            )
        return found
    files = [results / f"{arm}.jsonl" for arm in (gate.candidate, gate.reference)] if results is not None else []
    if files and all(path.is_file() for path in files):
        candidate, reference = (read_answers(path) for path in files)
        if found := flips_between(candidate, reference, gate.sampling):
            return found
    return Assumptions(ASSUMED_FLIPS, "assumed: nothing was measured yet, --flips sets it", averaged)


def _print(result: dict[str, Any]) -> None:
    points, power = f"{100 * result['drop']:g} points", f"{100 * result['power']:g} %"
    limit, percent = f"{100 * result['max_drop']:g} points", f"{100 * result['confidence']:g} %"
    assumed = result["assumed"]
    print(f"To show a drop of {points} with a power of {power} ({percent} interval of the paired difference below 0),")
    print(f"and to pass an unchanged candidate with the same power (interval above -{limit}):\n")
    rows = [
        (str(e["repeats"]), *(_count(e[key], e["repeats"]) for key in ("detect", "clear"))) for e in result["needed"]
    ]
    print_table(("repeats", "cases (answers) to show the drop", "cases (answers) to pass unchanged"), rows)
    print(f"\nflips each way without any change: {100 * assumed['flips']:.2g} % ({assumed['source']})")
    if not assumed["averaged"]:
        print("repeats at temperature 0 add nothing: a flip that quantization causes is the same each time")
    least = result["detectable_drop"]
    shown = "no drop up to 50 points" if least is None else f"drops of {100 * least:.1f} points or more"
    print(
        f"{result['suite']} as it is asked, {result['cases']} cases x {result['repeats']}: shows {shown} with a "
        f"power of {power}; passes an unchanged candidate in {100 * result['chance_to_pass_unchanged']:.0f} %"
    )


def _count(cases: int | None, repeats: int) -> str:
    return "over a million" if cases is None else f"{cases:,} ({cases * repeats:,})"
