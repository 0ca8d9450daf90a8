"""One effective weight: one rounding, the same for every layout, and the gradients of its definition."""

from __future__ import annotations

import pytest
import torch

from qat.quant.effective import effective_weight, expert_factors

SHAPES = [((24, 48), (4, 48), (24, 4)), ((3, 24, 48), (3, 4, 48), (3, 24, 4))]


def integers(shape: tuple[int, ...], high: int, seed: int) -> torch.Tensor:
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize(("w_shape", "a_shape", "b_shape"), SHAPES)
def test_one_rounding_to_bfloat16(w_shape: tuple[int, ...], a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> None:
    # Small integers: every product and sum is exact in float32, so that the only rounding is the last one.
    w, a, b = integers(w_shape, 300, 1).bfloat16(), integers(a_shape, 15, 2), integers(b_shape, 15, 3)
    scale = 0.25
    exact = w.double() + scale * (b.double() @ a.double())
    ours = effective_weight(w, a, b, scale)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, exact.bfloat16())
    twice = w + (scale * (b @ a)).bfloat16()
    assert not torch.equal(ours, twice), "the case cannot tell one rounding from two"


@pytest.mark.parametrize(("w_shape", "a_shape", "b_shape"), SHAPES)
def test_layout_of_the_factors_does_not_matter(
    w_shape: tuple[int, ...], a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(4)
    w, a, b = (torch.randn(shape, generator=generator) for shape in (w_shape, a_shape, b_shape))
    expected = effective_weight(w.bfloat16(), a, b, 2.0)
    strided = effective_weight(w.bfloat16(), a.mT.contiguous().mT, b.mT.contiguous().mT, 2.0)
    assert torch.equal(strided, expected)
    assert torch.equal(effective_weight(w.bfloat16(), a.bfloat16(), b.bfloat16(), 2.0), expected)


def test_an_expert_alone_has_the_same_weight() -> None:
    generator = torch.Generator().manual_seed(5)
    w, a, b = (torch.randn(shape, generator=generator) for shape in ((8, 48, 64), (8, 16, 64), (8, 48, 16)))
    fused = effective_weight(w.bfloat16(), a, b, 2.0)
    for expert in range(8):
        assert torch.equal(effective_weight(w[expert].bfloat16(), a[expert], b[expert], 2.0), fused[expert])


@pytest.mark.parametrize(("w_shape", "a_shape", "b_shape"), SHAPES)
def test_gradients(w_shape: tuple[int, ...], a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(6)
    w, a, b, g = (torch.randn(shape, generator=generator) for shape in (w_shape, a_shape, b_shape, w_shape))
    a, b = a.requires_grad_(), b.requires_grad_()
    effective_weight(w, a, b, 0.5).backward(g)
    assert a.grad is not None and b.grad is not None
    # d/dA of <G, W + s B A> is s B^T G, d/dB is s G A^T
    torch.testing.assert_close(a.grad, 0.5 * (b.detach().mT @ g))
    torch.testing.assert_close(b.grad, 0.5 * (g @ a.detach().mT))


def test_master_factors_keep_float32_gradients() -> None:
    a, b = torch.ones(2, 16, requires_grad=True), torch.ones(8, 2, requires_grad=True)
    effective_weight(torch.zeros(8, 16, dtype=torch.bfloat16), a, b, 1.0).sum().backward()
    assert a.grad is not None and a.grad.dtype == torch.float32


def test_autocast_does_not_change_the_dtype() -> None:
    w, a, b = torch.randn(8, 16), torch.randn(2, 16), torch.randn(8, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert effective_weight(w, a, b, 1.0).dtype == torch.float32


def test_expert_factors_are_pefts() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import ParamWrapper
    from torch import nn

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(3, 10, 6))

    torch.manual_seed(7)
    model = nn.ModuleDict({"experts": Experts()})
    config = LoraConfig(r=2, lora_alpha=8, target_modules=[], target_parameters=["experts.up_proj"])
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    layer = next(module for module in wrapped.modules() if isinstance(module, ParamWrapper))
    layer.lora_B["default"].weight.data.normal_()
    a, b = expert_factors(layer.lora_A["default"].weight, layer.lora_B["default"].weight, 3)
    assert a.shape == (3, 2, 6) and b.shape == (3, 10, 2)
    torch.testing.assert_close(4.0 * (b @ a), layer.get_delta_weight("default"))


def test_a_vector_is_no_weight() -> None:
    with pytest.raises(ValueError, match="two or three"):
        effective_weight(torch.ones(4), torch.ones(1, 4), torch.ones(1, 1), 1.0)
