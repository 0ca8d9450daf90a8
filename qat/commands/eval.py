"""`eval`: public and general suites against any OpenAI-compatible endpoint; a measurement, without a verdict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat.commands.common import JsonOption, emit, exits, print_table, terminable
from qat.errors import ExitCode

if TYPE_CHECKING:
    from qat.behavior.records import CaseResult
    from qat.behavior.suite import Suite

app = typer.Typer(help="Measure a served model on BFCL, extraction or knowledge.", no_args_is_help=True,
                  rich_markup_mode=None)  # fmt: skip

UrlOption = Annotated[str, typer.Option("--url", help="Of an OpenAI-compatible server, with or without /v1.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="Name at the server; by default its first.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Result file; continued where it exists.")]
TokensOption = Annotated[int, typer.Option("--max-tokens", help="Longest reply.", min=1)]
ConcurrencyOption = Annotated[int, typer.Option("--concurrency", help="Requests under way together.", min=1)]
OnlyOption = Annotated[
    list[str] | None, typer.Option("--only", help="Cases of this id, category or tag (* allowed); repeatable.")
]
_CONFIDENCE = 0.95


@app.command("bfcl")
@exits(resumable=True)
def bfcl(
    url: UrlOption,
    data: Annotated[Path, typer.Option("--data", help="Folder with BFCL_v4_<split>.json and possible_answer.")],
    splits: Annotated[
        list[str] | None,
        typer.Option(
            "--split",
            help="Only this one, or a group: live, non_live, single_turn, python, non_python; "
            "repeatable; by default all in the folder.",
        ),
    ] = None,
    model: ModelOption = None,
    only: OnlyOption = None,
    max_tokens: TokensOption = 512,
    concurrency: ConcurrencyOption = 16,
    out: OutOption = None,
    json_: JsonOption = False,
) -> ExitCode:
    """Ask the single-turn splits of the Berkeley Function Calling Leaderboard."""
    from qat.behavior.bfcl import load_bfcl

    suite = load_bfcl(data, splits or ())
    result, _ = _ask(suite, url, model, only, max_tokens, concurrency, out)
    emit(result, json_, lambda: _print_rates(result, "split"))
    return ExitCode.DONE


@app.command("extraction")
@exits(resumable=True)
def extraction(
    url: UrlOption,
    per_domain: Annotated[int, typer.Option("--per-domain", help="Cases of each domain.", min=1)] = 12,
    seed: Annotated[int, typer.Option("--seed", help="Other seeds give other texts.", min=0)] = 0,
    model: ModelOption = None,
    only: OnlyOption = None,
    max_tokens: TokensOption = 256,
    concurrency: ConcurrencyOption = 16,
    out: OutOption = None,
    json_: JsonOption = False,
) -> ExitCode:
    """Ask for JSON from texts of eight domains; precision, recall and F1 of the fields."""
    from qat.behavior.extraction import extraction_suite, scores_of

    suite = extraction_suite(per_domain, seed)
    result, answers = _ask(suite, url, model, only, max_tokens, concurrency, out)
    scores = scores_of(suite.by_id, answers, _CONFIDENCE)
    result["fields"] = {name or "all": found.to_json() for name, found in scores.items()}

    def text() -> None:
        _print_rates(result, "domain")
        print()
        rows = [
            (name, *(_rate(found[key]) for key in ("precision", "recall", "f1")), str(found["unreadable"]))
            for name, found in result["fields"].items()
        ]
        print_table(("field", "precision", "recall", "F1", "not JSON"), rows)
        _print_few(found[key] for found in result["fields"].values() for key in ("precision", "recall", "f1"))

    emit(result, json_, text)
    return ExitCode.DONE


@app.command("knowledge")
@exits()
def knowledge(
    url: UrlOption,
    task: Annotated[str, typer.Option("--task", help="gsm8k, ifeval, medmcqa or truthfulqa_mc1.")],
    data: Annotated[Path, typer.Option("--data", help="Folder with the tasks' files, as docs/evals.md names them.")],
    python: Annotated[Path, typer.Option("--python", help="Interpreter of an environment with lm_eval.")],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Checkpoint folder, for medmcqa and truthfulqa_mc1.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first n questions.", min=1)] = None,
    model: ModelOption = None,
    concurrency: ConcurrencyOption = 16,
    out: OutOption = None,
    json_: JsonOption = False,
) -> ExitCode:
    """Ask a task of lm-evaluation-harness, which runs as a process of its own."""
    from qat.behavior.client import first_model
    from qat.behavior.knowledge import KnowledgeRun, run_knowledge

    name, path = model or first_model(url), out or Path(f"{task}.jsonl")
    with terminable():
        asked = KnowledgeRun(python, data, url, name, tokenizer, limit, concurrency)
        answers = run_knowledge(task, asked, name, path)
    result = {"results": str(path), "model": name, "error_kinds": {}, "rates": _rates(answers)}
    emit(result, json_, lambda: _print_rates(result, "task"))
    return ExitCode.DONE


def _ask(
    suite: Suite,
    url: str,
    model: str | None,
    only: list[str] | None,
    max_tokens: int,
    concurrency: int,
    out: Path | None,
) -> tuple[dict[str, Any], list[CaseResult]]:
    """Ask the suite greedily; the result to show, and the answers to the cases asked for."""
    from qat.behavior.client import first_model
    from qat.behavior.runner import run_suite
    from qat.behavior.selection import Selection
    from qat.recipe.schema import BehaviorBlock, GateBlock

    name, path = model or first_model(url), out or Path(f"{suite.name}.jsonl")
    selection = Selection.parse(only or (), None)
    block = BehaviorBlock(
        suite=suite.name,
        max_tokens=max_tokens,
        concurrency=concurrency,
        gate=GateBlock(candidate=name, reference=name),
    )
    with terminable():
        summary = run_suite(suite, url, name, name, block, path, selection=selection)
    answers = selection.answers(suite, path)
    return {
        **summary.to_json(),
        "results": str(path),
        "suite": suite.name,
        "sha256": suite.sha256,
        "model": name,
        "rates": _rates(answers),
    }, answers


def _rates(answers: list[CaseResult]) -> dict[str, Any]:
    """Pass rates by category and, where there are several, of all; answers that ended in an error count in none."""
    from qat.behavior.stats import Outcome, rate

    groups: dict[str, list[Outcome]] = defaultdict(list)
    for one in answers:
        if one.error is None:
            groups[one.category].append(Outcome(one.case, one.passed))
    if len(groups) > 1:
        groups["all"] = [outcome for outcomes in list(groups.values()) for outcome in outcomes]
    return {group: rate(outcomes, _CONFIDENCE)._asdict() for group, outcomes in groups.items()}


def _print_rates(result: dict[str, Any], what: str) -> None:
    rows = [(name, str(found["passed"]), str(found["n"]), _rate(found)) for name, found in result["rates"].items()]
    print_table((what, "passed", "of", "rate (95 % interval)"), rows)
    _print_few(result["rates"].values())
    for kind, count in result["error_kinds"].items():
        print(f"error  {kind}: {count}")
    print(f"results: {result['results']}")


def _print_few(rates: Iterable[dict[str, Any]]) -> None:
    """What "too few" in the table above means, where it stands there."""
    from qat.behavior.stats import MIN_CASES

    if any(found["rate"] is None for found in rates):
        print(f"too few: a rate is given from {MIN_CASES} cases on")


def _rate(found: dict[str, Any]) -> str:
    if found["rate"] is None:
        return "too few"
    return f"{100 * found['rate']:.1f} % ({100 * found['low']:.1f} to {100 * found['high']:.1f})"
