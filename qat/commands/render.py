"""`data render`: one conversation as the tokens that training sees."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from qat.commands.common import JsonOption, SetOption, emit, exits
from qat.commands.generate import DEFAULT_RECIPE, RecipeForData
from qat.errors import ExitCode, UserError


@exits()
def render(
    file: Annotated[Path, typer.Argument(help="Conversations: a file or folder that `qat data audit` reads.")],
    index: Annotated[int, typer.Option("--index", help="Which one, from 0.", min=0)] = 0,
    identity: Annotated[str | None, typer.Option("--id", help="Which one, by its id.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page that needs nothing else.")] = None,
    recipe: RecipeForData = DEFAULT_RECIPE,
    overrides: SetOption = None,
    json_: JsonOption = False,
) -> ExitCode:
    """Show one conversation as tokens; what the loss counts stands in green (without colours in ⟦ ⟧)."""
    from qat.data.load import load_conversations
    from qat.data.render import render_rows
    from qat.data.render_page import as_page
    from qat.data.render_view import as_json, as_text, show
    from qat.recipe.load import load_recipe
    from qat.storage import write_atomic
    from qat.train.base import load_tokenizer, resolve_base

    loaded = load_recipe(recipe, overrides or ())
    conversations = load_conversations(file)
    if identity is not None:
        places = [place for place, each in enumerate(conversations) if each["id"] == identity]
        if not places:
            raise UserError("no such conversation", where="--id", value=identity, remedy=f"the ids stand in {file}")
        index = places[0]
    if index >= len(conversations):
        raise UserError("no such conversation", where="--index", value=index, remedy=f"0 to {len(conversations) - 1}")
    conversation = conversations[index]
    tokenizer = load_tokenizer(loaded.base, resolve_base(loaded.base))
    rows = [show(row, tokenizer) for row in render_rows(conversation, tokenizer, max_length=loaded.data.max_length)]
    if html is not None:
        facts = [conversation["category"], f"recipe {loaded.name}", f"at most {loaded.data.max_length} tokens"]
        write_atomic(html, as_page(conversation["id"], facts, rows))
    result = {"id": conversation["id"], "category": conversation["category"], "rows": [as_json(row) for row in rows]}

    def text() -> None:
        for number, row in enumerate(rows, start=1):
            print(as_text(row, sys.stdout.isatty() and "NO_COLOR" not in os.environ))
            cut = f", {row.dropped} more cut off at {loaded.data.max_length}" if row.dropped else ""
            which = f"row {number} of {len(rows)}: " if len(rows) > 1 else ""
            print(f"-- {which}{row.tokens} tokens, {row.trained} trained ({row.share:.1%}){cut}")
        if html is not None:
            print(f"-- page: {html}")

    emit(result, json_, text)
    return ExitCode.DONE
