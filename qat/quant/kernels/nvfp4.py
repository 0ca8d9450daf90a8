"""NVFP4 fake quantization in one pass over memory, and the effective weight with it.

The arithmetic is that of `qat.quant.nvfp4`, operation by operation, so the bits do not depend on the device: divisions
round to nearest, E4M3 and E2M1 are rounded by adding and subtracting a power of two that leaves exactly their digits,
and no product is contracted with a later sum.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.quant import BLOCK

_BLOCKS_PER_PROGRAM = 256
_ROWS, _COLUMNS, _WARPS = 64, 64, 4
_MIN_RANK = 16


@triton.jit
def _largest(x):
    """(blocks, 16) float32 -> largest magnitude of each block; a NaN is larger than all numbers."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _round_e2m1(z):
    """Clamp to +-6 and round to a multiple of half the power of two below |z|, at least 0.5."""
    z = tl.minimum(tl.maximum(z, -6.0, propagate_nan=tl.PropagateNan.ALL), 6.0, propagate_nan=tl.PropagateNan.ALL)
    power = tl.maximum(z.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000).to(tl.float32, bitcast=True)
    anchor = power * 6291456.0  # 1.5 * 2**22
    return (z + anchor) - anchor


@triton.jit
def _round_e4m3(scale):
    """Round 0 <= scale <= 448 to E4M3: multiples of an eighth of the power of two below, at least of 2**-9."""
    power = tl.maximum(scale.to(tl.int32, bitcast=True) & 0x7F800000, 0x3C800000).to(tl.float32, bitcast=True)
    anchor = power * 1572864.0  # 1.5 * 2**20
    return (scale + anchor) - anchor


@triton.jit
def _weight_blocks(x, amax):
    """Fake-quantize float32 (blocks, 16); amax is float32, () or (blocks,)."""
    tensor_scale = tl.div_rn(amax, 2688.0)
    scale = tl.div_rn(_largest(x), tensor_scale * 6.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    scale = tl.maximum(scale, 0.001953125, propagate_nan=tl.PropagateNan.ALL)
    scale = _round_e4m3(tl.minimum(scale, 448.0, propagate_nan=tl.PropagateNan.ALL))
    step = (scale * tensor_scale)[:, None]
    return _round_e2m1(tl.div_rn(x, step)) * step


@triton.jit
def _reciprocal(x):
    return tl.div_rn(1.0, tl.where(x == 0.0, 1.0e8, x))


@triton.jit
def _activation_blocks(x, amax):
    """Fake-quantize float32 (blocks, 16) in the order of vLLM's reference; amax is a float32 scalar."""
    global_scale = tl.div_rn(1.0, tl.div_rn(amax, 2688.0))
    scale = global_scale * (_largest(x) * 0.16666666666666666)
    scale = _round_e4m3(tl.minimum(scale, 448.0, propagate_nan=tl.PropagateNan.ALL))
    to_e2m1 = _reciprocal(scale * _reciprocal(global_scale))
    values = _round_e2m1(x * to_e2m1[:, None])
    return values * tl.div_rn(scale, global_scale)[:, None]


@triton.jit
def _weight_kernel(x_ptr, y_ptr, amax_ptr, blocks, blocks_per_amax, TILE: tl.constexpr):
    start = tl.program_id(0) * TILE
    block = start + tl.arange(0, TILE)
    inside = block < blocks
    element = tl.arange(0, TILE)[:, None] * 16 + tl.arange(0, 16)[None, :]
    base = start.to(tl.int64) * 16
    x = tl.load(x_ptr + base + element, mask=inside[:, None], other=0.0).to(tl.float32)
    amax = tl.load(amax_ptr + block // blocks_per_amax, mask=inside, other=1.0)
    tl.store(y_ptr + base + element, _weight_blocks(x, amax).to(y_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _activation_kernel(x_ptr, y_ptr, amax_ptr, blocks, RELU2: tl.constexpr, QUANTIZE: tl.constexpr, TILE: tl.constexpr):
    start = tl.program_id(0) * TILE
    inside = (start + tl.arange(0, TILE) < blocks)[:, None]
    element = tl.arange(0, TILE)[:, None] * 16 + tl.arange(0, 16)[None, :]
    base = start.to(tl.int64) * 16
    x = tl.load(x_ptr + base + element, mask=inside, other=0.0).to(tl.float32)
    if RELU2:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = (x * x).to(y_ptr.dtype.element_ty).to(tl.float32)
    if QUANTIZE:
        x = _activation_blocks(x, tl.load(amax_ptr))
    tl.store(y_ptr + base + element, x.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _relu2_backward_kernel(x_ptr, g_ptr, d_ptr, count, TILE: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = element < count
    x = tl.load(x_ptr + element, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + element, mask=inside, other=0.0).to(tl.float32)
    d = 2.0 * tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) * g
    tl.store(d_ptr + element, d.to(d_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _effective_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    y_ptr,
    amax_ptr,
    scale_ptr,
    amax_stride,
    rows,
    columns,
    rank,
    QUANTIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of one matrix: y = w + scale * b @ a, rounded once, then fake-quantized."""
    tiles = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    matrix = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, RANK)
    b = tl.load(
        b_ptr + matrix * rows * rank + row[:, None] * rank + k[None, :],
        mask=(row < rows)[:, None] & (k < rank)[None, :],
        other=0.0,
    )
    a = tl.load(
        a_ptr + matrix * rank * columns + k[:, None] * columns + column[None, :],
        mask=(k < rank)[:, None] & (column < columns)[None, :],
        other=0.0,
    )
    delta = tl.dot(b, a, input_precision="ieee")
    place = matrix * rows * columns + row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    w = tl.load(w_ptr + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr)
    y = tl.fma(delta, scale, w).to(y_ptr.dtype.element_ty)
    if QUANTIZE:
        blocks = tl.reshape(y.to(tl.float32), [ROWS * COLUMNS // 16, 16])
        amax = tl.load(amax_ptr + matrix * amax_stride)
        y = tl.reshape(_weight_blocks(blocks, amax), [ROWS, COLUMNS]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + place, y, mask=inside)


def fake_quant_weight(w: Tensor, amax: Tensor) -> Tensor:
    """`qat.quant.nvfp4.fake_quant_weight` on a GPU, bit for bit.

    Args:
        w: (out, in) or (experts, out, in).
        amax: float32, () or (experts,).

    Returns:
        Shape and dtype of `w`.
    """
    w = w.contiguous()
    y = torch.empty_like(w)
    blocks = w.numel() // BLOCK
    _weight_kernel[(triton.cdiv(blocks, _BLOCKS_PER_PROGRAM),)](
        w, y, amax.float().contiguous(), blocks, max(1, blocks // amax.numel()), TILE=_BLOCKS_PER_PROGRAM
    )
    return y


def fake_quant_activation(x: Tensor, amax: Tensor) -> Tensor:
    """`qat.quant.nvfp4.fake_quant_activation` on a GPU, bit for bit.

    Args:
        x: (…, features).
        amax: float32 ().

    Returns:
        Shape and dtype of `x`.
    """
    return _activation(x, amax, relu2=False)


def relu2(x: Tensor, amax: Tensor | None = None) -> Tensor:
    """relu(x)**2, rounded to the dtype of x, and where `amax` is given fake-quantized; one pass.

    Args:
        x: (…, features), features a multiple of 16.
        amax: float32 (), the calibrated range of the result.

    Returns:
        Shape and dtype of `x`, with the gradient of relu(x)**2 (straight through the quantization).
    """
    result: Tensor = _Relu2.apply(x, amax)  # type: ignore[no-untyped-call]
    return result


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, amax):
        ctx.save_for_backward(x)
        return _activation(x, amax, relu2=True)

    @staticmethod
    def backward(ctx, *gradients):
        (x,) = ctx.saved_tensors
        x, g = x.contiguous(), gradients[0].contiguous()
        d = torch.empty_like(x)
        tile = _BLOCKS_PER_PROGRAM * BLOCK
        _relu2_backward_kernel[(triton.cdiv(x.numel(), tile),)](x, g, d, x.numel(), TILE=tile)
        return d, None


def _activation(x: Tensor, amax: Tensor | None, *, relu2: bool) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    blocks = x.numel() // BLOCK
    if blocks == 0:
        return y
    _activation_kernel[(triton.cdiv(blocks, _BLOCKS_PER_PROGRAM),)](
        x,
        y,
        x if amax is None else amax.float(),
        blocks,
        RELU2=relu2,
        QUANTIZE=amax is not None,
        TILE=_BLOCKS_PER_PROGRAM,
    )
    return y


def effective_weight(w: Tensor, a: Tensor, b: Tensor, scale: float, amax: Tensor | None = None) -> Tensor:
    """Compute w + scale * b @ a, rounded once, and where `amax` is given fake-quantized; no gradient.

    The low-rank product stays in the accumulator of one matrix instruction per 16 ranks; the result with `amax` is
    `fake_quant_weight(effective_weight(w, a, b, scale), amax)` bit for bit, in one pass over `w`.

    Args:
        w: (out, in) or (experts, out, in).
        a: (rank, in) or (experts, rank, in), in the dtype of `w`.
        b: (out, rank) or (experts, out, rank), in the dtype of `w`.
        scale: alpha / rank.
        amax: float32, () or (experts,).

    Returns:
        Shape and dtype of `w`.
    """
    w, a, b = w.contiguous(), a.contiguous(), b.contiguous()
    y = torch.empty_like(w)
    rows, columns = w.shape[-2:]
    factor = torch.full((), scale, dtype=torch.float32, device=w.device)
    grid = (triton.cdiv(rows, _ROWS) * triton.cdiv(columns, _COLUMNS), w.numel() // (rows * columns))
    _effective_kernel[grid](
        w,
        a,
        b,
        y,
        factor if amax is None else amax.float().contiguous(),
        factor,
        0 if amax is None or amax.dim() == 0 else 1,
        rows,
        columns,
        a.shape[-2],
        QUANTIZE=amax is not None,
        RANK=max(_MIN_RANK, triton.next_power_of_2(a.shape[-2])),
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=_WARPS,
    )
    return y
