"""One effective weight: what the forward quantizes, what export packs and what merging writes is this product.

The call shapes are fixed (`addmm` for a linear, `baddbmm` for all experts of a layer at once): the low-rank product
stays in the accumulator and the sum is rounded once to the weight's dtype. PEFT's own merge rounds the delta first and
then the sum, which changes 12-22 % of the merged BF16 values. On a GPU, where cuBLAS rounds twice as well (21 % of the
values on an H200), one kernel does both shapes, the same that quantizes on the fly (`qat.quant.kernels.nvfp4`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The low-rank factors of one weight in the shapes that `effective_weight` takes.

    Attributes:
        a: (rank, in) or (experts, rank, in).
        b: (out, rank) or (experts, out, rank).
    """

    a: Tensor
    b: Tensor


class Adapted(NamedTuple):
    """A weight and an adapter that is not added to it yet.

    Attributes:
        w: (out, in), or (experts, out, in).
        a: (rank, in), or (experts, rank, in).
        b: (out, rank), or (experts, out, rank).
        scale: alpha / rank.
    """

    w: Tensor
    a: Tensor
    b: Tensor
    scale: float

    def factors(self) -> Factors:
        """The factors in the dtype of the weight, on storage of their own."""
        # Contiguous operands, so that a transposed view can never pick another kernel with another order of summation.
        return Factors(self.a.to(self.w.dtype).contiguous(), self.b.to(self.w.dtype).contiguous())

    def merged(self) -> Tensor:
        """The effective weight."""
        return effective_weight(*self)


def whole(weight: Tensor | Adapted) -> Tensor:
    """The effective weight of one that has an adapter, any other as it is."""
    return weight.merged() if isinstance(weight, Adapted) else weight


class _EffectiveOnGpu(torch.autograd.Function):
    """The kernel's effective weight, with the gradients of `addmm` and `baddbmm`."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        from qat.quant.kernels import nvfp4

        ctx.save_for_backward(a, b)
        ctx.scale = scale
        return nvfp4.effective_weight(w, a, b, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        (g,) = gradients
        return g, (b.mT @ g).mul_(ctx.scale), (g @ a.mT).mul_(ctx.scale), None


def effective_weight(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute w + scale * b @ a with one rounding.

    Factors may be kept in another dtype (float32 master parameters); they are cast to the weight's dtype here, and
    gradients flow back through the cast.

    Args:
        w: (out, in), or (experts, out, in).
        a: (rank, in), or (experts, rank, in).
        b: (out, rank), or (experts, out, rank).
        scale: alpha / rank.

    Returns:
        The sum in the shape and dtype of `w`.

    Raises:
        ValueError: `w` has neither two nor three dimensions.
    """
    if w.dim() not in (2, 3):
        raise ValueError(f"a weight has two or three dimensions, not {w.dim()}")
    a, b = Adapted(w, a, b, scale).factors()
    if w.is_cuda:
        from qat.quant.packed import dense

        merged: Tensor = _EffectiveOnGpu.apply(dense(w), a, b, scale)  # type: ignore[no-untyped-call]
        return merged
    with torch.autocast(device_type=w.device.type, enabled=False):
        return torch.addmm(w, b, a, alpha=scale) if w.dim() == 2 else torch.baddbmm(w, b, a, alpha=scale)


def expert_factors(lora_a: Tensor, lora_b: Tensor, experts: int) -> Factors:
    """Cut PEFT's flat factors of a fused expert parameter into one pair per expert.

    PEFT 0.21 (`ParamWrapper.get_delta_factors`) keeps them as two linears' weights, with the expert as the slow index
    of A's rows and as the fast index of B's columns.

    Args:
        lora_a: (experts * rank, in).
        lora_b: (out, rank * experts).
        experts: Number of experts.

    Returns:
        a (experts, rank, in) and b (experts, out, rank), views of the arguments.
    """
    a = lora_a.reshape(experts, -1, lora_a.shape[-1])
    b = lora_b.reshape(lora_b.shape[0], -1, experts).permute(2, 0, 1)
    return Factors(a, b)
