"""ModelOpt switches every model with fused experts to the slow loop over experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register

_FUNCTION = "force_eager_experts_impl_on_the_fly"


class ModelOptEagerExperts:
    """Leaves the model's experts implementation as it is.

    ModelOpt's wrapper for fused experts intercepts `F.linear` and therefore needs the eager loop. The wrapper used here
    quantizes the whole 3-D weight in front of one grouped product and needs nothing forced.
    """

    name = "modelopt_eager_experts"
    title = "ModelOpt sets config._experts_implementation to eager"
    breaks = (
        "Silent: the unquantized forward (the teacher) runs the loop over experts, 3 times slower on a GPU and with "
        "other rounding."
    )
    upstream = "modelopt/torch/quantization/plugins/huggingface.py: force_eager_experts_impl_on_the_fly"
    affects = "nvidia-modelopt 0.47"
    libraries = ("nvidia-modelopt", "transformers")
    place = Place.HERE
    repair = (
        "qat takes the hook off ModelOpt's list and quantizes fused experts as whole 3-D tensors. With ModelOpt's own "
        "wrapper leave it on: under grouped_mm that wrapper quantizes nothing, without a message."
    )

    def __init__(self) -> None:
        self._removed: Any = None

    def probe(self) -> ProbeResult:
        """Run ModelOpt's hooks for custom models on a stand-in with fused experts."""
        import torch
        from modelopt.torch.quantization.plugins import custom, huggingface

        if not hasattr(huggingface, _FUNCTION):
            return ProbeResult(Status.NOT_NEEDED, "this ModelOpt forces nothing")

        class Experts(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.num_experts = 2
                self.up_proj = torch.nn.Parameter(torch.zeros(2, 4, 4))
                self.down_proj = torch.nn.Parameter(torch.zeros(2, 4, 4))

        model = torch.nn.Sequential(Experts())
        config = SimpleNamespace(_experts_implementation="grouped_mm")
        model.config = config  # type: ignore[assignment]
        for hook in custom.CUSTOM_MODEL_PLUGINS:
            if hook.__name__ == _FUNCTION:
                hook(model)
        if config._experts_implementation == "eager":
            return ProbeResult(Status.NEEDED, "grouped_mm became eager")
        status = Status.APPLIED if self._removed is not None else Status.NOT_NEEDED
        return ProbeResult(status, "grouped_mm stays grouped_mm")

    def apply(self) -> None:
        """Take the hook off ModelOpt's list."""
        from modelopt.torch.quantization.plugins import custom

        for hook in list(custom.CUSTOM_MODEL_PLUGINS):
            if hook.__name__ == _FUNCTION:
                custom.CUSTOM_MODEL_PLUGINS.remove(hook)
                self._removed = hook

    def revert(self) -> None:
        """Put the hook back."""
        if self._removed is None:
            return
        from modelopt.torch.quantization.plugins import custom

        custom.CUSTOM_MODEL_PLUGINS.add(self._removed)
        self._removed = None


register(ModelOptEagerExperts())
