"""vLLM has no NVFP4 kernel for mixtures of experts on a CPU."""

from __future__ import annotations

from qat.patches.engine import EXPERTS, MissingCpuKernel
from qat.patches.registry import register


class VllmCpuNvfp4Experts(MissingCpuKernel):
    """Adds one to the classes that vLLM chooses from: `serve/vllm_plugin/experts.py`.

    The probe asks for gated experts, so that the refusal of `vllm_cpu_ungated_experts` does not come first.
    """

    name = "vllm_cpu_nvfp4_experts"
    title = "vLLM has no NVFP4 experts on CPU"
    breaks = '"NotImplementedError: No NvFp4 MoE backend supports the deployment configuration."'
    upstream = "vllm/model_executor/layers/fused_moe/oracle/nvfp4.py: select_nvfp4_moe_backend"
    repair = (
        "qat's vLLM plugin offers experts in plain PyTorch; `qat serve` loads it. Elsewhere install qat into vLLM's "
        "environment and set VLLM_PLUGINS=qat."
    )
    code = f"""{EXPERTS}
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import select_nvfp4_moe_backend
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static

def choose():
    return select_nvfp4_moe_backend(experts(MoEActivation.SILU), kNvfp4Static, kNvfp4Dynamic)[1]
"""


register(VllmCpuNvfp4Experts())
