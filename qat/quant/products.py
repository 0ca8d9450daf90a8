"""Products with a weight that carries an adapter: which tensors are formed, and where the factors' gradients come from.

Under quantization the effective weight W + s B A is formed, because it is what is quantized. Its gradient is not: with
y = x (W + s B A)^T and g the gradient of y,

    dB = s g^T (x A^T),   dA = s (g B)^T x,

two narrow products on the tokens in place of g^T x, a matrix as large as the weight (the quantizer's gradient is passed
straight through, so these are the same sums). On a CPU the dense way is kept.

Without quantization the product itself can stay low-rank, y = x W^T + s (x A^T) B^T, which rounds y and not W: training
may do that, validation and whatever is compared bit by bit may not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.quant.effective import Adapted, whole
from qat.quant.packed import PackedWeight, dense, packed_product

# grouped_mm on a GPU wants rows of a multiple of 16 bytes.
_RANK_MULTIPLE = 8
_E2M1_BITS = (2, 1)


def multiply(
    x: Tensor,
    weight: Tensor | Adapted,
    quantizer: Any = None,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply with a weight, effective and quantized where it has an adapter and a quantizer.

    Args:
        x: (…, in); for experts (pairs, in), sorted by expert.
        weight: (out, in), or (experts, out, in), with or without an adapter.
        quantizer: ModelOpt's weight quantizer, enabled, calibrating or disabled.
        offsets: int32 (experts,), where each expert's rows end; for experts only.
        bias: (out,); not for experts.

    Returns:
        (…, out).
    """
    if isinstance(weight, Adapted) and weight.w.is_cuda and not weight.w.requires_grad:
        a, b = weight.factors()
        with torch.no_grad():
            formed = _formed(Adapted(weight.w, a, b, weight.scale), quantizer)
        y: Tensor = _GradientOnTokens.apply(x.to(formed.dtype), formed, a, b, weight.scale, offsets)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias
    formed = whole(weight)
    return product(x, formed if quantizer is None else quantizer(formed), offsets, bias)


def multiply_low_rank(x: Tensor, weight: Adapted, offsets: Tensor | None = None) -> Tensor:
    """Multiply with the weight and with the factors apart; rounds otherwise than `multiply`.

    Args:
        x: (…, in); for experts (pairs, in), sorted by expert.
        weight: With its adapter.
        offsets: int32 (experts,); for experts only.

    Returns:
        (…, out).
    """
    a, b = _padded(*weight.factors())
    return product(x, weight.w, offsets) + product(product(x, a, offsets), b * weight.scale, offsets)


def low_rank_pays(rows: int, w: Tensor) -> bool:
    """Whether adding the low-rank product on the tokens moves fewer bytes than forming W + s B A.

    Forming reads and writes the weight, 4 bytes a number in BF16. In forward and backward together the low-rank product
    reads x and the gradient of y once more (2 in + 2 out bytes a row) and writes, reads and adds a second y and a
    second gradient of x (8 out + 8 in). On an H200 at 128 x 1856 x 2688 the two cost the same at about 540 rows an
    expert, and 730 where checkpointing runs the forward twice (docs/benchmarks/train_kernels.md); this says 439.

    Args:
        rows: Tokens, or (token, expert) pairs.
        w: (out, in) or (experts, out, in).
    """
    return rows * 10 * sum(w.shape[-2:]) < 4 * w.numel()


def product(x: Tensor, weight: Tensor, offsets: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """Compute x @ weight^T, for experts each group of rows with its own matrix; a packed one is not kept unpacked."""
    if offsets is not None:
        x = x.to(weight.dtype)  # autocast does so for a linear and does not know the grouped product
    if isinstance(weight, PackedWeight):
        return packed_product(x, weight, offsets, bias)
    return F.linear(x, weight, bias) if offsets is None else F.grouped_mm(x, weight.mT, offs=offsets)


def ready(quantizer: Any) -> bool:
    """Whether calling the quantizer does nothing but quantize to NVFP4 (it is enabled and collects no ranges)."""
    quantizes = quantizer.is_enabled and quantizer._if_quant and not quantizer._if_calib
    return bool(quantizes and quantizer.num_bits == _E2M1_BITS)


@contextmanager
def computing(quantizer: Any, function: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Let a quantizer compute `function(x, amax)`, its own work together with what comes before it, in one kernel.

    The quantizer is still called, so that hooks on it (the guard's) see it run.
    """
    quantizer.__dict__["_qat_fused"] = function
    try:
        yield
    finally:
        del quantizer.__dict__["_qat_fused"]


def _formed(weight: Adapted, quantizer: Any) -> Tensor:
    if quantizer is None or not ready(quantizer):
        merged = weight.merged()
        return merged if quantizer is None else quantizer(merged)
    from qat.quant.kernels import nvfp4

    with computing(quantizer, lambda w, amax: nvfp4.effective_weight(w, weight.a, weight.b, weight.scale, amax)):
        quantized: Tensor = quantizer(dense(weight.w))
    return quantized


class _GradientOnTokens(torch.autograd.Function):
    """x @ formed^T, where `formed` stands for W + scale * b @ a and needs no gradient of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, formed: Tensor, a: Tensor, b: Tensor, scale: float, offsets: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, formed, a, b, offsets)
        ctx.scale = scale
        return product(x, formed, offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None, None]:
        x, formed, a, b, offsets = ctx.saved_tensors
        g = gradients[0].contiguous()
        dx = product(g, formed.mT, offsets) if ctx.needs_input_grad[0] else None
        rank = a.shape[-2]
        a, b = _padded(a, b)
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        da = _outer(product(g, b.mT, offsets), x, offsets)[..., :rank, :]
        db = _outer(g, product(x, a, offsets), offsets)[..., :rank]
        return dx, None, da * ctx.scale, db * ctx.scale, None, None


def _outer(left: Tensor, right: Tensor, offsets: Tensor | None) -> Tensor:
    """left^T @ right over the rows, for experts over each expert's rows: (rows, m), (rows, n) -> (…, m, n)."""
    return left.mT @ right if offsets is None else F.grouped_mm(left.mT, right, offs=offsets)


def _padded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Fill the rank up with zeros to what a grouped product can take."""
    missing = -a.shape[-2] % _RANK_MULTIPLE
    return (F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))) if missing else (a, b)
