"""vLLM has no NVFP4 kernel for linear layers on a CPU."""

from __future__ import annotations

from qat.patches.engine import MissingCpuKernel
from qat.patches.registry import register


class VllmCpuNvfp4Linear(MissingCpuKernel):
    """Adds one to vLLM's own table: `serve/vllm_plugin/linear.py`."""

    name = "vllm_cpu_nvfp4_linear"
    title = "vLLM has no NVFP4 linear kernel on CPU"
    breaks = '"ValueError: Failed to find a kernel that can implement the NVFP4 linear layer."'
    upstream = "vllm/model_executor/kernels/linear/__init__.py: _POSSIBLE_NVFP4_KERNELS"
    repair = (
        "qat's vLLM plugin puts a CPU kernel into that table; `qat serve` loads it. Elsewhere install qat into vLLM's "
        "environment and set VLLM_PLUGINS=qat."
    )
    code = """
from vllm.model_executor.kernels.linear import init_nvfp4_linear_kernel

def choose():
    return type(init_nvfp4_linear_kernel())
"""


register(VllmCpuNvfp4Linear())
