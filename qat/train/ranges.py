"""How weight ranges follow training.

The calibrated range of a weight, max |W_persona|, sets the tensor scale; every block scale is rounded to E4M3 relative
to it. Were the range taken anew in each forward, a wobble of one largest weight would re-round all block scales of its
tensor, and the student would chase noise of its own making. Were it frozen, a weight that outgrows it would be
clipped. So it only grows: after each optimizer step it becomes max(range so far, max |W + s B A|), shared over the
modules that a server fuses. Nothing is ever clipped, and as long as no weight outgrows the persona's largest one,
which is nearly always, the grid stands still. Growing is part of the training's state: it is kept in every checkpoint,
and export gets the ranges with which the last forward ran.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from qat.quant.lora import linear_weight, parameter_weight
from qat.quant.modelopt import quantizers
from qat.quant.names import checkpoint_name, sharing_groups
from qat.train.adapters import adapted_weights
from qat.train.objective import causal_lm
from qat.train.parallel import decoder_layer, whole_layer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Growth(NamedTuple):
    """How far ranges have grown past the calibrated ones.

    Attributes:
        modules: Modules with a grown range.
        largest: Largest ratio of a range to its calibrated value; 1 where none has grown.
    """

    modules: int
    largest: float


class WeightRanges:
    """The weight ranges of what a student trains: its adapted modules, or all where it has no adapter.

    Args:
        model: With quantizers, ranges loaded from the calibration; PEFT's or plain.
    """

    def __init__(self, model: PeftModel | PreTrainedModel) -> None:
        base = causal_lm(model)
        self._quantizers = {name: pair.weight for name, pair in quantizers(model).items()}
        self._weights: dict[str, tuple[Callable[[Any], Tensor], Any]] = {}
        # By decoder layer, whose weights are whole only together where several GPUs share them.
        self._layers: dict[torch.nn.Module, list[str]] = {}
        for path, weight in _trained_weights(model, base).items():
            name = checkpoint_name(path, str(base.config.model_type))
            if name in self._quantizers:
                self._weights[name] = weight
                self._layers.setdefault(decoder_layer(base, path), []).append(name)
        self._groups = [
            group for group in sharing_groups(self._quantizers) if any(name in self._weights for name in group)
        ]
        self._calibrated = self.tensors()

    @torch.no_grad()
    def grow_(self) -> None:
        """Raise every range to its effective weight's, where that is larger."""
        for holder, names in self._layers.items():
            with whole_layer(holder):
                for name in names:
                    effective, layer = self._weights[name]
                    weight = effective(layer).abs()
                    amax = weight.amax() if weight.dim() == 2 else weight.amax(dim=(1, 2))
                    own = self._quantizers[name]._amax
                    torch.maximum(own, amax.to(own), out=own)
        for group in self._groups:
            members = [self._quantizers[name]._amax for name in group]
            largest = torch.stack(members).amax(dim=0)
            for own in members:
                own.copy_(largest)

    def tensors(self) -> dict[str, Tensor]:
        """The ranges by module, float32, copied."""
        return {name: quantizer._amax.detach().cpu().clone() for name, quantizer in self._quantizers.items()}

    @torch.no_grad()
    def load_(self, tensors: dict[str, Tensor]) -> None:
        """Set what `tensors` gave."""
        for name, amax in tensors.items():
            self._quantizers[name]._amax.copy_(amax)

    def growth(self) -> Growth:
        """Compare with the calibrated ranges."""
        ratios = [float((amax / self._calibrated[name]).max()) for name, amax in self.tensors().items()]
        return Growth(sum(ratio > 1 for ratio in ratios), max(ratios))


def _trained_weights(
    model: PeftModel | PreTrainedModel, base: PreTrainedModel
) -> dict[str, tuple[Callable[[Any], Tensor], Any]]:
    """Path of a module or fused parameter -> how its weight comes from what is kept for it."""
    from peft import PeftModel
    from peft.tuners.lora.layer import ParamWrapper

    if isinstance(model, PeftModel):
        return {
            path: (parameter_weight if isinstance(layer, ParamWrapper) else linear_weight, layer)
            for path, layer in adapted_weights(model).items()
        }
    trained = {name: parameter for name, parameter in base.named_parameters() if parameter.requires_grad}
    return {name.removesuffix(".weight"): (lambda weight: weight, weight) for name, weight in trained.items()}
