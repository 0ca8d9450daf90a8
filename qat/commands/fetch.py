"""`fetch`: the base of a recipe, from the hub or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qat.commands.common import JsonOption, SetOption, emit, exits, print_pairs, terminable
from qat.errors import ExitCode, UserError

if TYPE_CHECKING:
    from qat.recipe.schema import BaseBlock


@exits(resumable=True)
def fetch(
    recipe: Annotated[str | None, typer.Option("--recipe", help="Shipped recipe or YAML file.")] = None,
    overrides: SetOption = None,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Configuration and tokenizer, which plan and rehearsal need.")
    ] = False,
    source: Annotated[Path | None, typer.Option("--from", help="A folder that was carried here: check it.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Link or copy the checkpoint to this folder.")] = None,
    json_: JsonOption = False,
) -> ExitCode:
    """Get the base of a recipe into the local Hugging Face cache, or check a folder that holds it."""
    if recipe is None:
        raise UserError("`qat fetch` needs a recipe.", where="--recipe", remedy="qat recipes list")
    if source is not None and config_only:
        raise UserError("--config-only belongs to the hub.", remedy="leave --from or --config-only out")
    from qat.recipe.load import load_recipe
    from qat.train.base import TINY_BASE

    base = load_recipe(recipe, overrides or ()).base
    if base.model == TINY_BASE and source is None:
        result: dict[str, Any] = {"model": base.model, "note": "embedded in the package: there is nothing to fetch"}
    elif source is not None or Path(base.model).is_dir():
        result = _from_folder(source or Path(base.model), base, out)
    else:
        result = _from_hub(base, config_only, out)
    emit(result, json_, lambda: print_pairs({key: value for key, value in result.items() if key != "files"}))
    return ExitCode.DONE


def _from_folder(folder: Path, base: BaseBlock, out: Path | None) -> dict[str, Any]:
    from qat.fetch.folder import check_folder, place

    checked = check_folder(folder, base)
    where = folder if out is None else place(folder, checked.files, out)
    return {**checked.to_json(), "use": f"--set base.model={where.resolve()}"}


def _from_hub(base: BaseBlock, config_only: bool, out: Path | None) -> dict[str, Any]:
    from qat.fetch.folder import place
    from qat.fetch.hub import fetch_from_hub
    from qat.train.base import require_suitable, resolve_base

    with terminable():
        fetched = fetch_from_hub(base.model, base.revision, weights=False)
        require_suitable(fetched.folder, base)  # before tens of gigabytes come
        if not config_only:
            small = fetched.downloaded
            fetched = fetch_from_hub(base.model, base.revision)
            fetched = fetched._replace(downloaded=fetched.downloaded + small)
            resolve_base(base)  # the index's files are all there
    result = fetched.to_json()
    if base.revision is None:
        result["pin"] = f"--set base.revision={fetched.revision}"
    if out is not None:
        result["use"] = f"--set base.model={place(fetched.folder, fetched.files, out).resolve()}"
    return result
