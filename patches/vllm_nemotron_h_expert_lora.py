"""vLLM cannot load a LoRA adapter on Nemotron-H's routed experts."""

from __future__ import annotations

from typing import Any

from qat.errors import UserError
from qat.patches.engine import LIBRARIES, look
from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.serve_case import vllm_arguments

# PEFT stacks the factors of all experts into one tensor. Only the wrapper for models with `is_3d_moe_weight` takes them
# apart; the other hands the tensor to `set_lora`, which wants a list.
_CODE = """
import torch
from vllm.lora.layers.fused_moe import FusedMoE3DWithLoRA, FusedMoEWithLoRA
from vllm.model_executor.models.nemotron_h import NemotronHForCausalLM

result = {"takes_stacked": bool(NemotronHForCausalLM.is_3d_moe_weight), "refused": False}
if not result["takes_stacked"]:
    wrapper = object.__new__(FusedMoEWithLoRA)
    try:
        wrapper.set_lora(0, torch.zeros(8, 4), torch.zeros(4, 8))
    except AssertionError:
        result["refused"] = True
"""


class VllmNemotronHExpertLora:
    """Merges adapters before serving: a checkpoint has them in its weights, and vLLM loads no adapter."""

    name = "vllm_nemotron_h_expert_lora"
    title = "vLLM cannot load LoRA on the routed experts of Nemotron-H"
    breaks = (
        '"AssertionError" at `assert isinstance(lora_a, list)` and HTTP 500 from /v1/load_lora_adapter; on CPU '
        '"AssertionError: … does not support LoRA" at the start'
    )
    upstream = (
        "vllm/model_executor/models/nemotron_h.py: NemotronHForCausalLM lacks is_3d_moe_weight; "
        "vllm-project/vllm#47088 (closed, not merged)"
    )
    affects = "vllm 0.32; older ones say that 'get_expert_mapping' must be implemented (vllm-project/vllm#31923)"
    libraries = LIBRARIES
    place = Place.ENGINE
    repair = (
        "`qat export` merges the adapters and `qat serve` starts vLLM without LoRA. Elsewhere merge before serving, or "
        "adapt the attention only and start vLLM with --lora-target-modules qkv_proj o_proj."
    )

    def probe(self) -> ProbeResult:
        """Hand factors in PEFT's form to the wrapper that vLLM takes for Nemotron-H."""
        return look(_CODE, _judge)

    def verify(self) -> ProbeResult:
        """Look for adapters in `qat serve`'s command."""
        try:
            arguments = vllm_arguments("cpu")
        except UserError as error:
            return ProbeResult(Status.CANNOT_TELL, error.what)
        lora = [argument for argument in arguments if "lora" in argument]
        if lora:
            return ProbeResult(Status.NEEDED, f"qat serve starts vLLM with {' '.join(lora)}")
        return ProbeResult(Status.NOT_NEEDED, "qat serve starts vLLM without adapters: they are in the weights")


def _judge(found: dict[str, Any]) -> ProbeResult:
    if found["refused"]:
        return ProbeResult(Status.NEEDED, "AssertionError for stacked factors; is_3d_moe_weight is False")
    how = "is_3d_moe_weight is set" if found["takes_stacked"] else "set_lora takes stacked factors"
    return ProbeResult(Status.NOT_NEEDED, how)


register(VllmNemotronHExpertLora())
