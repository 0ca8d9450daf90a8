"""`save_pretrained` takes the quantizers of fused experts for the experts themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch
from qat.patches.tiny import nemotron_h_config, scratch, tensor_names

_QUANTIZER = "model.layers.0.mixer.experts.up_proj_weight_quantizers.0._amax"


class TransformersQuantizedMoeSave(ReplacingPatch):
    """Leaves quantizers' tensors out of the conversion to the checkpoint's layout.

    Saving splits `experts.up_proj`, one tensor for all experts, into one per expert. The pattern for that also matches
    `experts.up_proj_weight_quantizers.0._amax`, a scalar, which cannot be split. Quantizers' tensors are written under
    their names in memory, which is where loading looks for them.
    """

    name = "transformers_quantized_moe_save"
    title = "save_pretrained of a ModelOpt-quantized mixture of experts fails"
    breaks = '"IndexError: Dimension specified as 0 but tensor has no dimensions" in save_pretrained and save_model'
    upstream = "transformers/core_model_loading.py: revert_weight_conversion, SplitModulelist.convert"
    affects = "transformers >=5.3 with modelopt 0.47 (Nemotron-H and others with fused experts), 5.17 and 5.19 seen"
    libraries = ("transformers",)
    place = Place.HERE
    repair = (
        "Tensors of quantizers are kept out of the conversion and written as they are. With other tools: "
        "save_pretrained(folder, save_original_format=False)."
    )

    def probe(self) -> ProbeResult:
        """Save a tiny Nemotron-H together with the range of one quantizer, a scalar."""
        import torch
        from transformers import NemotronHForCausalLM

        with scratch() as folder:
            model = NemotronHForCausalLM(nemotron_h_config("moe"))
            tensors = {**model.state_dict(), _QUANTIZER: torch.tensor(1.0)}
            try:
                model.save_pretrained(folder, state_dict=tensors)
            except IndexError as error:
                return ProbeResult(Status.NEEDED, f"IndexError: {error}")
            written = _QUANTIZER in tensor_names(folder)
        if not written:
            return ProbeResult(Status.NEEDED, "the quantizer's range was dropped or renamed")
        return self.absent("the quantizer's range was saved under its own name")

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """Convert everything but the quantizers."""
        from transformers import modeling_utils

        yield modeling_utils, "revert_weight_conversion", _convert_the_rest


def _convert_the_rest(original: Around, model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    aside = {name: tensor for name, tensor in tensors.items() if "_quantizer" in name}
    converted: dict[str, Any] = original(model, {name: tensors[name] for name in tensors if name not in aside})
    return converted | aside


register(TransformersQuantizedMoeSave())
