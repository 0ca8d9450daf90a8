"""Which `config.json` a recipe's base has, before its weights are here.

The planner and the rehearsal need the sizes of the base and nothing else of it. They are looked for where a user may
already have them (a folder, the local Hugging Face cache, `qat fetch --config-only`) and at last in the cards that
this package ships for the bases of its own recipes: the sizes of the public `config.json`, with their source.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.errors import UserError

if TYPE_CHECKING:
    from qat.recipe.schema import BaseBlock

CARDS = Path(__file__).resolve().parent / "cards"
_TINY_BASE = "tiny-base"


class BaseShape(NamedTuple):
    """A base's sizes.

    Attributes:
        config: Contents of its `config.json` (of a card: those that decide the shape).
        origin: Where they come from, in words.
        folder: The checkpoint's folder where there is one (its weights may be missing); None for a card.
    """

    config: dict[str, Any]
    origin: str
    folder: Path | None

    @property
    def text(self) -> dict[str, Any]:
        """The language model's part: of a model with several towers `text_config`."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config


def find_shape(block: BaseBlock) -> BaseShape:
    """Find the sizes of a recipe's base.

    Args:
        block: `model` is `tiny-base`, a folder, or a hub id.

    Raises:
        UserError: There is no config.json for it here, or it is no JSON object.
    """
    folder = CARDS.parents[1] / "data" / "tiny_base" if block.model == _TINY_BASE else Path(block.model)
    if (folder / "config.json").is_file():
        return BaseShape(_read(folder / "config.json"), str(folder / "config.json"), folder)
    cached = _cached(block)
    if cached is not None:
        return BaseShape(_read(cached), f"the local Hugging Face cache: {cached}", cached.parent)
    card = CARDS / f"{block.model.replace('/', '--')}.json"
    if "/" in block.model and card.is_file():
        content = _read(card)
        return BaseShape(content["config"], f"shape card of {content['model']}: {content['source']}", None)
    raise UserError(
        "The sizes of the base are not known here.",
        where="base.model",
        value=block.model,
        remedy="`qat fetch --config-only` gets its config.json alone; or name a folder that holds one",
    )


def _cached(block: BaseBlock) -> Path | None:
    """`config.json` in the local Hugging Face cache; weights need not be there."""
    if "/" not in block.model or block.model.startswith((".", "/")):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:  # it comes with the training extra; planning needs none of it
        return None
    try:
        found = try_to_load_from_cache(block.model, "config.json", revision=block.revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("The base's config.json cannot be read.", where=str(path), value=str(error)) from error
    if not isinstance(content, dict):
        raise UserError("The base's config.json is no JSON object.", where=str(path))
    return content
