"""The FP8 arithmetic: E4M3 values under one float32 scale for each tensor, amax / 448.

Two orders of operations, as for NVFP4: weights follow ModelOpt's export (`to_quantized_weight` 0.47: the division runs
in the weight's own dtype), activations vLLM's static quantization (`QuantFP8`: float32, times the reciprocal).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

E4M3_MAX = 448.0
"""Largest finite E4M3 magnitude."""


class PackedFp8(NamedTuple):
    """A weight as a checkpoint holds it.

    Attributes:
        weight: float8_e4m3fn (out, in).
        weight_scale: float32 ().
    """

    weight: Tensor
    weight_scale: Tensor


def tensor_scale(amax: Tensor) -> Tensor:
    """Compute `weight_scale` or `input_scale`: amax / 448 in float32, same shape."""
    # Divided by a tensor: by a number, CUDA multiplies with the rounded reciprocal instead.
    return amax.float() / torch.full((), E4M3_MAX, device=amax.device)


def quantize_weight(w: Tensor, amax: Tensor) -> PackedFp8:
    """Round a weight to E4M3.

    Args:
        w: (out, in), float32, bfloat16 or float16.
        amax: Largest magnitude, ().

    Returns:
        Values and scale; what lies beyond `amax` saturates.
    """
    scale = tensor_scale(amax)
    return PackedFp8((w / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale)


def dequantize(packed: PackedFp8, dtype: torch.dtype) -> Tensor:
    """Unpack a weight: value times scale in float32, rounded once to `dtype`."""
    return (packed.weight.float() * packed.weight_scale).to(dtype)


def fake_quant_weight(w: Tensor, amax: Tensor) -> Tensor:
    """Quantize and unpack: `dequantize(quantize_weight(w, amax), w.dtype)`."""
    return dequantize(quantize_weight(w, amax), w.dtype)


def fake_quant_activation(x: Tensor, amax: Tensor) -> Tensor:
    """Quantize and unpack an activation with its calibrated range, as vLLM's static FP8 does.

    Args:
        x: Any shape, float32, bfloat16 or float16.
        amax: Calibrated largest magnitude, (). What lies beyond saturates.

    Returns:
        Same shape and dtype.
    """
    scale = tensor_scale(amax)
    codes = (x.float() * scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)
