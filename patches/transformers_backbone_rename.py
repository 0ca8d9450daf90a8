"""Transformers before 5.17 saves Nemotron-H's embedding under a name that nobody reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch
from qat.patches.tiny import nemotron_h_config, scratch, tensor_names

_WRONG, _RIGHT = "backbone.embedding.weight", "backbone.embeddings.weight"


class TransformersBackboneRename(ReplacingPatch):
    """Writes the embedding as `backbone.embeddings.weight`, the name in every published Nemotron-H.

    The conversion table held the rule `embedding.weight -> embeddings.weight` for loading, and saving runs each rule
    backwards.
    """

    name = "transformers_backbone_rename"
    title = "save_pretrained writes Nemotron-H's embedding as backbone.embedding.weight"
    breaks = (
        "Silent when saving; vLLM then refuses the checkpoint: \"ValueError: There is no module or parameter named "
        "'model.embedding' in NemotronHForCausalLM\""
    )
    upstream = "huggingface/transformers#48075 (fixed); conversion_mapping.py, nemotron_h"
    affects = "transformers 5.3 to 5.16, 5.14.1 seen; gone in 5.17"
    libraries = ("transformers",)
    place = Place.HERE
    repair = (
        "The name is put right as the last step of saving. A checkpoint that has the wrong name is repaired by "
        "renaming the tensor in its header and in model.safetensors.index.json (`qat doctor --fix`)."
    )

    def probe(self) -> ProbeResult:
        """Save a tiny Nemotron-H and look at the names."""
        from transformers import NemotronHForCausalLM

        with scratch() as folder:
            NemotronHForCausalLM(nemotron_h_config("mlp")).save_pretrained(folder)
            names = tensor_names(folder)
        if _RIGHT in names:
            return self.absent(f"saved as {_RIGHT}")
        return ProbeResult(Status.NEEDED, f"saved as {', '.join(sorted(name for name in names if 'embed' in name))}")

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """Look over the names on their way to the disk."""
        from transformers import modeling_utils

        yield modeling_utils, "revert_weight_conversion", _rename


def _rename(original: Around, model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors = original(model, tensors)
    if model.config.model_type != "nemotron_h":
        return tensors
    return {_RIGHT if name == _WRONG else name: tensor for name, tensor in tensors.items()}


register(TransformersBackboneRename())
