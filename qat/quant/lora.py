"""LoRA under quantization: the quantizer sees the effective weight, and merging writes that same weight.

ModelOpt's plugin for PEFT quantizes `W + ((s*B)@A).to(dtype)`, which rounds twice; these classes take its place in the
registry of quantized modules, so that the forward, the merge and the export share `effective_weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import modelopt.torch.quantization  # noqa: F401  registers ModelOpt's own classes, which are replaced below
import torch
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from qat.errors import UserError
from qat.quant.effective import Adapted, expert_factors, whole
from qat.quant.experts import QuantFusedExperts, plain_experts, projections
from qat.quant.packed import PackedWeight, add_low_rank_
from qat.quant.products import multiply

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
        return lora_linear(self, self.input_quantizer(x), self.weight_quantizer)

    def iter_weights_for_calibration(self) -> Iterator[tuple[Tensor, TensorQuantizer]]:
        """Nothing: weights are calibrated in the forward, where adapters are active (ModelOpt's hook)."""
        return iter(())


class QuantParamWrapper(QuantModule):
    """LoRA on a fused expert parameter: hands the effective weight to the experts for one forward."""

    def _setup(self) -> None:
        pass

    @contextmanager
    def _activate_lora(self, active_adapters: Sequence[str]) -> Iterator[None]:
        if isinstance(self.get_base_layer(), QuantFusedExperts):
            with _handed_over(self, active_adapters):
                yield
            return
        _require_unmerged(self)
        with super()._activate_lora(active_adapters):
            yield


@contextmanager
def _handed_over(layer: Any, _: Sequence[str]) -> Iterator[None]:
    """Give the experts the parameter together with its active adapter, for one forward."""
    _require_unmerged(layer)
    adapted = layer.get_base_layer().adapted
    adapted[layer.parameter_name] = adapted_weight(layer)
    try:
        yield
    finally:
        del adapted[layer.parameter_name]


def lora_linear(layer: Any, x: Tensor, quantizer: Any = None) -> Tensor:
    """Multiply with the effective weight of a LoRA linear.

    Args:
        layer: PEFT's LoRA linear.
        x: (…, in).
        quantizer: Of the weight.

    Returns:
        (…, out).
    """
    _require_unmerged(layer)
    return multiply(x, adapted_weight(layer), quantizer, bias=layer.base_layer.bias)


def adapted_weight(layer: Any) -> Tensor | Adapted:
    """The weight of a LoRA layer with the active adapter that was added last, still apart; earlier ones are merged.

    Args:
        layer: PEFT's LoRA linear or wrapper of a fused expert parameter, quantized or not.

    Returns:
        (out, in) or (experts, out, in); the base weight alone where adapters are disabled.
    """
    fused = isinstance(layer, ParamWrapper)
    weight: Tensor | Adapted = layer.get_param() if fused else layer.base_layer.weight
    for adapter in _active(layer):
        base = whole(weight)
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if fused:
            a, b = expert_factors(a, b, base.shape[0])
        weight = Adapted(base, a, b, layer.scaling[adapter])
    return weight


def linear_weight(layer: Any) -> Tensor:
    """The weight that a LoRA linear multiplies with: active adapters applied in order, or none where they are disabled.

    Args:
        layer: PEFT's LoRA linear, quantized or not.

    Returns:
        (out, in) in the base weight's dtype.
    """
    return whole(adapted_weight(layer))


def parameter_weight(layer: Any) -> Tensor:
    """The effective weight of a fused expert parameter.

    Args:
        layer: PEFT's wrapper of the parameter, quantized or not.

    Returns:
        (experts, out, in) in the parameter's dtype.
    """
    return linear_weight(layer)


def use_fast_experts_(model: nn.Module) -> int:
    """Let fused experts train unquantized on a GPU with one pass where Transformers and PEFT make several.

    Rows are copied and summed by one kernel each, and adapters stay low-rank or are formed, whichever moves fewer
    bytes (`qat.quant.products.low_rank_pays`). Not for a model that gets quantizers afterwards: they bring their own.

    Args:
        model: With or without PEFT adapters, on a GPU; changed in place.

    Returns:
        Number of modules with fused experts.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, ParamWrapper) and projections(module.get_base_layer()) is not None:
            module._activate_lora = partial(_handed_over, module)
        elif (names := projections(module)) is not None:
            module.__dict__.update(projection_names=names, adapted={}, forward=partial(plain_experts, module))
            count += 1
    return count


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
            _absorb_(layer.base_layer.weight, layer, linear_weight)
        elif isinstance(layer, ParamWrapper):
            _require_unmerged(layer)
            _absorb_(layer.get_param(), layer, parameter_weight)
    plain: PreTrainedModel = model.base_model.unload()
    # Left behind, it makes the next get_peft_model warn that the model is being modified a second time.
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain


def _absorb_(weight: Tensor, layer: Any, effective: Callable[[Any], Tensor]) -> None:
    """Write a layer's effective weight into its base weight; a packed one keeps the factors instead."""
    if not isinstance(weight, PackedWeight):
        weight.data.copy_(effective(layer))
        return
    for adapter in _active(layer):
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if weight.dim() == 3:
            a, b = expert_factors(a, b, weight.shape[0])
        add_low_rank_(weight, a, b, layer.scaling[adapter])


def _active(layer: Any) -> list[str]:
    return [] if layer.disable_adapters else [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


def _require_unmerged(layer: Any) -> None:
    if layer.merged:
        raise RuntimeError("PEFT merged this adapter with its own arithmetic; use merge_adapter_ instead")
