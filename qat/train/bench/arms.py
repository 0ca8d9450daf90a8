"""The same network trained four ways: by this package in BF16 and NVFP4, by Transformers with PEFT, by ModelOpt.

All have the shape of a real configuration, random weights and LoRA on every routed expert. Each arm is a model and a
function that does one forward and backward.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.train.base import training_device

EXPERTS = ["mixer.experts.up_proj", "mixer.experts.down_proj"]
ATTENTION = r".*mixer\.(q_proj|k_proj|v_proj|o_proj)$"
RANK = 16


class Arm(NamedTuple):
    """One way of training.

    Attributes:
        name: In tables and files.
        what: In words.
        model: On the GPU, in `train` mode.
        step: Takes token ids (batch, length), does forward and backward, returns the loss.
    """

    name: str
    what: str
    model: nn.Module
    step: Callable[[Tensor], Tensor]


def configuration(file: Path, layers: int | None) -> Any:
    """Read a Nemotron-H configuration, cut to its first layers.

    Args:
        file: `config.json` of a checkpoint.
        layers: How many layers to keep; None keeps all.
    """
    from transformers import NemotronHConfig

    settings = json.loads(file.read_text(encoding="utf-8"))
    if layers is not None:
        settings["hybrid_override_pattern"] = settings["hybrid_override_pattern"][:layers]
        settings["num_hidden_layers"] = layers
    settings["use_cache"] = False
    return NemotronHConfig.from_dict(settings)


def network(config: Any, experts: str = "grouped_mm", *, checkpointing: bool = True) -> Any:
    """A frozen network with random BF16 weights on the GPU, in `train` mode."""
    model = _shape(config, training_device(), experts)
    model.requires_grad_(False)
    set_checkpointing(model, checkpointing)
    return model.train()


def _shape(config: Any, device: torch.device, experts: str) -> Any:
    from transformers import AutoModelForCausalLM

    with device:
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.bfloat16, experts_implementation=experts
        )


def packed_network(config: Any) -> Any:
    """A frozen network with random weights, all linears and experts of its layers in NVFP4, in `train` mode.

    One layer after the other gets its BF16 weights and is packed, so that the BF16 network never stands as a whole (as
    `qat.train.packed_base` loads it from files).
    """
    from qat.quant.names import memory_name
    from qat.quant.packed import packed_modules

    model = _shape(config, torch.device("meta"), "grouped_mm")
    left = [memory_name(name, config.model_type) for name in packed_modules([], config.to_dict())]
    for number, layer in enumerate(model.model.layers):
        _draw(model, layer)
        prefix = f"model.layers.{number}."
        for name in (name for name in left if name.startswith(prefix)):
            _pack(layer, name.removeprefix(prefix))
    for part in model.modules():
        if any(
            tensor.is_meta for tensor in (*part._parameters.values(), *part._buffers.values()) if tensor is not None
        ):
            _draw(model, part)
    model.requires_grad_(False)
    return model.train()


def _draw(model: Any, part: nn.Module) -> None:
    """Give a part of a network without memory its random weights, as the network's own initialization draws them."""
    part.to_empty(device=training_device())
    part.apply(model._init_weights)


def _pack(layer: nn.Module, name: str) -> None:
    """Replace a linear's weight, or a fused expert parameter, by its packed form."""
    from qat.quant.packed import packed_parameter

    parent, _, leaf = name.rpartition(".")
    holder = layer.get_submodule(parent)
    if leaf not in holder._parameters:
        holder, leaf = layer.get_submodule(name), "weight"
    holder._parameters[leaf] = packed_parameter(holder.get_parameter(leaf).detach())


def set_checkpointing(model: Any, on: bool) -> None:
    """Recompute each layer in the backward pass, or keep everything."""
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()


def with_lora(model: Any, modules: str | list[str], parameters: list[str]) -> Any:
    """PEFT's LoRA of rank 16, factors in float32, B not zero so that nothing is easier than in the middle of a run."""
    from peft import LoraConfig, get_peft_model

    from qat.patches.registry import ensure

    ensure("peft_mamba_out_proj")
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=modules, target_parameters=parameters
    )
    with training_device():  # drawn there: PEFT draws on the CPU and copies, seconds for the factors of all experts
        adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=1e-3)
    return adapted.train()


def next_token_loss(model: Any) -> Callable[[Tensor], Tensor]:
    """Transformers' own loss on random tokens, forward and backward."""

    def step(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def peft_bf16(config: Any) -> Arm:
    """Transformers and PEFT as they are, with grouped_mm and mamba-ssm's scan."""
    model = with_lora(network(config), [], EXPERTS)
    return Arm("peft_bf16", "Transformers + PEFT, BF16, grouped_mm", model, next_token_loss(model))


def qat_bf16(config: Any) -> Arm:
    """This package's BF16 training."""
    from qat.quant.kernels.nemotron_h import use_fast_layers_
    from qat.train.adapters import use_effective_weights_

    model = with_lora(network(config), [], EXPERTS)
    use_effective_weights_(model)
    use_fast_layers_(model)
    return Arm("qat_bf16", "qat, BF16", model, next_token_loss(model))


def qat_nvfp4(config: Any, ids: Tensor) -> Arm:
    """This package's NVFP4 training: preset `all`, weights and activations."""
    from qat.quant.kernels.nemotron_h import use_fast_layers_

    model = with_lora(network(config), [], EXPERTS)
    quantize(model, ids)
    use_fast_layers_(model)
    return Arm("qat_nvfp4", "qat, NVFP4 weights and activations (preset all)", model, next_token_loss(model))


def quantize(model: Any, ids: Tensor) -> Any:
    """Insert the quantizers of preset `all` and calibrate them on a batch; returns what was inserted."""
    from qat.quant.modelopt import calibrate, insert_quantizers

    inserted = insert_quantizers(model, "all", model.config.to_dict())
    calibrate(model.eval(), lambda each: each(input_ids=ids))
    model.train()
    return inserted


def modelopt_nvfp4(config: Any, ids: Tensor) -> Arm:
    """ModelOpt's own path: its default NVFP4 configuration, its wrapper of fused experts, its PEFT plugin.

    To be built before anything of this package is registered with ModelOpt.
    """
    import modelopt.torch.quantization as mtq

    model = with_lora(network(config), [], EXPERTS)
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda each: each(input_ids=ids))
    return Arm("modelopt_nvfp4", "ModelOpt 0.47, NVFP4_DEFAULT_CFG", model.train(), next_token_loss(model))
