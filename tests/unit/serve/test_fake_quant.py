from __future__ import annotations

import subprocess
import sys
from bisect import bisect_left
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from qat.quant import nvfp4  # noqa: E402
from qat.serve.vllm_plugin.fake_quant import fake_quant_activation, round_to_e2m1  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nearest_e2m1(x: float) -> float:
    """By search: the nearest value, of two equally near ones that with the even code."""
    magnitude = abs(x)
    upper = bisect_left(CODES, magnitude)
    if CODES[upper] == magnitude:
        best = upper
    else:
        below, above = magnitude - CODES[upper - 1], CODES[upper] - magnitude
        best = upper if above < below or (above == below and upper % 2 == 0) else upper - 1
    return -CODES[best] if x < 0 else CODES[best]


def test_rounding_is_to_nearest_with_ties_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    around = torch.cat(
        [ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(9.0)), torch.tensor(CODES)]
    )
    x = torch.cat([around, -around, torch.empty(20_000).uniform_(-6, 6, generator=torch.Generator().manual_seed(0))])
    expected = torch.tensor([nearest_e2m1(float(value)) for value in x])
    assert torch.equal(round_to_e2m1(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("amax", [0.37, 6.7, 2688.0])
def test_what_is_served_is_what_training_fakes(dtype: torch.dtype, amax: float) -> None:
    # Half of the values sit on a coarse grid, where ties happen.
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 96, generator=generator) * amax / 4
    x[::2] = (x[::2] * 8 / amax).round() * amax / 8
    x[5] = 0
    x = x.to(dtype)
    scale = torch.tensor(amax) / (6 * 448)  # what the checkpoint holds; vLLM takes its reciprocal
    assert torch.equal(fake_quant_activation(x, 1.0 / scale), nvfp4.fake_quant_activation(x, torch.tensor(amax)))


def test_the_plugin_imports_without_the_training_stack() -> None:
    code = (
        "import sys\n"
        "for name in ('modelopt', 'trl', 'peft', 'transformers', 'pydantic', 'torch', 'vllm'):\n"
        "    sys.modules[name] = None\n"
        "import qat.serve.vllm_plugin"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
