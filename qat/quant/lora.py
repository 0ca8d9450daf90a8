"""LoRA under quantization: the quantizer sees the effective weight, and merging writes that same weight.

ModelOpt's plugin for PEFT quantizes `W + ((s*B)@A).to(dtype)`, which rounds twice; these classes take its place in the
registry of quantized modules, so that the forward, the merge and the export share `effective_weight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import modelopt.torch.quantization  # noqa: F401  registers ModelOpt's own classes, which are replaced below
import torch
import torch.nn.functional as F
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from qat.errors import UserError
from qat.quant.effective import effective_weight, expert_factors
from qat.quant.experts import QuantFusedExperts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class QuantLoraLinear(QuantModule):
    """A linear with LoRA: F.linear(Q(x), Q(effective weight), bias)."""

    def _setup(self) -> None:
        self._register_temp_attribute("input_quantizer", TensorQuantizer())
        self._register_temp_attribute("weight_quantizer", TensorQuantizer())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply with the quantized effective weight.

        Args:
            x: (…, in).

        Returns:
            (…, out).
        """
        _require_unmerged(self)
        weight = linear_weight(self)
        return F.linear(self.input_quantizer(x), self.weight_quantizer(weight), self.base_layer.bias)

    def iter_weights_for_calibration(self) -> Iterator[tuple[Tensor, TensorQuantizer]]:
        """Nothing: weights are calibrated in the forward, where adapters are active (ModelOpt's hook)."""
        return iter(())


class QuantParamWrapper(QuantModule):
    """LoRA on a fused expert parameter: hands the effective weight to the experts for one forward."""

    def _setup(self) -> None:
        pass

    @contextmanager
    def _activate_lora(self, active_adapters: Sequence[str]) -> Iterator[None]:
        _require_unmerged(self)
        experts = self.get_base_layer()
        if not isinstance(experts, QuantFusedExperts):
            with super()._activate_lora(active_adapters):
                yield
            return
        experts.adapted[self.parameter_name] = parameter_weight(self)
        try:
            yield
        finally:
            del experts.adapted[self.parameter_name]


def linear_weight(layer: Any) -> Tensor:
    """The weight that a LoRA linear multiplies with: active adapters applied in order, or none where they are disabled.

    Args:
        layer: PEFT's LoRA linear, quantized or not.

    Returns:
        (out, in) in the base weight's dtype.
    """
    weight: Tensor = layer.base_layer.weight
    for adapter in _active(layer):
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        weight = effective_weight(weight, a, b, layer.scaling[adapter])
    return weight


def parameter_weight(layer: Any) -> Tensor:
    """The effective weight of a fused expert parameter.

    Args:
        layer: PEFT's wrapper of the parameter, quantized or not.

    Returns:
        (experts, out, in) in the parameter's dtype.
    """
    weight: Tensor = layer.get_param()
    for adapter in _active(layer):
        a, b = expert_factors(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, weight.shape[0])
        weight = effective_weight(weight, a, b, layer.scaling[adapter])
    return weight


def register_lora() -> None:
    """Put these classes in the place of ModelOpt's PEFT plugin; calling it again changes nothing."""
    for original, ours in ((LoraLinear, QuantLoraLinear), (ParamWrapper, QuantParamWrapper)):
        registered: Any = QuantModuleRegistry.get(original)
        if registered is not None and issubclass(registered, ours):
            continue
        if registered is not None:
            QuantModuleRegistry.unregister(original)
        QuantModuleRegistry.register({original: f"qat.{original.__name__}"})(ours)


def require_plain_lora(model: nn.Module) -> None:
    """Check that every adapter can be written as one effective weight.

    Args:
        model: With or without adapters.

    Raises:
        UserError: An adapter has dropout, or is no plain LoRA (DoRA and others), or sits on another kind of module.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not isinstance(layer, LoraLinear | ParamWrapper):
            raise UserError(
                "An adapter sits on a module that cannot be merged.", where=name, value=type(layer).__name__
            )
        variants = [
            adapter for adapter in layer.lora_A if adapter in layer.lora_variant or layer.lora_bias.get(adapter)
        ]
        if variants:
            raise UserError(
                "Only plain LoRA has an effective weight (no DoRA, no bias).", where=name, value=variants[0]
            )
        if any(isinstance(dropout, nn.Dropout) and dropout.p > 0 for dropout in layer.lora_dropout.values()):
            raise UserError(
                "LoRA dropout has no effective weight that could be quantized.",
                where=name,
                remedy="Set the adapter's dropout to 0.0.",
            )


@torch.no_grad()
def merge_adapter_(model: PeftModel) -> PreTrainedModel:
    """Merge the active adapters into the base weights in place and take PEFT's wrappers off.

    Args:
        model: Not quantized.

    Returns:
        The plain model; its logits equal those of the effective-weight forward bit for bit.

    Raises:
        UserError: An adapter is no plain LoRA.
        TypeError: The model has quantizers.
    """
    require_plain_lora(model)
    if any(isinstance(module, QuantModule) for module in model.modules()):
        raise TypeError("adapters are merged before quantizers are inserted")
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            _require_unmerged(layer)
            layer.base_layer.weight.data.copy_(linear_weight(layer))
        elif isinstance(layer, ParamWrapper):
            _require_unmerged(layer)
            layer.get_param().data.copy_(parameter_weight(layer))
    plain: PreTrainedModel = model.base_model.unload()
    # Left behind, it makes the next get_peft_model warn that the model is being modified a second time.
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain


def _active(layer: Any) -> list[str]:
    return [] if layer.disable_adapters else [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


def _require_unmerged(layer: Any) -> None:
    if layer.merged:
        raise RuntimeError("PEFT merged this adapter with its own arithmetic; use merge_adapter_ instead")
