"""mamba-ssm's Triton kernels lie behind a package that imports a CUDA extension they do not need."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
from types import ModuleType
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register

_PACKAGE = "mamba_ssm"
_KERNELS = ("ops.triton.ssd_combined", "ops.triton.selective_state_update")
_MODELING = "transformers.models.nemotron_h.modeling_nemotron_h"
# Transformers' function -> mamba-ssm's. The fused training kernel is left out: see nemotron_h_fused_mamba.
_FUNCTIONS = {
    "mamba2_selective_state_update": "selective_state_update",
    "mamba2_chunk_scan": "mamba_chunk_scan_combined",
}


class MambaSsmKernelsWithoutBuild:
    """Puts an empty `mamba_ssm` with the package's search path into `sys.modules`, so that its modules import alone.

    Transformers decides once, when its modeling module is imported, whether it takes the kernels; it is asked to decide
    again for each of those that run without causal_conv1d.
    """

    name = "mamba_ssm_kernels_without_build"
    title = "mamba-ssm built without its CUDA extension cannot be imported, and its Triton kernels go unused"
    breaks = (
        "\"ModuleNotFoundError: No module named 'selective_scan_cuda'\" on import; silent in Transformers, which takes "
        "it for not installed and scans in PyTorch: 2.78 s instead of 0.48 s a step and 77 instead of 63 GiB on the "
        "30B model (batch 1 x 2048, H200)."
    )
    upstream = "mamba_ssm/__init__.py and ops/selective_scan_interface.py; state-spaces/mamba#977 guards the import"
    affects = "mamba-ssm up to 2.3.2.post1 built with MAMBA_SKIP_CUDA_BUILD=TRUE: the only way on aarch64 with CUDA 13"
    libraries = ("mamba-ssm", "triton", "einops", "transformers")
    place = Place.GPU
    repair = (
        "Build a pure-Python wheel anywhere: MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip wheel --no-deps "
        "--no-build-isolation mamba-ssm==2.3.2.post1; this patch makes its Triton modules importable. Elsewhere put a "
        "module mamba_ssm with the package's __path__ into sys.modules before importing Transformers."
    )

    def __init__(self) -> None:
        self._functions: dict[str, Any] = {}

    def probe(self) -> ProbeResult:
        """Import the package, and where that fails, look whether the kernels are there all the same."""
        import torch

        if not torch.cuda.is_available():
            return ProbeResult(Status.CANNOT_TELL, "no GPU: the kernels would not be used")
        applied = isinstance(sys.modules.get(_PACKAGE), _Bare)
        if not applied and importlib.util.find_spec(_PACKAGE) is None:
            return ProbeResult(Status.CANNOT_TELL, "mamba-ssm is not installed")
        if not applied:
            try:
                importlib.import_module(_PACKAGE)
            except Exception as error:  # whatever it raises, Transformers takes as absence
                _forget()
                return ProbeResult(Status.NEEDED, f"import mamba_ssm: {type(error).__name__}: {error}")
        for kernel in _KERNELS:
            try:
                importlib.import_module(f"{_PACKAGE}.{kernel}")
            except Exception as error:
                return ProbeResult(Status.NEEDED, f"import mamba_ssm.{kernel}: {type(error).__name__}: {error}")
        return ProbeResult(Status.APPLIED if applied else Status.NOT_NEEDED, "mamba-ssm's Triton kernels are imported")

    def apply(self) -> None:
        """Stand in for the package, and let Transformers look for the kernels again."""
        if isinstance(sys.modules.get(_PACKAGE), _Bare):
            return
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.submodule_search_locations is None:
            return
        # Imported before the stand-in: afterwards it would take the fused kernel too, which calls causal_conv1d.
        modeling: Any = importlib.import_module(_MODELING)
        _forget()
        sys.modules[_PACKAGE] = _Bare(spec)
        from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

        for name, kernel in _FUNCTIONS.items():
            function = self._functions[name] = getattr(modeling, name)
            again = use_kernel_func_from_hub_with_fallback(kernel, _PACKAGE)
            setattr(modeling, name, _by_device(again(inspect.unwrap(function)), function))

    def revert(self) -> None:
        """Take the stand-in away, with what was imported through it, and give Transformers its functions back."""
        if not isinstance(sys.modules.get(_PACKAGE), _Bare):
            return
        _forget()
        for name, function in self._functions.items():
            setattr(sys.modules[_MODELING], name, function)
        self._functions.clear()


def _by_device(kernel: Any, elsewhere: Any) -> Any:
    """The kernel for tensors on a GPU; for others, as in probes, what was there before."""

    @functools.wraps(kernel)
    def chosen(first: Any, *args: Any, **kwargs: Any) -> Any:
        return (kernel if first.is_cuda else elsewhere)(first, *args, **kwargs)

    return chosen


class _Bare(ModuleType):
    """A package whose `__init__` is not run."""

    def __init__(self, spec: importlib.machinery.ModuleSpec) -> None:
        super().__init__(_PACKAGE)
        self.__spec__, self.__path__ = spec, list(spec.submodule_search_locations or ())


def _forget() -> None:
    for name in [name for name in sys.modules if name == _PACKAGE or name.startswith(f"{_PACKAGE}.")]:
        del sys.modules[name]


register(MambaSsmKernelsWithoutBuild())
