"""PEFT's merge rounds once where ModelOpt's forward with LoRA rounds twice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch

if TYPE_CHECKING:
    import torch


class PeftMergeRounding(ReplacingPatch):
    """Lets PEFT merge a layer with ModelOpt's quantizers by the expression that the layer's forward quantizes.

    The forward computes `W + ((s * B) @ A).to(W.dtype)`: the product is rounded to BF16, and the sum again. PEFT adds
    the float32 product to the BF16 weight. Layers without quantizers, and those of qat, stay as they are.
    """

    name = "peft_merge_rounding"
    title = "merge_and_unload writes other weights than the quantized forward with LoRA used"
    breaks = (
        "Silent: 12-22 % of the merged BF16 values and 0.2-0.8 % of their quantized values differ from the trained "
        "ones; the logits of tiny models moved by 10-13 %, since activation quantizers amplify it."
    )
    upstream = (
        "peft/tuners/lora/layer.py: Linear.merge; modelopt/torch/quantization/plugins/peft.py: _QuantLoraLinear.forward"
    )
    affects = "peft 0.21 with nvidia-modelopt 0.47, weights in BF16 or FP16 and factors in FP32"
    libraries = ("peft", "nvidia-modelopt")
    place = Place.HERE
    repair = (
        "qat has one effective weight (one addmm, one rounding) for the forward, the merge and the export. With "
        "ModelOpt's QAT on LoRA use this patch, or merge_and_unload(safe_merge=True), which rounds the product first, "
        "too (bit-equal where alpha / r is a power of two)."
    )

    def probe(self) -> ProbeResult:
        """Compare what a LoRA layer's weight quantizer gets with what PEFT merges."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = _quantized_lora()
        quantized: list[torch.Tensor] = []
        hook = layer.weight_quantizer.register_forward_pre_hook(lambda _, inputs: quantized.append(inputs[0]))
        with torch.no_grad():
            layer(torch.ones(1, 64, dtype=torch.bfloat16))
            hook.remove()
            layer.merge()
        different = float((layer.base_layer.weight != quantized[0]).float().mean())
        if different:
            return ProbeResult(Status.NEEDED, f"{different:.0%} of the merged values are not those that were quantized")
        return self.absent("the merged weight is the one that was quantized")

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """The product that merging adds to the weight."""
        from peft.tuners.lora.layer import Linear

        yield Linear, "get_delta_weight", _as_in_the_forward


def _as_in_the_forward(get_delta_weight: Around, layer: Any, adapter: str) -> torch.Tensor:
    from modelopt.torch.quantization.plugins.peft import _QuantLoraLinear

    if not isinstance(layer, _QuantLoraLinear):
        delta: torch.Tensor = get_delta_weight(layer, adapter)
        return delta
    weight = layer.base_layer.weight
    product: torch.Tensor = (layer.scaling[adapter] * layer.lora_B[adapter].weight) @ layer.lora_A[adapter].weight
    return product.to(weight.device, weight.dtype)


def _quantized_lora() -> Any:
    """A BF16 layer of 64 by 64 with LoRA of rank 4, converted by ModelOpt's own class whatever its registry holds."""
    import torch
    from modelopt.torch.quantization.plugins.peft import _QuantLoraLinear
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    base = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    layer: Any = Linear(base, "default", LoraConfig(r=4, lora_alpha=8), r=4, lora_alpha=8)
    layer.lora_A.float()
    torch.nn.init.normal_(layer.lora_B.float()["default"].weight, std=0.1)
    converted: Any = type("QuantLoraLinear", (_QuantLoraLinear, Linear), {})
    return converted.convert(layer)


register(PeftMergeRounding())
