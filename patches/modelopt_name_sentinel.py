"""ModelOpt's helper text for translating module names ends up in the exported names."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch
from qat.patches.tiny import nemotron_h_config

_FUNCTION = "build_reverse_name_mapper"
_USERS = ("quant_aware_conversion", "unified_export_hf", "unified_export_hf_streaming")
_SENTINEL = re.compile(r"\.\x00.*?_sentinel")


class ModelOptNameSentinel(ReplacingPatch):
    r"""Cuts the sentinel off the translated names.

    To translate `lm_head` from the names in memory to those on disk, ModelOpt appends `.\0modelopt_name_sentinel`,
    applies the reversed rules and removes it again. Nemotron-H's rule `model. -> backbone.` is an unescaped pattern,
    matches `modelo` and turns the sentinel into `backbone.pt_name_sentinel`, which is then not recognised.
    """

    name = "modelopt_name_sentinel"
    title = "exclude_modules of an exported Nemotron-H end in \\0backbone.pt_name_sentinel"
    breaks = (
        "Silent: exclude_modules and ignore name no module, so a server takes lm_head, embeddings, convolutions and "
        "routers for quantized and fails on their missing scales or misreads their weights."
    )
    upstream = "modelopt/torch/export/quant_aware_conversion.py: build_reverse_name_mapper"
    affects = "nvidia-modelopt 0.47 with transformers >=5.17"
    libraries = ("nvidia-modelopt", "transformers")
    place = Place.HERE
    repair = (
        "The translated names lose the sentinel before they are written. A checkpoint that has it is repaired by "
        "deleting everything from .\\u0000 up to sentinel in config.json and hf_quant_config.json (`qat doctor --fix`)."
    )

    def probe(self) -> ProbeResult:
        """Translate names of a tiny Nemotron-H, with and without a wildcard."""
        import torch
        from modelopt.torch.export import quant_aware_conversion
        from transformers import NemotronHForCausalLM

        if not hasattr(quant_aware_conversion, _FUNCTION):
            return ProbeResult(Status.NOT_NEEDED, f"this ModelOpt has no {_FUNCTION}")
        with torch.device("meta"):
            model = NemotronHForCausalLM(nemotron_h_config("moe"))
        mapper = quant_aware_conversion.build_reverse_name_mapper(model)
        expected = {
            "lm_head": "lm_head",
            "model.layers.0.mixer.gate": "backbone.layers.0.mixer.gate",
            "model.layers.0.mixer.experts*": "backbone.layers.0.mixer.experts*",
            "model.layers.0.*": "backbone.layers.0.*",
        }
        for name, right in expected.items():
            if (found := mapper(name)) != right:
                return ProbeResult(Status.NEEDED, f"{name} becomes {found!r}")
        return self.absent("names are translated without a remainder")

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """Every module that holds the function under its own name."""
        for user in _USERS:
            module = importlib.import_module(f"modelopt.torch.export.{user}")
            if hasattr(module, _FUNCTION):
                yield module, _FUNCTION, _cut


def _cut(original: Around, model: Any) -> Any:
    mapper = original(model)
    return None if mapper is None else lambda name: _SENTINEL.sub("", mapper(name))


register(ModelOptNameSentinel())
