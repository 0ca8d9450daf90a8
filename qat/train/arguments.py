"""What the loop tells transformers' Trainer: hyperparameters of the recipe, all that it would do itself off."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainingArguments

from qat.errors import UserError

if TYPE_CHECKING:
    from qat.recipe.schema import DistillBlock, SftBlock


def training_arguments(block: SftBlock | DistillBlock, steps: int, seed: int, folder: Path) -> TrainingArguments:
    """Translate a recipe's block; joins the other processes where there are several.

    Args:
        block: Hyperparameters.
        steps: Optimizer steps.
        seed: Of torch's generators.
        folder: Of the checkpoints.

    Raises:
        UserError: This process sees several GPUs and was not started for one of them.
    """
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            "Several GPUs are visible and this process trains on one.",
            where="CUDA_VISIBLE_DEVICES",
            value=torch.cuda.device_count(),
            remedy="use them all with `qat train --gpus N`, or set CUDA_VISIBLE_DEVICES to one of them",
        )
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=block.batch_size,
        gradient_accumulation_steps=block.gradient_accumulation,
        learning_rate=block.learning_rate,
        lr_scheduler_type=block.scheduler,
        warmup_steps=math.ceil(block.warmup_ratio * steps),
        weight_decay=block.weight_decay,
        max_grad_norm=block.max_grad_norm,
        optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
        seed=seed,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        # Every factor takes part in every step; the guard proves it.
        ddp_find_unused_parameters=False,
    )
