"""PEFT's preparation for k-bit training turns fused experts into float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch
from qat.patches.tiny import nemotron_h_config

if TYPE_CHECKING:
    from torch import nn


class PeftKbitExpertsUpcast(ReplacingPatch):
    """Hides 3-D parameters of mixtures of experts from the loop that casts everything to float32.

    They are frozen like all others; only their dtype stays.
    """

    name = "peft_kbit_experts_upcast"
    title = "prepare_model_for_kbit_training upcasts fused experts to float32"
    breaks = (
        "Silent: the experts, which bitsandbytes left in BF16, grow to twice their size (59 to 117 GB on the 30B "
        "model) and the grouped product runs in float32."
    )
    upstream = "peft/utils/other.py: prepare_model_for_kbit_training, param.data.to(torch.float32)"
    affects = "peft 0.21.2 with transformers >=5.0, whose experts are 3-D parameters"
    libraries = ("peft", "transformers")
    place = Place.HERE
    repair = (
        "qat trains on the BF16 base and does not call it. Elsewhere use this patch before calling it, or freeze the "
        "base and cast the norms yourself."
    )

    def probe(self) -> ProbeResult:
        """Prepare a BF16 layer of experts."""
        import peft
        import torch
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        experts = torch.nn.Sequential(NemotronHExperts(nemotron_h_config("moe"))).bfloat16()
        peft.prepare_model_for_kbit_training(experts, use_gradient_checkpointing=False)
        dtypes = {str(parameter.dtype) for parameter in experts.parameters()}
        if dtypes != {"torch.bfloat16"}:
            return ProbeResult(Status.NEEDED, f"experts in torch.bfloat16 became {', '.join(sorted(dtypes))}")
        return self.absent("experts stay in torch.bfloat16")

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """The function, where PEFT exports it and where it is defined."""
        import peft

        for module in (peft, peft.utils, peft.utils.other):
            yield module, "prepare_model_for_kbit_training", _without_experts


def _without_experts(prepare: Around, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    import torch

    fused = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, torch.nn.modules.conv._ConvNd)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3
    }

    def others(recurse: bool = True) -> Iterator[nn.Parameter]:
        return (parameter for parameter in type(model).parameters(model, recurse) if id(parameter) not in fused)

    # The loop reads `model.parameters()`; freezing goes by `named_parameters()`, which does not use it.
    model.__dict__["parameters"] = others
    try:
        return prepare(model, *args, **kwargs)
    finally:
        del model.__dict__["parameters"]


register(PeftKbitExpertsUpcast())
