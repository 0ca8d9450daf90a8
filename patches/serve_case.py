"""The command with which `qat serve` starts vLLM on a Nemotron-H, as the probes of vLLM need it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Literal

_CONFIG = {"model_type": "nemotron_h", "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}


def vllm_arguments(device: Literal["cpu", "cuda"]) -> list[str]:
    """What `qat serve` hands to vLLM's API server for an NVFP4 checkpoint.

    Args:
        device: Of the recipe's `serve` block.

    Raises:
        UserError: There is no engine environment.
    """
    from qat.recipe.schema import ServeBlock
    from qat.serve.launch import build_command

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
        argv = build_command(Path(folder), ServeBlock(device=device), port=8000).argv
    return argv[argv.index("--model") :]
