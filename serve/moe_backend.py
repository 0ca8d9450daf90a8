"""Which experts' kernel vLLM is told to use where the one it would choose itself computes nonsense.

On compute capability 10.x (B200, GB200) vLLM 0.26 to 0.32 chooses FlashInfer's TensorRT-LLM kernel for NVFP4 experts.
For experts without a gate, as Nemotron-H has them, its output is fluent and wrong, the same every time; the CUTLASS
kernel is right on the same GPU (vllm-project/vllm#52308, open). Other GPUs get another kernel by themselves.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ARGUMENTS = ("--moe-backend", "flashinfer_cutlass")
AFFECTED_MAJOR = 10
"""First number of the compute capability of the GPUs concerned."""
_TIMEOUT_S = 30.0


def moe_arguments(checkpoint: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The arguments that choose the kernel; none where vLLM's own choice is right.

    Args:
        checkpoint: Folder of the checkpoint.
        config: Its `config.json`.
    """
    concerned = config.get("model_type") == "nemotron_h" and _algorithm(checkpoint, config) == "NVFP4"
    return ARGUMENTS if concerned and AFFECTED_MAJOR in gpu_majors() else ()


def gpu_majors() -> set[int]:
    """First numbers of the compute capabilities of this machine's NVIDIA GPUs; empty where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return set()
    numbers = (line.strip().partition(".")[0] for line in done.stdout.splitlines())
    return {int(number) for number in numbers if number.isdigit()}


def _algorithm(checkpoint: Path, config: Mapping[str, Any]) -> object:
    """The checkpoint's `quant_algo`: in config.json, or where ModelOpt alone wrote it."""
    if isinstance(own := config.get("quantization_config"), dict):
        return own.get("quant_algo")
    try:
        beside = json.loads((checkpoint / "hf_quant_config.json").read_text(encoding="utf-8"))
        return beside["quantization"]["quant_algo"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
