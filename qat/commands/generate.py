"""`data generate`: conversations by the grammars, by a teacher, or out of what an arm got wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat.commands.common import JsonOption, SetOption, emit, exits, print_pairs, terminable
from qat.errors import ExitCode, UserError

if TYPE_CHECKING:
    from qat.data.schema import Conversation
    from qat.recipe.schema import Recipe

DEFAULT_RECIPE = "annie_tiny"
RecipeForData = Annotated[
    str, typer.Option("--recipe", help="Recipe whose persona, tokenizer, length and data settings apply.")
]


@exits(resumable=True)
def generate(
    out: Annotated[Path, typer.Argument(help="JSONL file to write; a teacher's is continued where it ended.")],
    recipe: RecipeForData = DEFAULT_RECIPE,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="YAML file of a teacher behind a URL, with quotas and limits.")
    ] = None,
    failures: Annotated[
        Path | None,
        typer.Option("--failures", help="behavior/<arm>.jsonl of a run: conversations of the failed cases' kind."),
    ] = None,
    per_case: Annotated[int, typer.Option("--per-case", help="Conversations for each failed case.", min=1)] = 3,
    overrides: SetOption = None,
    json_: JsonOption = False,
) -> ExitCode:
    """Generate conversations by the grammars of the small world, or by a teacher; exit 1 where some are missing."""
    from qat.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    with terminable():
        if teacher is not None:
            result = _by_teacher(loaded, out, teacher, failures, per_case)
        elif failures is not None:
            result = _from_failures(loaded, out, failures, per_case)
        else:
            result = _by_grammar(loaded, out)
    emit(result, json_, lambda: print_pairs(result))
    return ExitCode.DONE if result.get("complete", True) else ExitCode.FAIL


def _by_grammar(recipe: Recipe, out: Path) -> dict[str, Any]:
    from qat.data.generate import conversations
    from qat.data.schema import load_persona

    if recipe.data.count is None:
        raise UserError("this recipe reads a file", where="data.source", value=recipe.data.source)
    made: Any = conversations(load_persona(recipe.persona), recipe.data.count, recipe.data.seed)
    return {**_written(out, made), "seed": recipe.data.seed}


def _from_failures(recipe: Recipe, out: Path, results: Path, per_case: int) -> dict[str, Any]:
    from qat.chain import load_suite_of
    from qat.data.generate.adversarial import by_grammar
    from qat.data.generate.adversarial import failures as failures_of
    from qat.data.load import load_conversations
    from qat.data.schema import load_persona

    suite = load_suite_of(recipe)
    trained = results.resolve().parent.parent / "data" / "train.jsonl"
    known = load_conversations(trained) if trained.is_file() else []
    found = failures_of(results, suite)
    made, report = by_grammar(load_persona(recipe.persona), suite, found, per_case, recipe.data.seed, known)
    return {**_written(out, made), **report.to_json()}


def _by_teacher(recipe: Recipe, out: Path, settings: Path, results: Path | None, per_case: int) -> dict[str, Any]:
    from qat.chain import load_suite_of
    from qat.data.generate.adversarial import briefs
    from qat.data.generate.adversarial import failures as failures_of
    from qat.data.generate.teacher import generate_with_teacher, load_teacher, quotas
    from qat.data.schema import load_persona
    from qat.progress import progress_bar

    teacher, persona, suite = load_teacher(settings), load_persona(recipe.persona), load_suite_of(recipe)
    wanted = quotas(teacher) if results is None else briefs(persona, failures_of(results, suite), per_case, teacher)
    with progress_bar("teacher", sum(brief.count for brief in wanted)) as progress:
        report = generate_with_teacher(teacher, persona, suite, out, wanted, progress=progress)
    return {"file": str(out), **report.to_json()}


def _written(out: Path, made: list[Conversation]) -> dict[str, Any]:
    from qat.data.load import save_conversations
    from qat.receipt import sha256_file

    save_conversations(out, made)
    return {"file": str(out), "conversations": len(made), "sha256": sha256_file(out)}
