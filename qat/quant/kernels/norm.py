"""RMS normalization with a frozen weight, plain and gated, in one pass forward and one backward.

Statistics and products are float32; the result is rounded where Transformers' modules round it. Nothing but the inputs
is kept for the backward pass.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_kernel(x_ptr, w_ptr, g_ptr, out_ptr, width, eps, BACKWARD: tl.constexpr, WIDTH: tl.constexpr):
    """One row: out = w * x / rms(x), or the gradient of x where g is that of the result."""
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, WIDTH)
    inside = column < width
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / width + eps)
    y = x * rstd
    if BACKWARD:
        g = tl.load(g_ptr + row + column, mask=inside, other=0.0).to(tl.float32) * w
        out = rstd * (g - y * (tl.sum(g * y, axis=0) / width))
    else:
        out = w * y
    tl.store(out_ptr + row + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_kernel(
    x_ptr,
    gate_ptr,
    w_ptr,
    g_ptr,
    out_ptr,
    gate_out_ptr,
    gate_stride,
    groups,
    width,
    eps,
    BACKWARD: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: h = x * silu(gate), each group of h divided by its rms, times w; or both gradients."""
    row = tl.program_id(0).to(tl.int64)
    group, column = tl.arange(0, GROUPS), tl.arange(0, WIDTH)
    inside = (group < groups)[:, None] & (column < width)[None, :]
    place = group[:, None] * width + column[None, :]
    base = row * groups * width
    x = tl.load(x_ptr + base + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + place, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    h = x * silu
    rstd = 1.0 / tl.sqrt_rn(tl.sum(h * h, axis=1) / width + eps)
    y = h * rstd[:, None]
    if BACKWARD:
        g = tl.load(g_ptr + base + place, mask=inside, other=0.0).to(tl.float32) * w
        dh = rstd[:, None] * (g - y * (tl.sum(g * y, axis=1) / width)[:, None])
        tl.store(out_ptr + base + place, (dh * silu).to(out_ptr.dtype.element_ty), mask=inside)
        dgate = dh * x * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(gate_out_ptr + base + place, dgate.to(gate_out_ptr.dtype.element_ty), mask=inside)
    else:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        tl.store(out_ptr + base + place, (w * y).to(out_ptr.dtype.element_ty), mask=inside)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _norm(x, weight, None, eps)

    @staticmethod
    def backward(ctx, *gradients):
        x, weight = ctx.saved_tensors
        return _norm(x, weight, gradients[0].contiguous(), ctx.eps), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, group_size, eps):
        x = x.contiguous()
        ctx.save_for_backward(x, gate, weight)
        ctx.group_size, ctx.eps = group_size, eps
        return _gated(x, gate, weight, None, group_size, eps)[0]

    @staticmethod
    def backward(ctx, *gradients):
        x, gate, weight = ctx.saved_tensors
        dx, dgate = _gated(x, gate, weight, gradients[0].contiguous(), ctx.group_size, ctx.eps)
        return dx, dgate, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute weight * x / sqrt(mean(x**2) + eps), rounded once.

    Args:
        x: (…, width).
        weight: (width,), without gradient.
        eps: Added to the mean square.

    Returns:
        Shape and dtype of `x`.
    """
    result: Tensor = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    """Normalize x * silu(gate) group by group, as Zamba2's and Nemotron-H's mixers do.

    Args:
        x: (…, groups * group_size).
        gate: Same shape; rows may lie apart, elements of a row may not.
        weight: (groups * group_size,), without gradient.
        group_size: Width of a group.
        eps: Added to the mean square.

    Returns:
        Shape and dtype of `x`; the normalized value is rounded before it is multiplied with the weight, as in the
        modules.
    """
    result: Tensor = _Gated.apply(x, gate, weight, group_size, eps)  # type: ignore[no-untyped-call]
    return result


def _norm(x: Tensor, weight: Tensor, gradient: Tensor | None, eps: float) -> Tensor:
    width = x.shape[-1]
    out = torch.empty_like(x)
    _norm_kernel[(x.numel() // width,)](
        x,
        weight,
        x if gradient is None else gradient,
        out,
        width,
        eps,
        BACKWARD=gradient is not None,
        WIDTH=triton.next_power_of_2(width),
        num_warps=8,
    )
    return out


def _gated(
    x: Tensor, gate: Tensor, weight: Tensor, gradient: Tensor | None, group_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    rows = x.numel() // width
    gate = gate.reshape(rows, width)  # a view where rows lie apart evenly
    gate = gate if gate.stride(-1) == 1 else gate.contiguous()
    out = torch.empty_like(x)
    gate_out = out if gradient is None else torch.empty_like(x)
    groups = width // group_size
    _gated_kernel[(rows,)](
        x,
        gate,
        weight,
        x if gradient is None else gradient,
        out,
        gate_out,
        gate.stride(0),
        groups,
        group_size,
        eps,
        BACKWARD=gradient is not None,
        GROUPS=triton.next_power_of_2(groups),
        WIDTH=triton.next_power_of_2(group_size),
        num_warps=8,
    )
    return out, gate_out
