"""The NVFP4 arithmetic, once: what training fakes, what export packs and what vLLM unpacks are the same numbers.

A tensor is cut into blocks of 16 along its last dimension. Each element becomes an E2M1 code (0, 0.5, 1, 1.5, 2, 3, 4,
6 with a sign), each block has an E4M3 scale, the tensor has one float32 scale. Rounding is to nearest, ties to even.

Two orders of operations are kept on purpose; algebraically equal ones differ at ties, in about 1 % of the elements:

* weights: ModelOpt's export (`modelopt.torch.quantization.qtensor.NVFP4QTensor.quantize` 0.47);
* activations: vLLM's reference (`nvfp4_emulation_utils.ref_nvfp4_quant_dequant` 0.32) with the reciprocal of the
  checkpoint's `input_scale` as global scale.

"Bit for bit" here means equal as numbers: a value that rounds to zero comes out as +0 (ModelOpt's unpacking does the
same; vLLM's keeps the sign of the zero, which no matrix product can see). On a GPU the fake quantization of every
training step is one Triton kernel (`qat.quant.kernels.nvfp4`); what is written here is what it must equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.quant import BLOCK as BLOCK

E2M1_MAX = 6.0
"""Largest E2M1 magnitude."""
E4M3_MAX = 448.0
"""Largest finite E4M3 magnitude."""
E4M3_TINY = 2.0**-9
"""Smallest positive E4M3 magnitude (subnormal)."""

# dtype -> integer of the same width, and the mask that takes the sign away
_INT_VIEW = {
    torch.float32: (torch.int32, 0x7FFFFFFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float16: (torch.int16, 0x7FFF),
}
# Twice an E2M1 magnitude is one of 0, 1, 2, 3, 4, 6, 8, 12; the table gives its code, other entries are never read.
_CODE_OF_TWICE = (0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7)
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Packed(NamedTuple):
    """A weight as a checkpoint holds it.

    Attributes:
        weight: uint8 (…, in / 2), two codes a byte, the element with the even index in the low nibble; bit 3 of a code
            is the sign.
        weight_scale: float8_e4m3fn (…, in / 16).
        weight_scale_2: float32 () or, for experts, (experts,).
    """

    weight: Tensor
    weight_scale: Tensor
    weight_scale_2: Tensor


def tensor_scale(amax: Tensor) -> Tensor:
    """Compute the float32 tensor scale: `weight_scale_2` of a weight, `input_scale` of an activation.

    Args:
        amax: Largest magnitude, any shape.

    Returns:
        amax / (6 * 448) in float32, same shape.
    """
    # Divided by a tensor: by a number, CUDA multiplies with the rounded reciprocal instead.
    return amax.float() / torch.full((), E2M1_MAX * E4M3_MAX, device=amax.device)


def block_amax(x: Tensor) -> Tensor:
    """Compute the largest magnitude of every block of 16.

    The magnitudes of floats order like their bit patterns, and an integer maximum over 16 neighbours runs three times
    as fast on a CPU as a floating-point one, which has to look after NaN.

    Args:
        x: (…, n) in float32, bfloat16 or float16; n a multiple of 16.

    Returns:
        float32 (…, n / 16).

    Raises:
        ValueError: Another dtype, or n is no multiple of 16.
    """
    if x.dtype not in _INT_VIEW:
        raise ValueError(f"NVFP4 takes float32, bfloat16 or float16, not {x.dtype}")
    if x.shape[-1] % BLOCK:
        raise ValueError(f"NVFP4 needs a last dimension that is a multiple of {BLOCK}, not {x.shape[-1]}")
    integer, mask = _INT_VIEW[x.dtype]
    blocks = x.contiguous().view(integer).view(*x.shape[:-1], -1, BLOCK)
    return (blocks & mask).amax(dim=-1).view(x.dtype).float()


def round_e2m1_(z: Tensor) -> Tensor:
    """Round to the nearest E2M1 value in place, ties to even.

    Below 2 the values are 0.5 apart, up to 4 they are 1 apart, up to 6 they are 2 apart: half of the power of two below
    |z|, where everything below 1 counts as 1. Adding 1.5 * 2**23 steps to a float32 and taking them away again rounds
    it to a multiple of the step, ties to even, because the sum's last bit is worth one step; even multiples are the
    even codes. The power of two comes from the exponent bits.

    Args:
        z: float32, magnitudes at most 6, any shape; overwritten.

    Returns:
        `z`.
    """
    anchor = z.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=0x3F800000).view(torch.float32)
    anchor.mul_(1.5 * 2.0**22)
    return z.add_(anchor).sub_(anchor)


def _weight_scales(w: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E4M3 block scales (…, in/16), float32 tensor scale (shape of amax), their float32 product (…, in/16)."""
    scale_2 = tensor_scale(amax)
    broadcast = _per_matrix(scale_2, w.dim())
    scale = block_amax(w) / (E2M1_MAX * broadcast)
    scale = torch.where(scale == 0, 1.0, scale).clamp_(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
    return scale, scale_2, scale.float() * broadcast


def _rounded_weight(w: Tensor, step: Tensor) -> Tensor:
    """E2M1 values as float32 blocks (…, in/16, 16)."""
    z = w.contiguous().view(*w.shape[:-1], -1, BLOCK) / step.unsqueeze(-1)
    return round_e2m1_(z.clamp_(-E2M1_MAX, E2M1_MAX))


def quantize_weight(w: Tensor, amax: Tensor) -> Packed:
    """Pack a weight with ModelOpt's export order of operations.

    Args:
        w: (out, in) or (experts, out, in), float32, bfloat16 or float16.
        amax: Largest magnitude, (); for experts also (experts,). Positive.

    Returns:
        Codes and scales.

    Raises:
        ValueError: `amax` is not positive and finite or does not fit, or the shape or dtype of `w` does not.
    """
    _require_amax(w, amax)
    scale, scale_2, step = _weight_scales(w, amax)
    values = _rounded_weight(w, step)
    twice = (values.abs() * 2).to(torch.int64)
    codes = torch.tensor(_CODE_OF_TWICE, dtype=torch.uint8, device=w.device)[twice]
    # ModelOpt takes the sign of the scaled weight, so a negative one that rounds to zero keeps its sign bit.
    negative = (w.contiguous().view_as(values) / step.unsqueeze(-1)) < 0
    codes = (codes | negative.to(torch.uint8) << 3).view(w.shape)
    return Packed((codes[..., 1::2] << 4) | codes[..., 0::2], scale, scale_2)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Unpack a weight.

    Args:
        packed: Codes and scales.
        dtype: Of the result.

    Returns:
        (…, in): code value times (block scale times tensor scale), computed in float32 and rounded once.
    """
    if packed.weight.is_cuda:
        from qat.quant.kernels.unpack import unpack

        return unpack(packed, dtype)
    magnitudes = torch.tensor(_MAGNITUDES, device=packed.weight.device)
    table = torch.cat([magnitudes, torch.where(magnitudes == 0, magnitudes, -magnitudes)])
    codes = torch.stack((packed.weight & 0xF, packed.weight >> 4), dim=-1)
    step = packed.weight_scale.float() * _per_matrix(packed.weight_scale_2, packed.weight_scale.dim())
    values = table[codes.int()].view(*step.shape, BLOCK) * step.unsqueeze(-1)
    return values.view(*packed.weight.shape[:-1], -1).to(dtype)


def fake_quant_weight(w: Tensor, amax: Tensor) -> Tensor:
    """Quantize and unpack a weight: `dequantize(quantize_weight(w, amax), w.dtype)` bit for bit, without packing.

    Args:
        w: (out, in) or (experts, out, in), float32, bfloat16 or float16.
        amax: Largest magnitude, (); for experts also (experts,). Not checked here: this runs in every training step.

    Returns:
        Same shape and dtype as `w`.
    """
    w = w.to_dense()  # of a packed base (`qat.quant.packed`); others are given back as they are
    if w.is_cuda:
        from qat.quant.kernels import nvfp4

        return nvfp4.fake_quant_weight(w, amax)
    _, _, step = _weight_scales(w, amax)
    return _rounded_weight(w, step).mul_(step.unsqueeze(-1)).view(w.shape).to(w.dtype)


def fake_quant_activation(x: Tensor, amax: Tensor) -> Tensor:
    """Quantize and unpack an activation as vLLM's reference does with this calibrated range.

    Args:
        x: (…, features), float32, bfloat16 or float16; features a multiple of 16.
        amax: Calibrated largest magnitude, (). Blocks beyond it saturate.

    Returns:
        Same shape and dtype as `x`.
    """
    if x.is_cuda:
        from qat.quant.kernels import nvfp4

        return nvfp4.fake_quant_activation(x, amax)
    # The checkpoint holds input_scale = amax / 2688 in float32, and vLLM takes its reciprocal when it loads the
    # weights.
    global_scale = 1.0 / tensor_scale(amax)
    scale = global_scale * (block_amax(x) * (1 / E2M1_MAX))
    scale = scale.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    to_e2m1 = _reciprocal(scale * _reciprocal(global_scale))
    z = x.contiguous().view(*x.shape[:-1], -1, BLOCK) * to_e2m1.unsqueeze(-1)
    values = round_e2m1_(z.clamp_(-E2M1_MAX, E2M1_MAX))
    return values.mul_((scale / global_scale).unsqueeze(-1)).view(x.shape).to(x.dtype)


def _reciprocal(x: Tensor) -> Tensor:
    """1 / x, and 1e-8 at zero, as vLLM writes it: a block whose scale rounds to zero stays zero."""
    return 1.0 / (x + (x == 0) * 1e8)


def _per_matrix(scale_2: Tensor, dims: int) -> Tensor:
    """Shape a tensor scale, () or (experts,), so that it multiplies block scales with `dims` dimensions."""
    return scale_2.reshape(scale_2.shape + (1,) * (dims - scale_2.dim()))


def _require_amax(w: Tensor, amax: Tensor) -> None:
    if amax.shape not in ((), w.shape[:-2]):
        raise ValueError(f"amax has shape {tuple(amax.shape)}, which does not fit a weight of shape {tuple(w.shape)}")
    if not bool((torch.isfinite(amax) & (amax > 0)).all()):
        raise ValueError("amax must be positive and finite; a weight of zeros has no NVFP4 scale")
