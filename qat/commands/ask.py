"""`test --url`: the suite against a running endpoint, without a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.commands.common import emit, terminable
from qat.errors import ExitCode, UserError

if TYPE_CHECKING:
    from qat.recipe.schema import BehaviorBlock


class Wanted(NamedTuple):
    """What the command line asks for; None and empty: as the options' help says."""

    url: str
    suite: str | None
    model: str | None
    recipe: str | None
    overrides: Sequence[str]
    repeats: int
    only: Sequence[str]
    shard: str | None
    out: Path | None


def ask_endpoint(wanted: Wanted, as_json: bool) -> ExitCode:
    """Ask the suite, and judge the whole of it by the pass floor; a part of a suite gets no verdict.

    Raises:
        UserError: Neither suite nor recipe is named, or the suite, selection or server is at fault.
    """
    from qat.behavior.client import first_model
    from qat.behavior.runner import repeated, run_suite
    from qat.behavior.selection import Selection
    from qat.behavior.suite import load_suite

    block = _block(wanted)
    selection = Selection.parse(wanted.only, wanted.shard)
    suite = load_suite(block.suite)
    model = wanted.model or first_model(wanted.url)
    part = f".{selection.shard}of{selection.shards}" if selection.shards > 1 else ""
    out = wanted.out or Path(f"{suite.name}{part}.jsonl")
    with terminable():
        asked = repeated(block, wanted.repeats)
        summary = run_suite(suite, wanted.url, model, model, asked, out, selection=selection)
    result: dict[str, Any] = {**summary.to_json(), "results": str(out), "suite": suite.name, "sha256": suite.sha256}
    code = ExitCode.DONE
    if not selection.partial:
        from qat.behavior.gate import judge

        gate = block.gate.model_copy(update={"candidate": model, "reference": model})
        verdict = judge({model: out}, suite, gate)
        result |= {"verdict": verdict.verdict.value, "reasons": verdict.reasons}
        code = verdict.verdict.exit_code
    emit(result, as_json, lambda: _show(result))
    return code


def _block(wanted: Wanted) -> BehaviorBlock:
    from qat.recipe.load import load_recipe
    from qat.recipe.schema import BehaviorBlock, GateBlock

    if wanted.recipe is not None:
        block = load_recipe(wanted.recipe, wanted.overrides).behavior
        return block if wanted.suite is None else block.model_copy(update={"suite": wanted.suite})
    if wanted.suite is None:
        raise UserError("Nothing says which suite to ask.", remedy="name it with --suite, or a recipe with --recipe")
    if wanted.overrides:
        raise UserError("--set changes a recipe, and none is named.", remedy="add --recipe")
    return BehaviorBlock(suite=wanted.suite, gate=GateBlock(candidate="model", reference="model"))


def _show(result: dict[str, Any]) -> None:
    asked = result["asked"] + result["resumed"]
    print(f"{result['passed']} of {asked} passed, {result['errors']} ended in an error  ({result['results']})")
    for kind, count in result["error_kinds"].items():
        print(f"  error      {kind}: {count}")
    for kind, count in result["malformed"].items():
        print(f"  malformed  {kind}: {count}")
    if "verdict" not in result:
        print("no verdict: a part of the suite was asked")
        return
    print(f"\nverdict: {result['verdict']}")
    for reason in result["reasons"]:
        print(f"  {reason}")
