"""Rows between tokens and experts: weighted sums of a token's rows, and their gradient, in one pass each."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_kernel(
    rows_ptr,
    place_ptr,
    weight_ptr,
    out_ptr,
    width,
    SLOTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One token: out = sum over its slots of weight * rows[place]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    total = tl.zeros([WIDTH], tl.float32)
    for slot in tl.static_range(SLOTS):
        place = tl.load(place_ptr + token * SLOTS + slot).to(tl.int64)
        row = tl.load(rows_ptr + place * width + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            row = row * tl.load(weight_ptr + token * SLOTS + slot).to(tl.float32)
        total += row
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _spread_kernel(
    gradient_ptr,
    rows_ptr,
    place_ptr,
    weight_ptr,
    row_gradient_ptr,
    weight_gradient_ptr,
    width,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One token: the gradient of each of its rows and of each of its weights."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    gradient = tl.load(gradient_ptr + token * width + column, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(SLOTS):
        place = tl.load(place_ptr + token * SLOTS + slot).to(tl.int64)
        weight = tl.load(weight_ptr + token * SLOTS + slot).to(tl.float32)
        row = tl.load(rows_ptr + place * width + column, mask=inside, other=0.0).to(tl.float32)
        spread = (gradient * weight).to(row_gradient_ptr.dtype.element_ty)
        tl.store(row_gradient_ptr + place * width + column, spread, mask=inside)
        tl.store(weight_gradient_ptr + token * SLOTS + slot, tl.sum(row * gradient, axis=0))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, token, place):
        ctx.save_for_backward(place)
        return hidden.index_select(0, token)

    @staticmethod
    def backward(ctx, *gradients):
        (place,) = ctx.saved_tensors
        return _sum(gradients[0].contiguous(), place, None), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, place, weights):
        rows, weights = rows.contiguous(), weights.contiguous()
        ctx.save_for_backward(rows, place, weights)
        return _sum(rows, place, weights)

    @staticmethod
    def backward(ctx, *gradients):
        rows, place, weights = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        row_gradient = torch.empty_like(rows)
        weight_gradient = torch.empty(place.shape, dtype=torch.float32, device=rows.device)
        tokens, slots = place.shape
        if tokens:
            _spread_kernel[(tokens,)](
                gradient,
                rows,
                place,
                weights,
                row_gradient,
                weight_gradient,
                rows.shape[-1],
                SLOTS=slots,
                WIDTH=triton.next_power_of_2(rows.shape[-1]),
                num_warps=8,
            )
        return row_gradient, None, weight_gradient.to(weights.dtype)


def gather(hidden: Tensor, token: Tensor, place: Tensor) -> Tensor:
    """Copy each token's row to the experts that it goes to.

    Args:
        hidden: (tokens, width).
        token: int64 (pairs,), the token of each row of the result.
        place: int64 (tokens, slots), where in the result each token's copies stand; the inverse of `token`.

    Returns:
        (pairs, width); its gradient is summed in float32, slot by slot, without atomic additions.
    """
    result: Tensor = _Gather.apply(hidden, token, place)  # type: ignore[no-untyped-call]
    return result


def combine(rows: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """Sum the experts' answers to each token with the router's weights.

    Args:
        rows: (pairs, width).
        place: int64 (tokens, slots), each row named exactly once.
        weights: (tokens, slots).

    Returns:
        (tokens, width) in the dtype of `rows`; products and sum in float32, rounded once.
    """
    result: Tensor = _Combine.apply(rows, place, weights)  # type: ignore[no-untyped-call]
    return result


def _sum(rows: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    tokens, slots = place.shape
    width = rows.shape[-1]
    out = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    if tokens:
        _sum_kernel[(tokens,)](
            rows,
            place,
            rows if weights is None else weights,
            out,
            width,
            SLOTS=slots,
            WEIGHTED=weights is not None,
            WIDTH=triton.next_power_of_2(width),
            num_warps=8,
        )
    return out
