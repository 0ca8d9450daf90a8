"""Tests that need a CUDA device; each says so by skipping."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

# One choice of tiles for each of mamba-ssm's kernels, where trying all of them takes minutes for a new shape, and sums
# in a fixed order. Read when its modules are imported.
os.environ["MAMBA_DETERMINISTIC"] = "1"
os.environ.pop("TRITON_CACHE_AUTOTUNING", None)


@pytest.fixture(autouse=True)
def cuda() -> torch.device:
    """The device; random numbers start anew in each test."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    return torch.device("cuda")


@pytest.fixture
def scan(cuda: torch.device) -> None:
    """mamba-ssm's scan in Transformers' modules."""
    if find_spec("mamba_ssm") is None:
        pytest.skip("mamba-ssm is not installed")
    from qat.patches.registry import ensure

    ensure("mamba_ssm_kernels_without_build", "nemotron_h_fused_mamba")
