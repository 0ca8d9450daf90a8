"""vLLM refuses experts without a gate projection, which Nemotron-H has, on a CPU."""

from __future__ import annotations

from qat.patches.engine import EXPERTS, MissingCpuKernel
from qat.patches.registry import register


class VllmCpuUngatedExperts(MissingCpuKernel):
    """Drops that one refusal and offers experts in plain PyTorch: `serve/vllm_plugin`."""

    name = "vllm_cpu_ungated_experts"
    title = "vLLM refuses experts without a gate (Nemotron-H) on CPU"
    breaks = '"NotImplementedError: is_act_and_mul=False is supported only for CUDA, XPU and ROCm for now"'
    upstream = "vllm/model_executor/layers/fused_moe/config.py: FusedMoEConfig.__post_init__"
    repair = (
        "qat's vLLM plugin lifts the refusal and brings the experts; `qat serve` loads it. Elsewhere install qat into "
        "vLLM's environment and set VLLM_PLUGINS=qat."
    )
    code = f"""{EXPERTS}
from vllm.model_executor.layers.fused_moe.oracle.unquantized import select_unquantized_moe_backend

def choose():
    return select_unquantized_moe_backend(experts(MoEActivation.RELU2_NO_MUL))[1]
"""


register(VllmCpuUngatedExperts())
