"""The guard: it stays quiet where everything runs and names what does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.patches.guard import DeadModules, watch


class TensorQuantizer(nn.Module):
    """The part of ModelOpt's interface that the guard looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True

    def forward(self, x: Tensor) -> Tensor:
        return x


class Layer(nn.Module):
    """A linear with LoRA and a quantizer; `bypass` computes past both, as a fused kernel does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(2, 4))
        self.lora_B = nn.Parameter(torch.zeros(4, 2))
        self.input_quantizer = TensorQuantizer()
        self.bypass = False

    def forward(self, x: Tensor) -> Tensor:
        if self.bypass:
            return x @ self.weight.T
        return self.input_quantizer(x) @ (self.weight + self.lora_B @ self.lora_A).T


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()


def test_quiet_where_everything_takes_part() -> None:
    model = nn.Sequential(Layer(), Layer())
    with watch(model) as seen:
        step(model, torch.randn(3, 4))
    seen.require(quantizers=True, adapters=True)
    assert seen.quantizer_calls == {"0.input_quantizer": 1, "1.input_quantizer": 1}
    assert set(seen.gradients.values()) == {1}


def test_names_what_was_bypassed() -> None:
    model = nn.Sequential(Layer(), Layer())
    model[1].bypass = True
    with watch(model) as seen:
        step(model, torch.randn(3, 4))
    with pytest.raises(DeadModules) as dead:
        seen.require()
    assert dead.value.dead.quantizers == ["1.input_quantizer"]
    assert dead.value.dead.parameters == ["1.lora_A", "1.lora_B"]
    assert "1.input_quantizer" in str(dead.value) and "1.lora_B" in str(dead.value)
    seen.require(quantizers=False, adapters=False)
    with pytest.raises(DeadModules, match="quantizers") as dead:
        seen.require(adapters=False)
    assert not dead.value.dead.parameters


def test_a_gradient_of_zeros_every_time_is_dead() -> None:
    model = Layer()
    model.lora_B.data.normal_()
    with watch(model) as seen:
        step(model, torch.zeros(3, 4))
        step(model, torch.zeros(3, 4))
    with pytest.raises(DeadModules) as dead:
        seen.require()
    assert dead.value.dead.parameters == ["lora_A", "lora_B"]


def test_a_gradient_of_zeros_once_is_not() -> None:
    model = Layer()
    model.lora_B.data.normal_()
    with watch(model) as seen:
        step(model, torch.zeros(3, 4))
        model.zero_grad()
        step(model, torch.randn(3, 4))
    seen.require()


def test_a_fresh_adapters_a_has_no_gradient_yet() -> None:
    model = Layer()
    with watch(model) as seen:
        step(model, torch.randn(3, 4))
    assert not model.lora_A.grad.any()  # type: ignore[union-attr]
    seen.require()
    # From a B that is not zero on, A must get one.
    model.zero_grad()
    model.lora_B.data.normal_()
    with watch(model) as seen:
        step(model, torch.zeros(3, 4))
    assert seen.live_gradients["lora_A"] == 0


def test_disabled_quantizers_and_frozen_parameters_do_not_count() -> None:
    model = Layer()
    model.bypass = True
    model.input_quantizer.is_enabled = False
    model.lora_A.requires_grad_(False)
    model.lora_B.requires_grad_(False)
    model.weight.requires_grad_(True)
    with watch(model) as seen:
        step(model, torch.randn(3, 4))
    seen.require()
    assert list(seen.gradients) == ["weight"] and not seen.quantizer_calls


def test_the_hooks_are_gone_afterwards() -> None:
    model = Layer()
    with pytest.raises(RuntimeError, match="stop"), watch(model) as seen:
        raise RuntimeError("stop")
    step(model, torch.randn(3, 4))
    assert seen.quantizer_calls == {"input_quantizer": 0} and set(seen.gradients.values()) == {0}


def test_modelopts_quantizers_are_recognised() -> None:
    from modelopt.torch.quantization.nn import TensorQuantizer as Real

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.on: Any = Real()
            self.off: Any = Real()
            self.off.disable()

    with watch(Holder()) as seen:
        pass
    assert seen.quantizer_calls == {"on": 0}
