"""Quantized experts and linears under autocast, `torch.compile` and `eval`: the values of the plain call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from qat.quant.lora import QuantLoraLinear
from qat.quant.modelopt import calibrate, insert_quantizers
from tests.tiny_models import nemotron_h_tiny, qwen3_moe_tiny, token_ids
from tests.unit.quant.adapters import with_lora

Call = Callable[..., Tensor]


def _quantized(build: Any) -> Any:
    model = with_lora(build())
    insert_quantizers(model, "all", model.config.to_dict())
    calibrate(model, lambda network: network(input_ids=token_ids()))
    return model.train()


def _experts(model: Any) -> tuple[Any, list[Tensor]]:
    """The outer wrapper of a layer's experts, and what it takes."""
    layer = next(module for module in model.modules() if isinstance(module, ParamWrapper))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 64, generator=generator).bfloat16()
    choice = torch.rand(20, layer.num_experts, generator=generator).topk(2).indices
    return layer, [hidden, choice, torch.rand(20, 2, generator=generator)]


def _linear(model: Any) -> tuple[Any, list[Tensor]]:
    layer = next(module for module in model.modules() if isinstance(module, QuantLoraLinear))
    return layer, [torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()]


def _run(layer: Any, call: Call, inputs: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of the input and of all factors, float32."""
    hidden, *others = inputs
    hidden = hidden.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = call(hidden, *others)
    y.float().square().sum().backward()
    assert hidden.grad is not None
    gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    assert len(gradients) >= 2
    return [tensor.float() for tensor in (y.detach(), hidden.grad, *gradients)]


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("part", [_experts, _linear])
@pytest.mark.parametrize("build", [nemotron_h_tiny, qwen3_moe_tiny])
def test_autocast_and_eval_change_nothing(build: Any, part: Any) -> None:
    layer, inputs = part(_quantized(build))
    expected = _run(layer, layer, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert _same(_run(layer, layer, inputs), expected)
        # What a layer that autocast keeps in float32 hands over; its gradient is then summed in float32.
        y, to_hidden, *to_factors = _run(layer, layer, [inputs[0].float(), *inputs[1:]])
    assert _same([y, *to_factors], [expected[0], *expected[2:]])
    torch.testing.assert_close(to_hidden, expected[1], rtol=1e-2, atol=1e-2 * float(expected[1].abs().max()))
    assert _same(_run(layer, layer.eval(), inputs), expected)


@pytest.mark.parametrize("part", [_experts, _linear])
@pytest.mark.parametrize("build", [nemotron_h_tiny, qwen3_moe_tiny])
def test_a_compiled_module_computes_the_same(build: Any, part: Any) -> None:
    """Through dynamo and the traced backward; what a compiler makes of the graph is its own affair."""
    layer, inputs = part(_quantized(build))
    expected = _run(layer, layer, inputs)
    torch._dynamo.reset()
    assert _same(_run(layer, torch.compile(layer, backend="aot_eager"), inputs), expected)


@pytest.mark.slow
def test_inductor_keeps_the_values_of_experts_without_a_gate() -> None:
    """A gate it fuses with the product before it, and leaves one rounding out."""
    layer, inputs = _experts(_quantized(nemotron_h_tiny))
    expected = _run(layer, layer, inputs)
    torch._dynamo.reset()
    assert _same(_run(layer, torch.compile(layer), inputs), expected)
