"""The kernels against the torch definition on the CPU, bit for bit, and beside ModelOpt's own kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="no Triton, which comes with CUDA builds of torch")

from qat.quant import nvfp4
from qat.quant.effective import effective_weight
from qat.quant.kernels import nvfp4 as kernels

pytestmark = pytest.mark.gpu

SHAPES = [(48, 80), (3, 32, 48), (128, 2688), (2, 1856, 2688)]


def spread(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Numbers over many powers of two, blocks of zeros and of tiny values among them."""
    x = torch.randn(shape) * torch.randn(shape).mul(2).exp() * 0.05
    x.view(-1)[:16] = 0
    x.view(-1)[32:64] *= 1e-6
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_have_the_cpus_bits(shape: tuple[int, ...], dtype: torch.dtype, cuda: torch.device) -> None:
    w = spread(shape, dtype)
    ranges = [w.abs().amax().float() * 1.1]
    if len(shape) == 3:
        ranges.append(w.abs().amax((1, 2)).float() * torch.linspace(0.3, 2, shape[0]))
    for amax in ranges:
        on_gpu = nvfp4.fake_quant_weight(w.to(cuda), amax.to(cuda))
        assert torch.equal(on_gpu.cpu(), nvfp4.fake_quant_weight(w, amax))
        packed = nvfp4.quantize_weight(w.to(cuda), amax.to(cuda))
        for there, here in zip(packed, nvfp4.quantize_weight(w, amax), strict=True):
            assert torch.equal(there.cpu().reshape(-1).view(torch.uint8), here.reshape(-1).view(torch.uint8))
        assert torch.equal(nvfp4.dequantize(packed, dtype), on_gpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activations_have_the_cpus_bits(dtype: torch.dtype, cuda: torch.device) -> None:
    x = spread((3000, 1856), dtype)
    for part in (1.0, 0.3, 1e-3):
        amax = x.abs().amax().float() * part
        assert torch.equal(
            nvfp4.fake_quant_activation(x.to(cuda), amax.to(cuda)).cpu(), nvfp4.fake_quant_activation(x, amax)
        )


def test_ties_go_to_even_and_nan_stays(cuda: torch.device) -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 2)
    ties[8:] *= -1
    amax = torch.tensor(6.0 * 448.0)  # tensor scale 1, block scale 1
    expected = torch.tensor([0, 1, 1, 2, 2, 4, 4, 6.0, 0, -1, -1, -2, -2, -4, -4, -6])
    assert torch.equal(nvfp4.fake_quant_weight(ties.view(1, 16).to(cuda), amax.to(cuda)).cpu().view(-1), expected)
    broken = torch.ones(2, 32)
    broken[1, 3] = float("nan")
    for function in (nvfp4.fake_quant_weight, nvfp4.fake_quant_activation):
        result = function(broken.to(cuda), torch.tensor(3.0, device=cuda)).isnan().cpu()
        assert result[1, :16].all() and not result[0].any() and not result[1, 16:].any()


@pytest.mark.parametrize(("shape", "rank"), [((48, 80), 4), ((3, 32, 48), 32), *((shape, 16) for shape in SHAPES)])
def test_the_fused_kernel_is_effective_weight_then_quantization(
    shape: tuple[int, ...], rank: int, cuda: torch.device
) -> None:
    w = spread(shape, torch.bfloat16).to(cuda)
    a = torch.randn(*shape[:-2], rank, shape[-1], device=cuda).bfloat16()
    b = (torch.randn(*shape[:-1], rank, device=cuda) * 0.01).bfloat16()
    merged = effective_weight(w, a, b, 1.7)
    amax = merged.abs().amax(dim=(-2, -1)).float()
    assert torch.equal(kernels.effective_weight(w, a, b, 1.7, amax), nvfp4.fake_quant_weight(merged, amax))
    exact = w.double() + 1.7 * (b.double() @ a.double())
    # One rounding to BF16: at most half a unit in the last place, and the float32 accumulator's own error.
    assert ((merged.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-5).all()
    assert (merged != exact.bfloat16()).double().mean() < 1e-3


def test_the_effective_weights_gradient(cuda: torch.device) -> None:
    w, a, b = (torch.randn(shape, device=cuda, requires_grad=True) for shape in ((3, 32, 48), (3, 4, 48), (3, 32, 4)))
    g = torch.randn(3, 32, 48, device=cuda)
    effective_weight(w, a, b, 0.5).backward(g)
    ours = [tensor.grad.clone() for tensor in (w, a, b)]
    for tensor in (w, a, b):
        tensor.grad = None
    (w + 0.5 * (b @ a)).backward(g)
    for mine, tensor in zip(ours, (w, a, b), strict=True):
        torch.testing.assert_close(mine, tensor.grad, rtol=1e-2, atol=1e-2)  # TF32 may be on


def test_relu2(cuda: torch.device) -> None:
    x = spread((300, 1856), torch.bfloat16).to(cuda).requires_grad_()
    plain = torch.relu(x).square()
    amax = plain.detach().amax().float()
    g = torch.randn_like(x)
    expected = torch.autograd.grad(plain, x, g)[0]
    for range_ in (None, amax):
        ours = kernels.relu2(x, range_)
        wanted = plain.detach() if range_ is None else nvfp4.fake_quant_activation(plain.detach(), amax)
        assert torch.equal(ours, wanted)
        torch.testing.assert_close(torch.autograd.grad(ours, x, g)[0], expected, rtol=1e-2, atol=1e-6)


def test_modelopts_kernel_agrees_on_weights_up_to_its_own_order(cuda: torch.device) -> None:
    kernel = pytest.importorskip("modelopt.torch.quantization.tensor_quant").triton_kernel
    w = spread((256, 2688), torch.bfloat16).to(cuda)
    amax = w.abs().amax().float()
    theirs = kernel.fp4_fake_quant_block(w, amax)
    ours = nvfp4.fake_quant_weight(w, amax)
    differing = (theirs != ours).float().mean().item()
    print(f"ModelOpt's Triton kernel differs from its own export order in {differing:.2%} of the elements")
    assert differing < 0.03
