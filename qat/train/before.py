"""What is looked at before a training loads anything: does it fit, and does it train on what it should?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.errors import UserError
from qat.quant.packed import packed_modules
from qat.quant.presets import preset_of
from qat.train.base import training_device, weight_files
from qat.train.memory import GIB, RESERVE, Need, require_memory
from qat.train.parallel import ranks
from qat.train.shapes import MODEL_TYPES

if TYPE_CHECKING:
    from qat.recipe.schema import Recipe
    from qat.train.sft import RowCounts

LEAST_TRAINED_SHARE = 0.02
"""Tokens with a loss of all tokens, below which a mask is taken for a mistake."""


def packed_by(recipe: Recipe, base: Path) -> list[str]:
    """The modules that a recipe keeps in NVFP4; none with `train.memory: bf16`.

    Raises:
        UserError: A preset does not fit the model.
    """
    if recipe.train.memory == "bf16":
        return []
    return _packable(recipe, _config(base))


def require_fits(recipe: Recipe, base: Path, stage: str, packed: list[str], quantized: list[str]) -> dict[str, float]:
    """Estimate the memory of a stage and refuse it where the device has less.

    Args:
        recipe: Modes, batch, length, adapter.
        base: Folder of the base checkpoint.
        stage: `sft` or `distill`.
        packed: Modules of the base that are kept in NVFP4.
        quantized: Modules with quantizers.

    Returns:
        The estimate in GiB by part, for the receipt. For a model type whose layers are not known, its weights alone.

    Raises:
        UserError: It does not fit, and the recipe does not allow it by name; or several processes share a packed base.
    """
    if packed and ranks() > 1:
        raise UserError(
            "A packed base is trained on one GPU.",
            where="train.memory",
            value=f"nvfp4 on {ranks()} processes",
            remedy="use one GPU, or `memory: bf16`, which is sharded",
        )
    config, free = _config(base), _free_bytes()
    block = recipe.train.sft if stage == "sft" else recipe.train.distill
    adapter = recipe.train.adapter if stage == "sft" else recipe.distill_adapter
    if config.get("model_type") not in MODEL_TYPES:
        size = sum(path.stat().st_size for path in weight_files(base))
        if size > free * (1 - RESERVE) and "memory" not in recipe.train.allow:
            raise UserError(
                "The base does not fit into memory.",
                where=str(base),
                value=f"{size / GIB:.1f} GiB of {free / GIB:.1f} GiB free",
                remedy="take another device; `train.allow: [memory]` tries all the same",
            )
        return {"weights": round(size / GIB, 2)}
    need = Need(
        memory="nvfp4" if packed else "bf16",
        packed=packed,
        trains=recipe.train.trains,
        rank=adapter.rank,
        targets=adapter.targets,
        batch_size=-(-block.batch_size // ranks()),
        length=recipe.data.max_length,
        checkpointing=recipe.train.gradient_checkpointing,
        quantized=quantized,
        teacher=stage == "distill",
    )
    allowed = "memory" in recipe.train.allow or ranks() > 1  # shards are not in the estimate
    packable = _packable(recipe, config) if recipe.train.trains == "adapter" else []
    return require_memory(config, need, float("inf") if allowed else free, packable, f"train.{stage}").to_json()


def require_trained_share(recipe: Recipe, counts: RowCounts, file: Path) -> None:
    """Refuse a mask that trains next to nothing.

    Raises:
        UserError: Fewer than 2 % of the tokens have a loss, and the recipe does not allow it by name.
    """
    share = counts.supervised / counts.tokens
    if share < LEAST_TRAINED_SHARE and "thin_mask" not in recipe.train.allow:
        raise UserError(
            f"Only {share:.2%} of the tokens would be trained on.",
            where=str(file),
            value=f"{counts.supervised} of {counts.tokens} tokens, {counts.truncated} rows cut at "
            f"{recipe.data.max_length} tokens",
            remedy="raise data.max_length or shorten the prompt; `train.allow: [thin_mask]` trains all the same",
        )


def _packable(recipe: Recipe, config: dict[str, Any]) -> list[str]:
    return packed_modules([preset_of(name, recipe.quant.presets, config) for name in recipe.presets], config)


def _config(base: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return config


def _free_bytes() -> float:
    """Memory that the training device has free."""
    import torch

    if training_device().type == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # only Linux has it; elsewhere nothing can be told beforehand
        return float("inf")
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
