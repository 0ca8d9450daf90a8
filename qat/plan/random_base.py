"""The base in its true shape with random weights: for a rehearsal, before 63 GB are downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qat.errors import UserError
from qat.patches.registry import ensure
from qat.quant.names import memory_name
from qat.quant.packed import packed_parameter
from qat.train.base import PATCHES, training_device, use_kernels_

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def random_base(folder: Path, packed: Sequence[str], seed: int) -> PreTrainedModel:
    """Build a base from its sizes, on the training device, as `load_base` gives it.

    Args:
        folder: Holds its `config.json`, and nothing else that is read.
        packed: Checkpoint names of the modules to keep in NVFP4. They are packed one after the other, so that the whole
            BF16 base stands on the device for a moment: a rehearsal needs that room where the training does not.
        seed: Of the weights.

    Returns:
        The causal language model in `eval` mode, frozen, without KV cache.

    Raises:
        UserError: transformers does not know the model type, or the sizes do not make a model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    ensure(
        *PATCHES.get(model_type, ()), *(("nemotron_h_fused_mamba",) if packed and model_type == "nemotron_h" else ())
    )
    device = training_device()
    # As load_base and load_packed_base choose.
    experts = "eager" if device.type == "cpu" and not packed else "grouped_mm"
    try:
        shape = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, TypeError, OSError) as error:
        raise UserError("The base's sizes make no model.", where="config.json", value=str(error)) from error
    torch.manual_seed(seed)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            shape, dtype=torch.bfloat16, experts_implementation=experts
        )
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # float32 in the checkpoint
            buffer.data = buffer.data.float()
    for name in packed:
        _pack_(model, memory_name(name, model_type))
    model.config.use_cache = False
    model.requires_grad_(False)
    use_kernels_(model)
    return model.eval()


def _pack_(model: PreTrainedModel, name: str) -> None:
    """Replace a linear's weight, or a fused expert parameter, by its packed form."""
    parent, _, leaf = name.rpartition(".")
    holder, key = model.get_submodule(parent), leaf
    if leaf not in holder._parameters:
        holder, key = model.get_submodule(name), "weight"
    weight = holder._parameters[key]
    if weight is None:
        raise RuntimeError(f"{name} has no weight to pack")
    holder._parameters[key] = packed_parameter(weight.detach())
