"""ModelOpt's quantizers of fused experts run under one experts implementation only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qat.patches.guard import watch
from qat.patches.modelopt_int8 import quantize_int8
from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch
from qat.patches.tiny import nemotron_h_config

if TYPE_CHECKING:
    from torch import nn


class ModelOptExpertsBypassed(ReplacingPatch):
    """Runs ModelOpt's fused experts eagerly while one of their quantizers is on, whatever the model is set to.

    With all quantizers off (the teacher) the chosen implementation stays in use. The wrapper that qat registers for
    fused experts is another class, which quantizes in front of one grouped product and is not touched.
    """

    name = "modelopt_experts_bypassed"
    title = "ModelOpt does not quantize fused experts unless the experts implementation is eager"
    breaks = (
        "Silent: with grouped_mm or batched_mm (set after quantizing, or where ModelOpt's switch to eager is off) the "
        "routed experts train, calibrate and are measured in BF16; on the 30B model's layers the logits differ by half."
    )
    upstream = "modelopt/torch/quantization/plugins/huggingface.py: _QuantFusedExperts, F.linear is intercepted"
    affects = "nvidia-modelopt 0.47 with transformers >=5.0"
    libraries = ("nvidia-modelopt", "transformers")
    place = Place.HERE
    repair = (
        "qat's own wrapper quantizes the whole 3-D weight and runs under every implementation, and the guard names "
        "quantizers that never ran. With ModelOpt's wrapper this patch forces the eager loop while quantizers are on; "
        "elsewhere load with experts_implementation='eager' and leave it so."
    )

    def probe(self) -> ProbeResult:
        """Quantize fused experts, choose grouped_mm, and watch which quantizers run."""
        import torch

        with _experts() as experts:
            tokens = torch.linspace(-1, 1, 64).reshape(4, 16)
            routing = torch.tensor([[0], [1], [0], [1]]), torch.ones(4, 1)
            quantize_int8(experts, lambda _: experts(tokens, *routing))
            experts.config._experts_implementation = "grouped_mm"
            with watch(experts) as seen, torch.no_grad():
                experts(tokens, *routing)
        calls = seen.quantizer_calls.values()
        found = f"under grouped_mm {sum(count > 0 for count in calls)} of {len(calls)} enabled quantizers ran"
        return self.absent(found) if all(calls) else ProbeResult(Status.NEEDED, found)

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """The forward of ModelOpt's wrapper."""
        from modelopt.torch.quantization.plugins.huggingface import _QuantFusedExperts

        yield _QuantFusedExperts, "forward", _eagerly


def _eagerly(forward: Around, experts: Any, *args: Any, **kwargs: Any) -> Any:
    from modelopt.torch.quantization.nn import TensorQuantizer

    if not any(isinstance(module, TensorQuantizer) and module.is_enabled for module in experts.modules()):
        return forward(experts, *args, **kwargs)
    config = experts.config
    chosen = config._experts_implementation
    config._experts_implementation = "eager"
    try:
        return forward(experts, *args, **kwargs)
    finally:
        config._experts_implementation = chosen


@contextmanager
def _experts() -> Iterator[Any]:
    """Nemotron-H's experts as a class of their own, which ModelOpt's registry forgets again."""
    import torch
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    class Experts(NemotronHExperts):
        # A forward of its own: the registry takes a subclass with an inherited one for its parent.
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    experts: nn.Module = Experts(nemotron_h_config("moe"))
    experts.requires_grad_(False)
    for parameter in experts.parameters():
        parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    try:
        yield experts
    finally:
        QuantModuleRegistry.unregister(Experts)


register(ModelOptExpertsBypassed())
