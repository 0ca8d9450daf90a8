"""`test --url`: the suite against a running endpoint, without a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.commands.common import divergence_line, emit, print_table, terminable, user_code
from qat.errors import ExitCode, UserError

if TYPE_CHECKING:
    from qat.behavior.records import CaseResult
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
    divergence_from: Path | None
    allow_python: bool


def ask_endpoint(wanted: Wanted, as_json: bool) -> ExitCode:
    """Ask the suite, and judge the whole of it by the pass floor; a part of a suite gets no verdict.

    Raises:
        UserError: Neither suite nor recipe is named, or the suite, selection or server is at fault.
    """
    from qat.behavior.client import first_model
    from qat.behavior.runner import repeated, run_suite
    from qat.behavior.scoring import diverge, require_reference
    from qat.behavior.selection import Selection
    from qat.behavior.suite import load_suite

    block = asked_block(wanted.recipe, wanted.suite, wanted.overrides)
    selection = Selection.parse(wanted.only, wanted.shard)
    part = f".{selection.shard}of{selection.shards}" if selection.shards > 1 else ""
    with terminable(), user_code(block.suite, wanted.allow_python):
        suite = load_suite(block.suite)
        out = wanted.out or Path(f"{suite.name}{part}.jsonl")
        reference = wanted.divergence_from
        own = reference is not None and reference.resolve() == out.resolve()
        if reference is not None and not own:
            require_reference(reference, suite)
        model = wanted.model or first_model(wanted.url)
        asked = repeated(block, wanted.repeats)
        summary = run_suite(suite, wanted.url, model, model, asked, out, selection=selection, token_ids=own)
        result: dict[str, Any] = {**summary.to_json(), "results": str(out), "suite": suite.name, "sha256": suite.sha256}
        answers = selection.answers(suite, out)
        result |= {"categories": _categories(answers), "failed_checks": _failed_checks(answers)}
        if reference is not None:
            result["divergence"] = diverge(suite, reference, out, wanted.url, model, block).to_json()
    code = ExitCode.DONE
    if not selection.partial:
        from qat.behavior.gate import judge

        gate = block.gate.model_copy(update={"candidate": model, "reference": model})
        verdict = judge({model: out}, suite, gate)
        result |= {"verdict": verdict.verdict.value, "reasons": verdict.reasons}
        code = verdict.verdict.exit_code
    emit(result, as_json, lambda: _show(result))
    return code


def asked_block(recipe: str | None, suite: str | None, overrides: Sequence[str]) -> BehaviorBlock:
    """How a suite is asked and judged: as the recipe says, or greedily by the default floor.

    Raises:
        UserError: Neither suite nor recipe is named, or the recipe is at fault.
    """
    from qat.recipe.load import load_recipe
    from qat.recipe.schema import BehaviorBlock, GateBlock

    if recipe is not None:
        block = load_recipe(recipe, overrides).behavior
        return block if suite is None else block.model_copy(update={"suite": suite})
    if suite is None:
        raise UserError("Nothing says which suite to ask.", remedy="name it with --suite, or a recipe with --recipe")
    if overrides:
        raise UserError("--set changes a recipe, and none is named.", remedy="add --recipe")
    return BehaviorBlock(suite=suite, gate=GateBlock(candidate="model", reference="model"))


def _categories(answers: Sequence[CaseResult]) -> dict[str, dict[str, int]]:
    """Passed and judged answers by category."""
    found: dict[str, dict[str, int]] = {}
    for answer in answers:
        if answer.error is None:
            counts = found.setdefault(answer.category, {"passed": 0, "n": 0})
            counts["passed"] += answer.passed
            counts["n"] += 1
    return found


def _failed_checks(answers: Sequence[CaseResult]) -> dict[str, dict[str, Any]]:
    """What failed, most frequent first: in how many answers, and one of them."""
    found: dict[str, dict[str, Any]] = {}
    for answer in sorted(answers, key=lambda answer: answer.key):
        for failure in {failure.check: failure for failure in reversed(answer.failed_checks)}.values():
            entry = found.setdefault(failure.check, {"answers": 0, "case": answer.case, "detail": failure.detail})
            entry["answers"] += 1
    return dict(sorted(found.items(), key=lambda entry: (-entry[1]["answers"], entry[0])))


def _show(result: dict[str, Any]) -> None:
    asked = result["asked"] + result["resumed"]
    print(f"{result['passed']} of {asked} passed, {result['errors']} ended in an error  ({result['results']})")
    drift = result.get("divergence", {}).get("categories", {})
    rows = [
        [name, str(found["passed"]), str(found["n"])]
        + ([f"{drift[name]['kl']:.4f}", f"{drift[name]['top1']:.3f}"] if name in drift else ["--", "--"] * bool(drift))
        for name, found in result["categories"].items()
    ]
    print_table(("category", "passed", "of", *(("KL", "top-1") if drift else ())), rows)
    for name, found in result["failed_checks"].items():
        print(f"  failed     {name}: {found['answers']}, as in {found['case']}: {found['detail']}")
    for kind, count in result["error_kinds"].items():
        print(f"  error      {kind}: {count}")
    for kind, count in result["malformed"].items():
        print(f"  malformed  {kind}: {count}")
    if "divergence" in result:
        print(divergence_line(result["divergence"]))
    if "verdict" not in result:
        print("no verdict: a part of the suite was asked")
        return
    print(f"\nverdict: {result['verdict']}")
    for reason in result["reasons"]:
        print(f"  {reason}")
