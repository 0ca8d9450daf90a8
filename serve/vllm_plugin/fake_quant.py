"""NVFP4 fake quantization of activations, bit for bit vLLM's `ref_nvfp4_quant_dequant`, in fewer and faster steps.

vLLM's reference rounds to E2M1 with eight boolean-mask assignments over the whole tensor. Here the rounding is
arithmetic, which takes half the time at one row and a quarter at 2,048 rows of 192 (two cores); everything before and
after it keeps the reference's order of operations, because another algebraically equal order differs at ties.
"Bit for bit" is meant as numbers: what rounds to zero from below is +0 here and -0 there.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16
"""Elements that share one E4M3 scale."""


def round_to_e2m1(x: Tensor) -> Tensor:
    """Round float32 values to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with their sign, ties to the even code.

    The values are 0.5 apart below 2, 1 apart up to 4, 2 apart up to 6. Adding and taking away 1.5 * 2**23 * step rounds
    a float32 to a multiple of `step`, ties to even, and even multiples of the step are exactly the even E2M1 codes.

    Args:
        x: float32, any shape, already clamped to [-6, 6].

    Returns:
        float32 of the same shape.
    """
    magnitude = x.abs()
    # 0.5, 1 or 2: a half, plus a half from 2 on, plus 1 from 4 on.
    step = (magnitude >= 2).float().add_((magnitude >= 4).float(), alpha=2.0).add_(1.0).mul_(0.5)
    anchor = step.mul_(12582912.0)  # 1.5 * 2**23
    return (x + anchor).sub_(anchor)


def _reciprocal(x: Tensor) -> Tensor:
    """1 / x, and 1e-8 at zero, like the reference's (there x is a block scale: zero means a block of zeros)."""
    return 1.0 / (x + (x == 0) * 1e8)


def fake_quant_activation(x: Tensor, global_scale: Tensor) -> Tensor:
    """Quantize rows to NVFP4 and back.

    Args:
        x: (tokens, features) in bfloat16, float16 or float32; features a multiple of 16.
        global_scale: float32 with one element: 1 / input_scale of the checkpoint.

    Returns:
        The representable values nearest to `x` in the sense of vLLM's reference, same shape and dtype.
    """
    tokens, features = x.shape
    blocks = x.reshape(tokens, features // BLOCK, BLOCK)
    largest = blocks.abs().amax(dim=-1, keepdim=True).to(torch.float32)
    scale = global_scale * (largest * (1 / 6.0))
    scale = scale.clamp_(max=448.0, min=-448.0).to(torch.float8_e4m3fn).to(torch.float32)
    to_e2m1 = _reciprocal(scale * _reciprocal(global_scale))
    scaled = (blocks.to(torch.float32) * to_e2m1).clamp_(-6.0, 6.0)
    return (round_to_e2m1(scaled).mul_(scale / global_scale)).reshape(tokens, features).to(x.dtype)
