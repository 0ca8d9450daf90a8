"""The short causal convolution of a Mamba mixer with SiLU, on (batch, length, channels) without a transposition."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_STEPS, _CHANNELS = 16, 128


@triton.jit
def _before_silu(x_ptr, w_ptr, bias, step, channel, inside, length, stride, TAPS: tl.constexpr):
    """Sum over the taps of w[tap] * x[step - TAPS + 1 + tap], float32 (steps, channels)."""
    total = tl.zeros([step.shape[0], channel.shape[0]], tl.float32) + bias[None, :]
    for tap in tl.static_range(TAPS):
        source = step - (TAPS - 1) + tap
        mask = ((source >= 0) & (source < length))[:, None] & inside[None, :]
        w = tl.load(w_ptr + channel * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + source[:, None].to(tl.int64) * stride + channel[None, :], mask=mask, other=0.0)
        total += w[None, :] * x.to(tl.float32)
    return total


@triton.jit
def _convolution_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    g_ptr,
    out_ptr,
    length,
    channels,
    batch_stride,
    stride,
    BACKWARD: tl.constexpr,
    BIAS: tl.constexpr,
    TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A tile of one sequence: silu(convolution), or the gradient of x where g is that of the result."""
    step = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    batch = tl.program_id(2).to(tl.int64)
    x_ptr += batch * batch_stride
    base = batch * length * channels
    if BIAS:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros([CHANNELS], tl.float32)
    if BACKWARD:
        out = tl.zeros([STEPS, CHANNELS], tl.float32)
        for ahead in tl.static_range(TAPS):  # x[step] reached results up to TAPS - 1 steps later
            later = step + ahead
            before = _before_silu(x_ptr, w_ptr, bias, later, channel, inside, length, stride, TAPS)
            mask = (later < length)[:, None] & inside[None, :]
            g = tl.load(g_ptr + base + later[:, None].to(tl.int64) * channels + channel[None, :], mask=mask, other=0.0)
            sigmoid = tl.sigmoid(before)
            w = tl.load(w_ptr + channel * TAPS + (TAPS - 1 - ahead), mask=inside, other=0.0).to(tl.float32)
            out += w[None, :] * g.to(tl.float32) * sigmoid * (1.0 + before * (1.0 - sigmoid))
    else:
        before = _before_silu(x_ptr, w_ptr, bias, step, channel, inside, length, stride, TAPS)
        out = before * tl.sigmoid(before)
    mask = (step < length)[:, None] & inside[None, :]
    place = base + step[:, None].to(tl.int64) * channels + channel[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return _convolution(x, weight, bias, None)

    @staticmethod
    def backward(ctx, *gradients):
        x, weight, bias = ctx.saved_tensors
        return _convolution(x, weight, bias, gradients[0].contiguous()), None, None


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(depthwise causal convolution), computed in float32 and rounded once.

    Args:
        x: (batch, length, channels); steps may lie apart, channels may not.
        weight: (channels, taps), contiguous, without gradient; the last tap sees the present step.
        bias: (channels,), without gradient.

    Returns:
        (batch, length, channels) in the dtype of `x`.
    """
    result: Tensor = _Convolution.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor | None) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, length, channels = x.shape
    out = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(length, _STEPS), triton.cdiv(channels, _CHANNELS), batch)
    _convolution_kernel[grid](
        x,
        weight,
        x if bias is None else bias,
        x if gradient is None else gradient,
        out,
        length,
        channels,
        x.stride(0),
        x.stride(1),
        BACKWARD=gradient is not None,
        BIAS=bias is not None,
        TAPS=weight.shape[-1],
        STEPS=_STEPS,
        CHANNELS=_CHANNELS,
        num_warps=4,
    )
    return out
