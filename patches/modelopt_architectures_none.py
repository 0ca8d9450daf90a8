"""ModelOpt's export looks into `config.architectures`, which a model that was never loaded does not have."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch

_FUNCTION = "is_multimodal_model"


class ModelOptArchitecturesNone(ReplacingPatch):
    """Names the model's class in `config.architectures` where nobody has, as `save_pretrained` does anyway."""

    name = "modelopt_architectures_none"
    title = "ModelOpt cannot export a model whose config.architectures is None"
    breaks = "\"TypeError: 'NoneType' object is not iterable\" in export_hf_checkpoint of a model made by from_config"
    upstream = "modelopt/torch/export/model_utils.py: is_multimodal_model"
    affects = "nvidia-modelopt 0.47"
    libraries = ("nvidia-modelopt",)
    place = Place.HERE
    repair = (
        "config.architectures is set to the model's class before the export looks. With other tools: "
        "model.config.architectures = [type(model).__name__], or load the model with from_pretrained first. A "
        "checkpoint without the field cannot be served: vLLM chooses the model class by it."
    )

    def probe(self) -> ProbeResult:
        """Ask ModelOpt whether a model without the field is multimodal."""
        from modelopt.torch.export import model_utils

        if not hasattr(model_utils, _FUNCTION):
            return ProbeResult(Status.NOT_NEEDED, f"this ModelOpt has no {_FUNCTION}")
        model = SimpleNamespace(config=SimpleNamespace(architectures=None))
        try:
            model_utils.is_multimodal_model(model)
        except TypeError as error:
            return ProbeResult(Status.NEEDED, f"TypeError: {error}")
        return self.absent("a model without config.architectures is accepted")

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """The function where it is defined and where the export has imported it."""
        from modelopt.torch.export import model_utils, unified_export_hf

        for module in (model_utils, unified_export_hf):
            if hasattr(module, _FUNCTION):
                yield module, _FUNCTION, _with_architectures


def _with_architectures(original: Around, model: Any) -> Any:
    if model.config.architectures is None:
        model.config.architectures = [type(model).__name__]
    return original(model)


register(ModelOptArchitecturesNone())
