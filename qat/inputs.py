"""What the stages of the chain start from, and what identifies it: base, tokenizer, persona, the split of the data."""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qat
from qat.errors import UserError
from qat.receipt import files_digest, sha256_file
from qat.recipe.schema import Recipe

if TYPE_CHECKING:
    from qat.behavior.demands import Demands
    from qat.data.schema import Conversation


def split(
    conversations: Sequence[Conversation], fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Training and validation set: every category by its share, conversations with the same user turns on one side.

    Args:
        conversations: All of them.
        fraction: Share to hold out, at least one conversation. Categories give by the largest remainder, so that small
            ones are not forgotten; each keeps at least one distinct conversation for training.
        seed: Of the draw.

    Returns:
        Training and validation set, each in the order of the input.

    Raises:
        UserError: Too few distinct conversations for both sets.
    """
    groups: dict[str, dict[tuple[str, ...], list[int]]] = {}
    for index, conversation in enumerate(conversations):
        turns = tuple(str(message["content"]) for message in conversation["messages"] if message["role"] == "user")
        groups.setdefault(conversation["category"], {}).setdefault(turns, []).append(index)
    sizes = {category: sum(map(len, members.values())) for category, members in groups.items()}
    held_out: set[int] = set()
    for category, wanted in _quotas(sizes, fraction).items():
        members = list(groups[category].values())
        random.Random(f"{seed}/{category}").shuffle(members)
        taken = 0
        for group in members[:-1]:
            if taken >= wanted:
                break
            held_out.update(group)
            taken += len(group)
    if not held_out:
        raise UserError(
            "too few distinct conversations to hold some out",
            where="data.validation_fraction",
            value=f"{len(conversations)} conversations in {len(groups)} categories",
            remedy="bring more conversations: a category needs two distinct ones to give one",
        )
    training = [item for index, item in enumerate(conversations) if index not in held_out]
    return training, [conversations[index] for index in sorted(held_out)]


def _quotas(sizes: dict[str, int], fraction: float) -> dict[str, int]:
    """How many each category gives (Hamilton's method: floors, then the largest remainders)."""
    total = max(1, round(fraction * sum(sizes.values())))
    exact = {category: fraction * size for category, size in sorted(sizes.items())}
    quotas = {category: int(share) for category, share in exact.items()}
    by_remainder = sorted(exact, key=lambda category: (quotas[category] - exact[category], category))
    for category in by_remainder[: max(0, total - sum(quotas.values()))]:
        quotas[category] += 1
    return quotas


def demands_on_replies(recipe: Recipe, suites: Sequence[str] | None = None) -> Demands:
    """What the recipe's suite, or other suites by name, demand of every reply in the data."""
    from qat.behavior.demands import demands_of
    from qat.behavior.suite import load_suite

    return demands_of([load_suite(name) for name in suites or (recipe.behavior.suite,)])


def accepted_faults(codes: Sequence[str]) -> frozenset[str]:
    """The codes of faults that shall not stop a run.

    Raises:
        UserError: A code that the audit does not know.
    """
    from qat.behavior.checks import check_names
    from qat.data.audit.summary import FAULTS

    known = (*FAULTS, *check_names())
    for code in codes:
        if code not in known:
            near = difflib.get_close_matches(code, known, n=1)
            raise UserError(
                "the audit knows no fault of this name",
                where="data.accept",
                value=code,
                remedy=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}",
            )
    return frozenset(codes)


def base_folder(recipe: Recipe) -> Path:
    """The base checkpoint's folder."""
    from qat.train.base import resolve_base

    return resolve_base(recipe.base)


def base_identity(recipe: Recipe) -> dict[str, Any]:
    """What decides which base it is, wherever it lies; its model card does not."""
    folder = base_folder(recipe)
    block = recipe.base.model_dump(mode="json", exclude={"model", "revision", "chat_template"})
    return {
        **block,
        "files": files_digest(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md"),
        **_template(recipe),
    }


def require_presets(recipe: Recipe) -> None:
    """Check that the presets of the recipe fit the base, before anything is trained.

    Raises:
        UserError: The base's modules are not known here, a pattern matches none of them, or a module cannot be stored
            as asked.
    """
    from qat.quant.presets import preset_of

    names = tuple(dict.fromkeys((*recipe.presets, *recipe.quant.presets)))
    if names:
        config = json.loads((base_folder(recipe) / "config.json").read_text(encoding="utf-8"))
        for name in names:
            preset_of(name, recipe.quant.presets, config).formats(config)


def tokenizer_identity(recipe: Recipe) -> dict[str, Any]:
    """Hash of the tokenizer and template that turn conversations into tokens."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
    paths = [base_folder(recipe) / name for name in names]
    return {"files": files_digest(path for path in paths if path.is_file()), **_template(recipe)}


def _template(recipe: Recipe) -> dict[str, Any]:
    own = recipe.base.chat_template
    return {"chat_template_sha256": None if own is None else sha256_file(Path(own))}


def persona_file(recipe: Recipe) -> Path:
    """The persona's YAML file."""
    if recipe.persona.endswith((".yaml", ".yml")) or "/" in recipe.persona:
        return Path(recipe.persona)
    return Path(qat.__file__).resolve().parent / "data" / "personas" / f"{recipe.persona}.yaml"
