"""FP8 against a table of all E4M3 values, ModelOpt's export and ModelOpt's own unpacking."""

from __future__ import annotations

import bisect

import pytest
import torch
from torch import Tensor

from qat.quant.fp8 import dequantize, fake_quant_activation, fake_quant_weight, quantize_weight, tensor_scale


def e4m3_values() -> list[float]:
    """Every magnitude by its definition: four exponent bits with bias 7, three mantissa bits, the last code is NaN."""
    values = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        values.append(mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return values


def nearest(x: float, values: list[float]) -> float:
    """The nearest magnitude with the sign of x; ties go to the even code."""
    place = min(bisect.bisect_left(values, abs(x)), len(values) - 1)
    below = max(place - 1, 0)
    distances = abs(abs(x) - values[below]), abs(abs(x) - values[place])
    pick = below if distances[0] < distances[1] or (distances[0] == distances[1] and below % 2 == 0) else place
    return values[pick] if x >= 0 else -values[pick]


def weight(dtype: torch.dtype) -> Tensor:
    return (torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) * 0.137).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_nearest_values(dtype: torch.dtype) -> None:
    w, values = weight(dtype), e4m3_values()
    assert values[-1] == 448.0
    amax = w.abs().max().float()
    packed = quantize_weight(w, amax)
    assert packed.weight_scale == amax / 448
    scaled = (w / packed.weight_scale).flatten().tolist()  # in the weight's own dtype, as ModelOpt divides
    assert packed.weight.float().flatten().tolist() == [nearest(x, values) for x in scaled]
    assert torch.equal(fake_quant_weight(w, amax), dequantize(packed, dtype))
    assert fake_quant_weight(w, amax).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_modelopts_export(dtype: torch.dtype) -> None:
    from modelopt.torch.export.quant_utils import to_quantized_weight

    w = weight(dtype)
    packed = quantize_weight(w, w.abs().max())
    assert torch.equal(to_quantized_weight(w, packed.weight_scale, "fp8").float(), packed.weight.float())
    # Dividing in float32 is another order of operations, and the difference shows.
    once = (w.float() / packed.weight_scale).to(torch.float8_e4m3fn).float()
    assert torch.equal(once, packed.weight.float()) == (dtype == torch.float32)


def test_activations_saturate_and_round_in_float32() -> None:
    x = torch.tensor([[0.3, -7.0, 9.0, 0.0, 1e-9]]).bfloat16()
    amax = torch.tensor(7.0)
    scale = 7.0 / 448
    values = e4m3_values()
    expected = [
        nearest(max(-448.0, min(448.0, value / scale)), values) * scale for value in x.float().flatten().tolist()
    ]
    found = fake_quant_activation(x, amax)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.flatten(), torch.tensor(expected).bfloat16())
    assert found[0, 1] == -7.0 and found[0, 2] == 7.0
    assert tensor_scale(amax) == torch.tensor(scale)
