"""What is exported on a GPU is merged as the forward there merges."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="no Triton, which comes with CUDA builds of torch")

from qat.export.merge import LowRank, Module, effective
from qat.quant.effective import effective_weight
from qat.quant.packed import through_nvfp4

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("packed", [False, True])
def test_a_merged_weight_has_the_forwards_bits(packed: bool, cuda: torch.device) -> None:
    """Two adapters, each rounded once by the kernel; a CPU's sums would differ in some of a million values."""
    w = torch.randn(1856, 2688).bfloat16()
    deltas = [LowRank(torch.randn(16, 2688), torch.randn(1856, 16) * 0.02, scale) for scale in (2.0, 0.7)]
    module = Module("layers.0.mixer.up_proj", ("layers.0.mixer.up_proj.weight",), tuple(w.shape), "BF16")
    found = effective(module, lambda _: w, deltas, packed=packed)
    expected = (through_nvfp4(w) if packed else w).to(cuda)
    for a, b, scale in deltas:
        expected = effective_weight(expected, a.to(cuda), b.to(cuda), scale)
    assert not found.is_cuda and torch.equal(found, expected.cpu())
