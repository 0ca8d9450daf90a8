"""`validate`, `recipes list`, `recipes show`."""

from __future__ import annotations

from typing import Annotated

import typer

from qat.commands.common import JsonOption, SetOption, emit, exits
from qat.errors import ExitCode, UserError

app = typer.Typer(no_args_is_help=True, help="The shipped recipes.")


@exits()
def validate(
    recipe: Annotated[str | None, typer.Argument(help="Shipped recipe or YAML file.")] = None,
    option: Annotated[str | None, typer.Option("--recipe", help="The same, as other commands spell it.")] = None,
    overrides: SetOption = None,
    json_: JsonOption = False,
) -> ExitCode:
    """Check a recipe without loading anything; all faults at once, exit 2 where there are any."""
    from qat.recipe.load import check_recipe, find_recipe

    if (recipe is None) == (option is None):
        raise UserError("name one recipe", remedy="qat validate annie_tiny")
    name = recipe if recipe is not None else str(option)
    faults = check_recipe(name, overrides or ())
    result = {"recipe": str(find_recipe(name)), "faults": [fault._asdict() for fault in faults]}

    def text() -> None:
        for fault in faults:
            print(fault)
        if not faults:
            print(f"{name}: no faults")

    emit(result, json_, text)
    return ExitCode.USER_ERROR if faults else ExitCode.DONE


@app.command("list")
@exits()
def list_(json_: JsonOption = False) -> ExitCode:
    """List the shipped recipes."""
    from qat.recipe.load import load_recipe, recipe_names

    recipes = [load_recipe(name) for name in recipe_names()]
    rows = [
        {"name": recipe.name, "base": recipe.base.model, "arms": len(recipe.arms), "description": recipe.description}
        for recipe in recipes
    ]

    def text() -> None:
        width = max(len(recipe.name) for recipe in recipes)
        for recipe in recipes:
            print(f"{recipe.name:<{width}}  {recipe.description}")

    emit(rows, json_, text)
    return ExitCode.DONE


@app.command("show")
@exits()
def show(
    recipe: Annotated[str, typer.Argument(help="Shipped recipe or YAML file.")],
    overrides: SetOption = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="With every default written out.")] = False,
    json_: JsonOption = False,
) -> ExitCode:
    """Print a recipe: as it is written, with its comments, or resolved."""
    from qat.recipe.load import find_recipe, load_recipe

    loaded = load_recipe(recipe, overrides or ())

    def text() -> None:
        written = find_recipe(recipe).read_text(encoding="utf-8")
        print(loaded.to_yaml() if resolved or overrides else written, end="")

    emit(loaded.model_dump(mode="json"), json_, text)
    return ExitCode.DONE
