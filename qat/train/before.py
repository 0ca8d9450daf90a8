"""What is looked at before a training loads anything: does it fit, and does it train on what it should?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.errors import UserError
from qat.quant.packed import packed_modules
from qat.quant.presets import preset_of
from qat.train.base import training_device, weight_files
from qat.train.memory import GIB, RESERVE, Need, estimate, require_memory
from qat.train.parallel import ranks, sharding
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
        The estimate in GiB by part, for the receipt: that of one process with its share of a batch and the whole base,
        also where FSDP2 cuts it afterwards. For a model type whose layers are not known, its weights alone.

    Raises:
        UserError: It does not fit, and the recipe does not allow it by name; or several processes share a packed base.
    """
    if packed and ranks() > 1:
        raise UserError(
            "A packed base is trained on one GPU.",
            where="train.memory",
            value=f"nvfp4 on {ranks()} processes",
            remedy="use one GPU, or `memory: bf16`",
        )
    config, free = _config(base), _free_bytes()
    allowed = "memory" in recipe.train.allow
    known = config.get("model_type") in MODEL_TYPES
    if not known or sharding():
        stored = sum(path.stat().st_size for path in weight_files(base))
        # FSDP2 cuts the loaded base, so that for a moment it and the parts stand side by side.
        size = stored * (1 + 1 / ranks()) if sharding() else stored
        if size > free * (1 - RESERVE) and not allowed:
            raise UserError(
                "The base does not fit into memory.",
                where=str(base),
                value=f"{size / GIB:.1f} GiB of {free / GIB:.1f} GiB free",
                remedy="take another device; `train.allow: [memory]` tries all the same",
            )
        if not known:
            return {"weights": round(stored / GIB, 2)}
    need = _need(recipe, stage, packed, quantized, ranks())
    packable = _packable(recipe, config) if recipe.train.trains == "adapter" else []
    available = float("inf") if allowed or sharding() else free  # shards are not in the estimate
    otherwise = "`--launch-flags=--use_fsdp` cuts the base in parts; " if ranks() > 1 else ""
    return require_memory(config, need, available, packable, f"train.{stage}", otherwise).to_json()


def fits_whole(recipe: Recipe, base: Path, stage: str, quantized: list[str], processes: int, free: float) -> bool:
    """Whether a GPU of several has room for the whole BF16 base beside its share of a batch, as far as can be told.

    Args:
        recipe: Batch, length, adapter.
        base: Folder of the base checkpoint.
        stage: `sft` or `distill`.
        quantized: Modules with quantizers.
        processes: How many share a batch.
        free: Bytes that the fullest GPU has free.
    """
    config = _config(base)
    if config.get("model_type") not in MODEL_TYPES:
        return False  # what a step needs beside the weights cannot be told
    found = estimate(config, _need(recipe, stage, [], quantized, processes))
    # DDP keeps another copy of the factors' gradients, 4 bytes beside the 12 of `trained`, to send them in few pieces.
    return found.total + found.trained / 3 <= free * (1 - RESERVE)


def _need(recipe: Recipe, stage: str, packed: list[str], quantized: list[str], processes: int) -> Need:
    block = recipe.train.sft if stage == "sft" else recipe.train.distill
    adapter = recipe.train.adapter if stage == "sft" else recipe.distill_adapter
    return Need(
        memory="nvfp4" if packed else "bf16",
        packed=packed,
        trains=recipe.train.trains,
        rank=adapter.rank,
        targets=adapter.targets,
        batch_size=-(-block.batch_size // processes),
        length=recipe.data.max_length,
        checkpointing=recipe.train.gradient_checkpointing,
        quantized=quantized,
        teacher=stage == "distill",
        accumulates=block.gradient_accumulation > 1,
    )


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
        # What torch keeps of earlier stages, and no tensor uses, is free for this one.
        return float(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # only Linux has it; elsewhere nothing can be told beforehand
        return float("inf")
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
