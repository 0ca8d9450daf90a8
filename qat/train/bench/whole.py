"""The whole model, optimizer included: BF16 with LoRA, NVFP4 distillation, and training on an NVFP4 base."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from qat.train.bench.arms import (
    ATTENTION,
    EXPERTS,
    Arm,
    network,
    next_token_loss,
    packed_network,
    quantize,
    with_lora,
)


def whole_model_arms(config: Any, ids: Tensor, wanted: Collection[str], say: Callable[[str], None]) -> Iterator[Arm]:
    """Set up one arm after the other on the same weights; an arm is done with before the next one is asked for.

    Args:
        config: Of the model.
        ids: Tokens for the calibration.
        wanted: Names: `installed` (Transformers and PEFT as a new environment has them), `attention`, `experts`,
            `distillation`; or `packed`, alone.
        say: Takes what was just done.
    """
    if "packed" in wanted:
        model = packed_network(config)
        say("packed, layer by layer")
        _use_kernels(model)
        adapted = _adapted(model, ATTENTION, EXPERTS)
        what = "NVFP4 base, LoRA r16 on attention and all experts"
        yield Arm("packed", what, adapted, _cross_entropy(adapted))
        return
    model = network(config, "eager" if "installed" in wanted else "grouped_mm")
    say("random weights in BF16")
    if "installed" in wanted:
        adapted = with_lora(model, ATTENTION, [])
        what = "BF16, LoRA r16 on attention, loop over experts, scan in PyTorch"
        yield Arm("installed", what, adapted, next_token_loss(adapted))
        model = _plain(adapted)
        model.set_experts_implementation("grouped_mm")
    _use_kernels(model)
    for name, modules, parameters, what in (
        ("attention", ATTENTION, [], "BF16, LoRA r16 on attention"),
        ("experts", [], EXPERTS, "BF16, LoRA r16 on all experts"),
    ):
        if name in wanted:
            adapted = _adapted(model, modules, parameters)
            yield Arm(name, what, adapted, _cross_entropy(adapted))
            model = _plain(adapted)
    if "distillation" in wanted:
        adapted = with_lora(model, [], EXPERTS)
        quantize(adapted, ids)
        what = "NVFP4 distillation, LoRA r16 on all experts, teacher pass included"
        yield Arm("distillation", what, adapted, _distil(adapted))


def _use_kernels(model: Any) -> None:
    from qat.patches.registry import ensure
    from qat.quant.kernels.nemotron_h import use_fast_layers_

    ensure("mamba_ssm_kernels_without_build", "nemotron_h_fused_mamba")
    use_fast_layers_(model)


def _adapted(model: Any, modules: str | list[str], parameters: list[str]) -> Any:
    from qat.train.adapters import use_effective_weights_

    adapted = with_lora(model, modules, parameters)
    use_effective_weights_(adapted)
    return adapted


def _plain(adapted: Any) -> Any:
    """Take the adapters and the experts' replaced forward off again."""
    model = adapted.base_model.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    for module in model.modules():
        if "adapted" in module.__dict__:
            for name in ("adapted", "forward", "projection_names"):
                del module.__dict__[name]
    torch.cuda.empty_cache()
    return model


def _cross_entropy(model: Any) -> Callable[[Tensor], Tensor]:
    from qat.train.objective import cross_entropy_sum, hidden_states, output_weight

    weight, optimizer = output_weight(model), _optimizer(model)

    def step(ids: Tensor) -> Tensor:
        targets = ids.roll(-1, dims=1)
        loss = cross_entropy_sum(hidden_states(model, ids, targets), weight, targets.reshape(-1)) / ids.numel()
        return _finish(loss, optimizer)

    return step


def _distil(model: Any) -> Callable[[Tensor], Tensor]:
    from qat.quant.modelopt import quantizers_off
    from qat.train.objective import hidden_states, kl_sum, output_weight
    from qat.train.ranges import WeightRanges

    weight, optimizer, ranges = output_weight(model), _optimizer(model), WeightRanges(model)

    def step(ids: Tensor) -> Tensor:
        with torch.no_grad(), quantizers_off(model), model.disable_adapter():
            teacher = hidden_states(model, ids, ids)
        loss = kl_sum(hidden_states(model, ids, ids), teacher, weight, 1.0) / ids.numel()
        loss = _finish(loss, optimizer)
        ranges.grow_()
        return loss

    return step


def _optimizer(model: Any) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, fused=True)


def _finish(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()
