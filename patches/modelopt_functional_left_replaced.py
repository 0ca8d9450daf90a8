"""ModelOpt puts quantizing functions into torch for the time of a forward, and leaves them there after an error."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch

_FUNCTION = "replace_function"


class ModelOptFunctionalLeftReplaced(ReplacingPatch):
    """Puts the function back however the forward ends."""

    name = "modelopt_functional_left_replaced"
    title = "After an error in a quantized forward, torch.nn.functional.linear stays ModelOpt's"
    breaks = (
        "Silent: whoever catches the error (an out-of-memory retry with a smaller batch, a notebook) goes on with "
        "F.linear replaced in the whole process: every linear of every model, quantized or not, then runs through the "
        "quantizers of that one layer of experts."
    )
    upstream = "modelopt/torch/quantization/utils/core_utils.py: replace_function, a yield without finally"
    affects = "nvidia-modelopt 0.47, modules quantized by replaced functions (fused experts, convolutions and others)"
    libraries = ("nvidia-modelopt",)
    place = Place.HERE
    repair = (
        "qat's own wrapper of fused experts replaces no function. With ModelOpt's wrappers use this patch, or end the "
        "process after an error in a forward."
    )

    def probe(self) -> ProbeResult:
        """Replace a function, fail, and look for the original."""
        from modelopt.torch.quantization.utils import core_utils

        package = SimpleNamespace(linear="the original")
        try:
            with core_utils.replace_function(package, "linear", "ModelOpt's"):
                raise MemoryError
        except MemoryError:
            found = f"after an error in the forward the function is {package.linear}"
        return self.absent(found) if package.linear == "the original" else ProbeResult(Status.NEEDED, found)

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """The context manager, in every module of ModelOpt that imported it."""
        from modelopt.torch.quantization.plugins import custom  # noqa: F401  its users are loaded with it
        from modelopt.torch.quantization.utils import core_utils

        original = core_utils.replace_function
        for name, module in list(sys.modules.items()):
            if name.startswith("modelopt.") and getattr(module, "__dict__", {}).get(_FUNCTION) is original:
                yield module, _FUNCTION, _restoring


@contextmanager
def _restoring(original: Around, package: Any, name: str, new: Any, copy: str | None = None) -> Iterator[None]:
    before = getattr(package, name)
    try:
        with original(package, name, new, copy):
            yield
    except BaseException:
        setattr(package, name, before)
        delattr(package, copy or f"_{name}")  # where ModelOpt keeps the original meanwhile
        raise


register(ModelOptFunctionalLeftReplaced())
