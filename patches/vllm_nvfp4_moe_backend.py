"""On some GPUs vLLM's default kernel for NVFP4 experts corrupts Nemotron-H."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from qat.errors import UserError
from qat.patches.engine import EXPERTS, LIBRARIES, look
from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.serve_case import vllm_arguments
from qat.serve.moe_backend import AFFECTED_MAJOR

_CODE = """
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import select_nvfp4_moe_backend
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static

result = {"major": None}
if current_platform.is_cuda():
    description = experts(MoEActivation.RELU2_NO_MUL, moe_backend=%r)
    result = {
        "major": current_platform.get_device_capability().major,
        "backend": select_nvfp4_moe_backend(description, kNvfp4Static, kNvfp4Dynamic)[0].value,
    }
"""


class VllmNvfp4MoeBackend:
    """Chooses FlashInfer's CUTLASS kernel on the GPUs concerned.

    The probe sees which kernel vLLM chooses, not whether the installed FlashInfer still computes wrongly.
    """

    name = "vllm_nvfp4_moe_backend"
    title = "vLLM's default NVFP4 experts' kernel corrupts Nemotron-H on B200 and its kin"
    breaks = "Silent: fluent text with the wrong meaning, the same at every run (Nemotron-3-Nano-30B-A3B-NVFP4)."
    upstream = "vllm/model_executor/layers/fused_moe/oracle/nvfp4.py: FLASHINFER_TRTLLM first; vllm-project/vllm#52308"
    affects = "vllm 0.26 and 0.27 reported on compute capability 10.0, the same order of choice in 0.32"
    libraries = (*LIBRARIES, "flashinfer-python")
    place = Place.ENGINE
    repair = (
        "`qat serve` adds --moe-backend flashinfer_cutlass for NVFP4 checkpoints of Nemotron-H on GPUs of compute "
        "capability 10.x. Elsewhere give the same flag, and compare both kernels before blaming four bits."
    )

    def probe(self) -> ProbeResult:
        """Let vLLM choose a kernel for experts without a gate (needs a GPU)."""
        return look(EXPERTS + _CODE % "auto", _judge)

    def verify(self) -> ProbeResult:
        """The same with the backend of `qat serve`'s command."""
        try:
            arguments = vllm_arguments("cuda")
        except UserError as error:
            return ProbeResult(Status.CANNOT_TELL, error.what)
        chosen = dict(pairwise(arguments)).get("--moe-backend", "auto")
        return look(EXPERTS + _CODE % chosen, _judge)


def _judge(found: dict[str, Any]) -> ProbeResult:
    if found["major"] is None:
        return ProbeResult(Status.CANNOT_TELL, "no CUDA GPU for vLLM here")
    wrong = found["major"] == AFFECTED_MAJOR and found["backend"] == "FLASHINFER_TRTLLM"
    detail = f"compute capability {found['major']}.x: vLLM chooses {found['backend']}"
    return ProbeResult(Status.NEEDED if wrong else Status.NOT_NEEDED, detail)


register(VllmNvfp4MoeBackend())
