"""The experts' kernel: named for NVFP4 checkpoints of Nemotron-H on the GPUs whose default is wrong, only there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat.recipe.schema import ServeBlock
from qat.serve import launch
from qat.serve.moe_backend import gpu_majors, moe_arguments
from tests.unit.serve.fake_engine import make_checkpoint, make_engine

FLAG = ("--moe-backend", "flashinfer_cutlass")
NVFP4: dict[str, Any] = {"model_type": "nemotron_h", "quantization_config": {"quant_algo": "NVFP4"}}


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An `nvidia-smi` that prints what it is given."""

    def say(text: str) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\nprintf '{text}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")

    return say


@pytest.mark.parametrize(
    ("printed", "majors"),
    [("10.0\\n", {10}), ("9.0\\n9.0\\n", {9}), ("10.3\\n12.0\\n", {10, 12}), ("", set()), ("[N/A]\\n", set())],
)
def test_compute_capabilities(gpus: Any, printed: str, majors: set[int]) -> None:
    gpus(printed)
    assert gpu_majors() == majors


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_majors() == set() and moe_arguments(tmp_path, NVFP4) == ()


@pytest.mark.parametrize(
    ("config", "printed", "expected"),
    [
        (NVFP4, "10.0\\n", FLAG),
        (NVFP4, "9.0\\n", ()),
        (NVFP4, "12.0\\n", ()),
        ({"model_type": "nemotron_h"}, "10.0\\n", ()),
        ({**NVFP4, "model_type": "qwen3_moe"}, "10.0\\n", ()),
        ({**NVFP4, "quantization_config": {"quant_algo": "FP8"}}, "10.0\\n", ()),
    ],
)
def test_who_is_concerned(
    tmp_path: Path, gpus: Any, config: dict[str, Any], printed: str, expected: tuple[str, ...]
) -> None:
    gpus(printed)
    assert moe_arguments(tmp_path, config) == expected


def test_the_real_checkpoint_says_it_beside_its_configuration(tmp_path: Path, gpus: Any, real_data: Path) -> None:
    gpus("10.0\\n")
    name = "model_configs/nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4"
    config = json.loads((real_data / f"{name}_config.json").read_text())
    assert "quantization_config" not in config and moe_arguments(tmp_path, config) == ()
    (tmp_path / "hf_quant_config.json").write_text((real_data / f"{name}_hf_quant_config.json").read_text())
    assert moe_arguments(tmp_path, config) == FLAG
    for damaged in ("{", "[]", "{}", '{"quantization": []}'):
        (tmp_path / "hf_quant_config.json").write_text(damaged)
        assert moe_arguments(tmp_path, config) == ()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: Any) -> None:
    monkeypatch.setenv("QAT_ENGINE", str(make_engine(tmp_path / "engine")))
    checkpoint = make_checkpoint(tmp_path / "c", json.dumps(NVFP4))
    gpus("10.0\\n")
    argv = launch.build_command(checkpoint, ServeBlock(device="cuda"), 1).argv
    assert tuple(argv[-2:]) == FLAG
    # The user's own choice comes after, and vLLM takes the last.
    own = ("--moe-backend", "marlin")
    assert tuple(launch.build_command(checkpoint, ServeBlock(device="cuda", extra_args=own), 1).argv[-4:]) == FLAG + own
    assert "--moe-backend" not in launch.build_command(checkpoint, ServeBlock(device="cpu"), 1).argv
