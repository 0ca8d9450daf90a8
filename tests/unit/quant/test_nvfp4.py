"""The NVFP4 arithmetic against a slow definition, against ModelOpt's export and against vLLM itself."""

from __future__ import annotations

import os
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.quant.nvfp4 import (
    block_amax,
    dequantize,
    fake_quant_activation,
    fake_quant_weight,
    quantize_weight,
    round_e2m1_,
    tensor_scale,
)

ROOT = Path(__file__).resolve().parents[3]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

E2M1 = [Fraction(value) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
# All non-negative finite E4M3 values: subnormals k * 2**-9, then (8 + m) * 2**(e - 10).
E4M3 = [Fraction(m, 512) for m in range(8)] + [
    Fraction(8 + m) * Fraction(2) ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
]


def nearest(value: Fraction, grid: list[Fraction]) -> int:
    """Index of the nearest grid value, ties to the even index, beyond the end the last one."""
    gaps = [abs(value - entry) for entry in grid]
    best = min(gaps)
    candidates = [index for index, gap in enumerate(gaps) if gap == best]
    return next((index for index in candidates if index % 2 == 0), candidates[0])


def slow_e4m3(value: np.float32) -> np.float32:
    return np.float32(float(E4M3[nearest(Fraction(float(value)), E4M3)]))


def slow_weight(w: Tensor, amax: float) -> tuple[Tensor, Tensor, list[list[int]]]:
    """ModelOpt's order of operations, one element at a time in NumPy float32; rounding by exact fractions."""
    scale_2 = np.float32(amax) / np.float32(2688)
    values, scales, codes = [], [], []
    for row in w.float().numpy():
        out, row_scales, row_codes = [], [], []
        for block in row.reshape(-1, 16):
            scale = np.float32(np.abs(block).max()) / (np.float32(6) * scale_2)
            scale = np.float32(1) if scale == 0 else np.clip(scale, np.float32(2**-9), np.float32(448))
            scale = slow_e4m3(scale)
            row_scales.append(float(scale))
            step = np.float32(scale * scale_2)
            for element in block:
                z = np.float32(element / step)
                code = nearest(Fraction(float(abs(z))), E2M1)
                row_codes.append(code + (8 if z < 0 else 0))
                out.append(float(np.float32(np.float32(float(E2M1[code])) * (-1 if z < 0 else 1)) * step))
        values.append(out)
        scales.append(row_scales)
        codes.append(row_codes)
    return torch.tensor(values).to(w.dtype), torch.tensor(scales), codes


def slow_activation(x: Tensor, amax: float) -> Tensor:
    """vLLM's order of operations (`ref_nvfp4_quant_dequant`), one element at a time."""
    global_scale = np.float32(1) / (np.float32(amax) / np.float32(2688))
    inverse = np.float32(1) / global_scale
    rows = []
    for row in x.float().numpy():
        out = []
        for block in row.reshape(-1, 16):
            scale = np.float32(global_scale * np.float32(np.float32(np.abs(block).max()) * np.float32(1 / 6)))
            scale = slow_e4m3(min(scale, np.float32(448)))
            product = np.float32(scale * inverse)
            to_e2m1 = np.float32(1) / (np.float32(1e8) if product == 0 else product)
            for element in block:
                z = np.clip(np.float32(element * to_e2m1), np.float32(-6), np.float32(6))
                value = np.float32(float(E2M1[nearest(Fraction(float(abs(z))), E2M1)])) * (-1 if z < 0 else 1)
                out.append(float(np.float32(value) * np.float32(scale / global_scale)))
        rows.append(out)
    return torch.tensor(rows).to(x.dtype)


def awkward(seed: int, dtype: torch.dtype, rows: int = 12, columns: int = 64) -> Tensor:
    """Values with zeros, tiny and huge blocks, and many exact ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x[0, :16] = 0
    x[1, 16:32] *= 1e-4
    x[2] *= 40
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    x[3] = ties.repeat(columns // 8)
    x[4] = -ties.repeat(columns // 8)
    x[5, 1:16] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.7, 3.0])
def test_weight_equals_the_slow_definition(dtype: torch.dtype, factor: float) -> None:
    w = awkward(1, dtype)
    amax = w.abs().max().float() * factor
    packed = quantize_weight(w, amax)
    values, scales, codes = slow_weight(w, float(amax))
    expected = torch.tensor(codes, dtype=torch.uint8)
    assert torch.equal(packed.weight & 15, expected[:, 0::2])
    assert torch.equal(packed.weight >> 4, expected[:, 1::2])
    assert torch.equal(packed.weight_scale.float(), scales)
    assert torch.equal(fake_quant_weight(w, amax), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.3, 5.0])
def test_activation_equals_the_slow_definition(dtype: torch.dtype, factor: float) -> None:
    x = awkward(2, dtype)
    amax = x.abs().max().float() * factor
    assert torch.equal(fake_quant_activation(x, amax), slow_activation(x, float(amax)))


def test_order_of_operations_at_ties_of_the_block_scale() -> None:
    # With this range, block maxima of 0.0177… * 2**k put the scale on a tie of E4M3, where max / 6 instead of
    # max * (1 / 6) lands on the other side (7 instead of 7.5 for the first).
    amax = torch.tensor(1.09375)
    largest = 0.0177001953125 * 2.0 ** torch.arange(6)
    x = (largest[:, None] * torch.linspace(-1, 1, 16)).bfloat16()
    faked = fake_quant_activation(x, amax)
    assert torch.equal(faked, slow_activation(x, float(amax)))
    step = 7.5 * 1.09375 / 2688
    assert float(faked[0, -1]) == pytest.approx(6 * step, rel=4e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_weight_equals_modelopts_export_bit_for_bit(dtype: torch.dtype, seed: int) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    w = torch.cat([awkward(seed, dtype), torch.randn(200, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)])
    for factor in (0.4, 0.93, 1.0, 2.7):
        amax = w.abs().max().float() * factor
        quantized, scale, scale_2 = NVFP4QTensor.quantize(w.clone(), 16, weights_scaling_factor_2=amax / 2688)
        packed = quantize_weight(w, amax)
        assert torch.equal(packed.weight, quantized._quantized_data)
        assert torch.equal(packed.weight_scale.view(torch.uint8), scale.view(torch.uint8))
        assert torch.equal(packed.weight_scale_2, scale_2)
        theirs = quantized.dequantize(dtype, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
        assert torch.equal(dequantize(packed, dtype).view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantization_is_packing_and_unpacking(dtype: torch.dtype) -> None:
    w = torch.stack([awkward(seed, dtype) for seed in range(3)])
    amax = torch.tensor([1.0, 2.0, 0.5]) * w.abs().amax((1, 2)).float()
    faked = fake_quant_weight(w, amax)
    packed = quantize_weight(w, amax)
    assert torch.equal(faked.view(torch.uint8), dequantize(packed, dtype).view(torch.uint8))
    assert packed.weight_scale_2.shape == (3,)
    for expert in range(3):
        alone = quantize_weight(w[expert], amax[expert])
        assert torch.equal(alone.weight, packed.weight[expert])
        assert torch.equal(alone.weight_scale.view(torch.uint8), packed.weight_scale[expert].view(torch.uint8))
        assert torch.equal(fake_quant_weight(w[expert], amax[expert]), faked[expert])


def test_a_block_by_hand() -> None:
    # amax 6 * 448: the tensor scale is 1. The block's maximum 12 gives block scale 2, so codes are the values halved.
    w = torch.tensor([[0.0, 1.0, -2.0, 3.0, 4.0, -6.0, 8.0, 12.0, 0.49, -0.49, 0.5, 0.51, 1.5, 2.5, 5.0, 7.0]])
    packed = quantize_weight(w, torch.tensor(2688.0))
    assert packed.weight_scale_2.item() == 1.0
    assert packed.weight_scale.float().tolist() == [[2.0]]
    codes = [0, 1, 8 + 2, 3, 4, 8 + 5, 6, 7, 0, 8, 0, 1, 2, 2, 4, 6]
    assert packed.weight.tolist() == [[low + 16 * high for low, high in zip(codes[::2], codes[1::2], strict=True)]]
    unpacked = [0.0, 1.0, -2.0, 3.0, 4.0, -6.0, 8.0, 12.0, 0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 4.0, 8.0]
    assert dequantize(packed, torch.float32).tolist() == [unpacked]


def test_rounding_at_and_around_every_tie() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    above = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    below = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
    for sign in (1, -1):
        assert torch.equal(round_e2m1_(ties * sign), expected * sign)
        assert torch.equal(round_e2m1_(torch.nextafter(ties, torch.tensor(9.0)) * sign), above * sign)
        assert torch.equal(round_e2m1_(torch.nextafter(ties, torch.tensor(0.0)) * sign), below * sign)


def test_leading_dimensions_and_memory_layout_do_not_matter() -> None:
    x = awkward(3, torch.bfloat16)
    amax = x.abs().max().float()
    expected = fake_quant_activation(x, amax)
    assert torch.equal(fake_quant_activation(x.view(3, 4, 64), amax).view(12, 64), expected)
    assert torch.equal(fake_quant_activation(x.t().contiguous().t(), amax), expected)
    assert torch.equal(fake_quant_weight(x.t().contiguous().t(), amax), fake_quant_weight(x, amax))


def test_the_input_is_left_alone() -> None:
    x = awkward(4, torch.float32)
    before = x.clone()
    fake_quant_activation(x, torch.tensor(3.0))
    fake_quant_weight(x, torch.tensor(3.0))
    quantize_weight(x, torch.tensor(3.0))
    assert torch.equal(x, before)


def test_block_amax_equals_the_plain_maximum() -> None:
    for dtype in DTYPES:
        x = awkward(5, dtype)
        assert torch.equal(block_amax(x), x.view(12, 4, 16).abs().amax(-1).float())


def test_bad_arguments() -> None:
    w = torch.ones(4, 32)
    with pytest.raises(ValueError, match="multiple of 16"):
        fake_quant_weight(torch.ones(4, 24), torch.tensor(1.0))
    with pytest.raises(ValueError, match="float64"):
        fake_quant_activation(w.double(), torch.tensor(1.0))
    for amax in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            quantize_weight(w, torch.tensor(amax))
    with pytest.raises(ValueError, match="does not fit"):
        quantize_weight(w, torch.ones(3))


_IN_VLLM = """
import sys
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.utils import nvfp4_emulation_utils as reference
given = load_file(sys.argv[1])
out = {}
for name in ("bfloat16", "float32"):
    dtype = getattr(torch, name)
    out["x." + name] = reference.ref_nvfp4_quant_dequant(given["x." + name], 1.0 / given["input_scale"], 16)
    for key in ("w", "e"):
        packed = (given[key], given[key + "_scale"], given[key + "_scale_2"])
        out[key + "." + name] = reference.dequantize_to_dtype(*packed, dtype, 16, swizzle=False)
save_file(out, sys.argv[2])
"""


@pytest.mark.engine
@pytest.mark.slow
def test_vllm_computes_the_same(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    python = Path(os.environ.get("QAT_ENGINE") or ROOT / ".venv-vllm") / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no vLLM environment at {python}")
    x = torch.cat([awkward(seed, torch.float32) for seed in range(6)])
    x = torch.cat([x, torch.randn(504, 64, generator=torch.Generator().manual_seed(9))])
    amax = torch.tensor(17.3)
    packed = quantize_weight(x, x.abs().max())
    experts = x.view(4, -1, 64)
    fused = quantize_weight(experts, experts.abs().amax((1, 2)))
    given = {
        "x.float32": x,
        "x.bfloat16": x.bfloat16(),
        "input_scale": tensor_scale(amax),
        "w": packed.weight.contiguous(),
        "w_scale": packed.weight_scale,
        "w_scale_2": packed.weight_scale_2,
        "e": fused.weight.contiguous(),
        "e_scale": fused.weight_scale,
        "e_scale_2": fused.weight_scale_2,
    }
    save_file(given, tmp_path / "given.safetensors")
    command = [str(python), "-c", _IN_VLLM, str(tmp_path / "given.safetensors"), str(tmp_path / "out.safetensors")]
    subprocess.run(command, check=True, timeout=170, capture_output=True, env={**os.environ, "VLLM_PLUGINS": ""})
    theirs = load_file(tmp_path / "out.safetensors")
    for name in ("bfloat16", "float32"):
        dtype = getattr(torch, name)
        assert torch.equal(theirs[f"x.{name}"], fake_quant_activation(x.to(dtype), amax))
        assert torch.equal(theirs[f"w.{name}"], dequantize(packed, dtype))
        assert torch.equal(theirs[f"e.{name}"], dequantize(fused, dtype))
