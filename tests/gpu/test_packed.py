"""A packed base on a GPU: the kernel's bits are the CPU's, and the network computes with them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="no Triton, which comes with CUDA builds of torch")

from qat.quant.kernels.unpack import unpack
from qat.quant.nvfp4 import dequantize
from qat.quant.packed import PackedWeight, add_low_rank_, pack, packed_parameter
from tests.gpu.test_nvfp4 import SHAPES, spread

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_has_the_cpus_bits(shape: tuple[int, ...], dtype: torch.dtype, cuda: torch.device) -> None:
    packed = pack(spread(shape, torch.bfloat16))
    there = type(packed)(*(part.to(cuda) for part in packed))
    assert torch.equal(unpack(there, dtype).cpu(), dequantize(packed, dtype))


def test_packing_has_the_cpus_bits(cuda: torch.device) -> None:
    w = spread((3, 32, 48), torch.bfloat16)
    for there, here in zip(pack(w.to(cuda)), pack(w), strict=True):
        assert torch.equal(there.cpu().view(torch.uint8), here.view(torch.uint8))


def test_a_linear_and_its_gradient(cuda: torch.device) -> None:
    w = spread((128, 2688), torch.bfloat16)
    linear = torch.nn.Linear(2688, 128, bias=False, device=cuda)
    linear.weight = packed_parameter(w.to(cuda))
    assert isinstance(linear.weight, PackedWeight)
    add_low_rank_(linear.weight, torch.randn(8, 2688, device=cuda), torch.randn(128, 8, device=cuda), 0.1)
    x = torch.randn(5, 2688, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    linear(x).sum().backward()
    found, x.grad = x.grad, None
    torch.nn.functional.linear(x, linear.weight.to_dense()).sum().backward()
    torch.testing.assert_close(found, x.grad)
