"""`data generate`, `data audit`, `data render`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qat.commands.common import JsonOption, SetOption, emit, exits, print_pairs
from qat.errors import ExitCode, UserError

app = typer.Typer(no_args_is_help=True, help="Conversations: make, audit, look at them as tokens.")
DEFAULT_RECIPE = "annie_tiny"
RecipeForData = Annotated[
    str, typer.Option("--recipe", help="Recipe whose persona, tokenizer, length and data settings apply.")
]


@app.command("generate")
@exits()
def generate(
    out: Annotated[Path, typer.Argument(help="JSONL file to write.")],
    recipe: RecipeForData = DEFAULT_RECIPE,
    overrides: SetOption = None,
    json_: JsonOption = False,
) -> ExitCode:
    """Generate a recipe's conversations into a file; the same seed gives the same bytes."""
    from qat.data.generate import conversations
    from qat.data.load import save_conversations
    from qat.data.schema import load_persona
    from qat.receipt import sha256_file
    from qat.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if loaded.data.count is None:
        raise UserError("this recipe reads a file", where="data.source", value=loaded.data.source)
    made: Any = conversations(load_persona(loaded.persona), loaded.data.count, loaded.data.seed)
    save_conversations(out, made)
    result = {"file": str(out), "conversations": len(made), "seed": loaded.data.seed, "sha256": sha256_file(out)}
    emit(result, json_, lambda: print_pairs(result))
    return ExitCode.DONE


@app.command("audit")
@exits()
def audit(
    file: Annotated[Path, typer.Argument(help="JSONL file of conversations.")],
    recipe: RecipeForData = DEFAULT_RECIPE,
    overrides: SetOption = None,
    json_: JsonOption = False,
) -> ExitCode:
    """Audit conversations against a recipe's persona and tokenizer; exit 1 where there are faults."""
    from qat.data.audit import audit as audit_conversations
    from qat.data.load import load_conversations
    from qat.data.schema import load_persona
    from qat.recipe.load import load_recipe
    from qat.train.base import load_tokenizer, resolve_base

    loaded = load_recipe(recipe, overrides or ())
    tokenizer = load_tokenizer(loaded.base, resolve_base(loaded.base))
    persona = load_persona(loaded.persona)
    found = audit_conversations(load_conversations(file), persona, tokenizer, loaded.data.max_length)
    emit(found.to_json(), json_, lambda: print_pairs(found.to_json()))
    return ExitCode.FAIL if found.faults else ExitCode.DONE


@app.command("render")
@exits()
def render(
    file: Annotated[Path, typer.Argument(help="JSONL file of conversations.")],
    index: Annotated[int, typer.Option("--index", help="Which one, from 0.", min=0)] = 0,
    recipe: RecipeForData = DEFAULT_RECIPE,
    overrides: SetOption = None,
    json_: JsonOption = False,
) -> ExitCode:
    """Show one conversation as the model sees it; what the loss counts stands in the colour green (or in ⟦ ⟧)."""
    from qat.data.load import load_conversations
    from qat.data.render import render as render_conversation
    from qat.recipe.load import load_recipe
    from qat.train.base import load_tokenizer, resolve_base

    loaded = load_recipe(recipe, overrides or ())
    conversations = load_conversations(file)
    if index >= len(conversations):
        raise UserError("no such conversation", where="--index", value=index, remedy=f"0 to {len(conversations) - 1}")
    tokenizer = load_tokenizer(loaded.base, resolve_base(loaded.base))
    row = render_conversation(conversations[index], tokenizer, max_length=loaded.data.max_length)
    pieces: list[tuple[bool, str]] = []
    start = 0
    for end in range(1, len(row.input_ids) + 1):
        supervised = row.labels[start] != -100
        if end == len(row.input_ids) or (row.labels[end] != -100) != supervised:
            pieces.append((supervised, str(tokenizer.decode(row.input_ids[start:end]))))
            start = end
    counted = sum(label != -100 for label in row.labels)
    result = {
        "id": conversations[index]["id"],
        "tokens": len(row.input_ids),
        "supervised": counted,
        "input_ids": list(row.input_ids),
        "labels": list(row.labels),
        "pieces": [{"supervised": supervised, "text": text} for supervised, text in pieces],
    }

    def text() -> None:
        for supervised, piece in pieces:
            if supervised:
                typer.secho(piece if _colours() else f"⟦{piece}⟧", fg=typer.colors.GREEN, nl=False)
            else:
                typer.echo(piece, nl=False)
        print(f"\n-- {len(row.input_ids)} tokens, {counted} supervised")

    emit(result, json_, text)
    return ExitCode.DONE


def _colours() -> bool:
    import os
    import sys

    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
