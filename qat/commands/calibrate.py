"""`sensitivity`: what every group of weights costs in fewer bits, and a preset of one's own within a byte budget."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qat.commands.common import (
    RUNS,
    JsonOption,
    RecipeOption,
    RunOption,
    RunsDirOption,
    SetOption,
    emit,
    exits,
    open_run,
    print_table,
    terminable,
)
from qat.errors import ExitCode, UserError

if TYPE_CHECKING:
    from qat.calibration.mixed import Choice
    from qat.calibration.sensitivity import Score, Sensitivity
    from qat.recipe.schema import Recipe

_UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
_SHOWN = 20


@exits(resumable=True)
def sensitivity(
    recipe: RecipeOption = None,
    run: RunOption = None,
    runs_dir: RunsDirOption = RUNS,
    overrides: SetOption = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="Measure w4a16 or fp8 beside nvfp4; repeatable.")
    ] = None,
    conversations: Annotated[int, typer.Option("--conversations", help="Held-out ones that are read.", min=2)] = 64,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Size of the checkpoint: 18GB, 17GiB, or 40% of the BF16 one.")
    ] = None,
    preset: Annotated[str, typer.Option("--preset", help="Name of the preset that fits the budget.")] = "mixed",
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the recipe with that preset and an arm for it.")
    ] = None,
    json_: JsonOption = False,
) -> ExitCode:
    """Measure the KL of each group of weights quantized alone; with --budget, choose formats within it."""
    if out is not None and budget is None:
        raise UserError("--out writes the recipe of a chosen preset.", remedy="add --budget")
    wanted = tuple(dict.fromkeys(("nvfp4", *(formats or ()))))
    with terminable(), open_run(recipe, run, runs_dir, overrides=overrides) as opened:
        from qat import chain
        from qat.calibration.sensitivity import Sensitivity

        chain.data(opened)
        chain.sft(opened)
        chain.sensitivity(opened, wanted, conversations)
        measured = Sensitivity.from_json(json.loads(opened.path(chain.SENSITIVITY).read_text(encoding="utf-8")))
        if budget is None:
            emit(measured.to_json(), json_, lambda: _show(measured))
            return ExitCode.DONE
        from qat.calibration.sensitivity import choose_preset

        whole = measured.fixed_bytes + sum({score.group: score.bytes_bf16 for score in measured.groups}.values())
        choice, lists = choose_preset(measured, parse_size(budget, whole))
        mixed = with_preset(opened.recipe, preset, lists)
        if out is not None:
            out.write_text(mixed.to_yaml(), encoding="utf-8")
        block = mixed.quant.presets[preset].model_dump(mode="json", exclude_defaults=True)
        result = {**measured.to_json(), "choice": choice._asdict(), "presets": {preset: block}}

        def text() -> None:
            _show(measured)
            _show_choice(choice, whole, preset, block, out)

        emit(result, json_, text)
    return ExitCode.DONE


def parse_size(text: str, whole: int) -> int:
    """Read a size in bytes.

    Args:
        text: `18GB`, `17.5 GiB`, `900MB`, plain bytes, or `40%` of the whole.
        whole: What 100% are.

    Raises:
        UserError: None of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else ""
    if match is None or (unit != "%" and unit not in _UNITS):
        raise UserError("This is no size.", where="--budget", value=text, remedy="18GB, 17GiB, 900MB, bytes, or 40%")
    return int(float(match[1]) * (whole / 100 if unit == "%" else _UNITS[unit]))


def with_preset(recipe: Recipe, name: str, lists: dict[str, list[str]]) -> Recipe:
    """Add an own preset, and a plain arm that uses it, to a recipe.

    Args:
        recipe: To copy.
        name: Of the preset; replaces one of that name.
        lists: Format -> modules; all others are NVFP4.

    Raises:
        UserError: The name is taken or no name.
    """
    from pydantic import ValidationError

    from qat.recipe.schema import Recipe

    content = recipe.model_dump(mode="json")
    content["quant"]["presets"][name] = {"like": "all", **lists}
    if not any(arm["preset"] == name for arm in content["arms"]):
        content["arms"].append({"name": f"{name}_ptq", "kind": "ptq", "preset": name})
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        said = "; ".join(str(detail["msg"]) for detail in error.errors(include_url=False))
        raise UserError("The recipe cannot have this preset.", where="--preset", value=name, remedy=said) from error


def _show(measured: Sensitivity) -> None:
    columns = ("group", "format", "MB in BF16", "MB", "KL", "± SE", "top-1")
    print(f"{measured.conversations} held-out conversations, {measured.tokens:,} reply tokens")
    print_table(columns, [_row(score) for score in measured.kinds], left=("format",))
    worst = sorted(measured.groups, key=lambda score: -score.kl)[:_SHOWN]
    print(f"\nthe {len(worst)} groups of {len(measured.groups)} that cost most")
    print_table(columns, [_row(score) for score in worst], left=("format",))


def _row(score: Score) -> list[str]:
    error = "--" if score.kl_se is None else f"{score.kl_se:.5f}"
    sizes = f"{score.bytes_bf16 / 1e6:,.2f}", f"{score.bytes / 1e6:,.2f}"
    return [score.group, score.format, *sizes, f"{score.kl:.5f}", error, f"{score.top1:.4f}"]


def _show_choice(choice: Choice, whole: int, name: str, block: dict[str, object], out: Path | None) -> None:
    import yaml

    print(f"\n{choice.bytes / 1e6:,.2f} MB of {whole / 1e6:,.2f} MB in BF16; the groups' KL add up to {choice.kl:.5f}")
    if not choice.exact:
        print("the choice is within the budget, and need not be the best one: there are too many sizes of groups")
    print(yaml.safe_dump({"quant": {"presets": {name: block}}}, sort_keys=False, width=120), end="")
    if out is not None:
        print(f"recipe with this preset: {out}; its KL as a whole is measured by: qat run --recipe {out}")
