"""ModelOpt's `QATTrainer` switches off the quantizers of every layer that its LoRA configuration targets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qat.patches.guard import watch
from qat.patches.modelopt_int8 import int8_config, quantize_int8
from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch

_QUANTIZERS = ("q_proj.input_quantizer", "q_proj.weight_quantizer")


class ModelOptQatLoraDisablesQuantizers(ReplacingPatch):
    """Keeps the trainer from appending `*q_proj.weight_quantizer: off` and its like to the configuration.

    What it appends for the factors (`*lora*`) stays. The quantizers that it leaves on, inside `base_layer`, are not
    those that run: ModelOpt's LoRA layer quantizes the merged weight with its own, except where the base is compressed.
    """

    name = "modelopt_qat_lora_disables_quantizers"
    title = "QATTrainer with a LoRA configuration switches off the quantizers of the targeted layers"
    breaks = (
        "Silent: the adapted layers train in BF16 while the quantizer summary still lists enabled quantizers (those "
        "inside base_layer, which are never called); the exported layers are quantized for the first time."
    )
    upstream = "modelopt/torch/quantization/plugins/transformers_trainer.py: QATTrainer.__init__"
    affects = "nvidia-modelopt 0.47 with peft"
    libraries = ("nvidia-modelopt", "peft")
    place = Place.HERE
    repair = (
        "qat does not use QATTrainer: it inserts quantizers after the adapter and the guard asks for each by name. "
        "With QATTrainer use this patch, or set trainer.quant_cfg again after __init__; keep ModelOpt's behaviour for "
        "QLoRA on a compressed base."
    )

    def probe(self) -> ProbeResult:
        """Prepare a configuration as the trainer does, quantize a LoRA layer with it, and watch its quantizers."""
        import torch
        from modelopt.torch.quantization.plugins import transformers_trainer
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(devices=[]):
            layers = torch.nn.Sequential()
            layers.add_module("q_proj", torch.nn.Linear(16, 16))
            model = get_peft_model(layers, LoraConfig(r=2, target_modules=["q_proj"]))
        config = int8_config()
        transformers_trainer.disable_lora_quantizers_in_config(config, ["q_proj"])
        quantize_int8(model, lambda network: network(torch.ones(2, 16)), config)
        with watch(model, quantized=_QUANTIZERS) as seen, torch.no_grad():
            model(torch.ones(2, 16))
        if seen.dead.quantizers or seen.dead.switched_off:
            dead = sorted({*seen.dead.quantizers, *seen.dead.switched_off})
            return ProbeResult(Status.NEEDED, f"of a layer with LoRA these take no part: {', '.join(dead)}")
        return self.absent("the layer with LoRA runs its own quantizers")

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """The function that extends the configuration, where the trainer looks it up."""
        from modelopt.torch.quantization.plugins import transformers_trainer

        yield transformers_trainer, "disable_lora_quantizers_in_config", _only_the_factors


def _only_the_factors(original: Around, config: dict[str, Any], layers: Iterable[str]) -> Any:
    return original(config, [])


register(ModelOptQatLoraDisablesQuantizers())
