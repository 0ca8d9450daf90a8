"""Unpacking NVFP4 in one pass over memory: codes and scales in, weights out, nothing of the size of float32 between.

Number for number `qat.quant.nvfp4.dequantize`: code value times (block scale times tensor scale), both products in
float32, rounded once. Codes and E4M3 scales are decoded from their bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.quant.nvfp4 import BLOCK, Packed

_BLOCKS_PER_PROGRAM = 256


@triton.jit
def _e2m1(code):
    """int32 codes 0 … 15 -> float32; both zeros come out as +0."""
    exponent, mantissa = (code >> 1) & 3, code & 1
    normal = (((exponent + 126) << 23) | (mantissa << 22)).to(tl.float32, bitcast=True)
    magnitude = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.5, normal)
    return tl.where((code >= 8) & (magnitude > 0.0), -magnitude, magnitude)


@triton.jit
def _e4m3(bits):
    """int32 bits of a positive E4M3 number -> float32."""
    exponent, mantissa = bits >> 3, bits & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    return tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)


@triton.jit
def _unpack_kernel(codes_ptr, scale_ptr, tensor_scale_ptr, y_ptr, blocks, blocks_per_matrix, TILE: tl.constexpr):
    start = tl.program_id(0) * TILE
    block = start + tl.arange(0, TILE)
    inside = block < blocks
    tensor_scale = tl.load(tensor_scale_ptr + block // blocks_per_matrix, mask=inside, other=0.0)
    step = _e4m3(tl.load(scale_ptr + block, mask=inside, other=0).to(tl.int32)) * tensor_scale
    place = tl.arange(0, TILE)[:, None] * 8 + tl.arange(0, 8)[None, :]
    byte = tl.load(codes_ptr + start.to(tl.int64) * 8 + place, mask=inside[:, None], other=0).to(tl.int32)
    codes = tl.join(byte & 15, byte >> 4).reshape([TILE, 16])  # joined, so that neighbours are stored together
    element = tl.arange(0, TILE)[:, None] * 16 + tl.arange(0, 16)[None, :]
    values = (_e2m1(codes) * step[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + start.to(tl.int64) * 16 + element, values, mask=inside[:, None])


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Unpack on a GPU.

    Args:
        packed: Codes uint8 (…, in / 2), block scales E4M3 (…, in / 16), tensor scale float32 () or (experts,).
        dtype: Of the result.

    Returns:
        (…, in).
    """
    codes, scale, tensor_scale = (part.contiguous() for part in packed)
    y = torch.empty((*codes.shape[:-1], codes.shape[-1] * 2), dtype=dtype, device=codes.device)
    blocks = y.numel() // BLOCK
    _unpack_kernel[(triton.cdiv(blocks, _BLOCKS_PER_PROGRAM),)](
        codes,
        scale.view(torch.uint8),
        tensor_scale.float(),
        y,
        blocks,
        max(1, blocks // tensor_scale.numel()),
        TILE=_BLOCKS_PER_PROGRAM,
    )
    return y
