"""Where the stages of a run leave what others go on with, and which stages an arm is made from."""

from __future__ import annotations

from pathlib import Path

from qat.recipe.schema import Arm, Recipe
from qat.runs import Run

ADAPTER, MODEL = "adapter", "model"


def trained_by(arm: Arm) -> list[str]:
    """Stages beyond fine-tuning that an arm is made from."""
    stage = {"ptq": "calibrate", "distilled": "distill"}.get(arm.kind)
    return [] if stage is None else [f"{stage}/{arm.preset}"]


def trained(recipe: Recipe) -> str:
    """What a training leaves in its stage's folder."""
    return MODEL if recipe.train.trains == "all" else ADAPTER


def modes(recipe: Recipe) -> dict[str, object]:
    """How fine-tuning trains, where that is not the ordinary way; what is packed follows from all presets."""
    found: dict[str, object] = {} if recipe.train.trains == "adapter" else {"trains": recipe.train.trains}
    if recipe.train.memory != "bf16":
        own = {name: block.model_dump(mode="json") for name, block in recipe.quant.presets.items()}
        found |= {"memory": recipe.train.memory, "presets": [own.get(name, name) for name in recipe.presets]}
    return found


def fine_tuned(run: Run) -> Path:
    """What fine-tuning leaves."""
    return run.path("sft", trained(run.recipe))


def distilled(run: Run, arm: Arm) -> Path | None:
    """What distillation leaves for an arm; None where the arm has none."""
    return run.path("distill", str(arm.preset), trained(run.recipe)) if arm.kind == "distilled" else None


def quant_state(run: Run, arm: Arm) -> Path | None:
    """The scales of an arm; None where it stays in BF16."""
    folder = {"ptq": "calibration", "distilled": "distill"}.get(arm.kind)
    return None if folder is None else run.path(folder, str(arm.preset), "quant_state.safetensors")
