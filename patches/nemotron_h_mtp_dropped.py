"""Transformers drops Nemotron-H's multi-token prediction layers and leaves the configuration that announces them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch
from qat.patches.tiny import nemotron_h_config, scratch, tensor_names

_PREFIX = "mtp."
# On the model, so that it goes where the model goes (adapters merged in, copies).
_FILES = "_qat_mtp_files"


class NemotronHMtpDropped(ReplacingPatch):
    """Writes the tensors `mtp.*` of the checkpoint that a model was loaded from into the one it is saved to.

    Transformers has no such layers for Nemotron-H: it skips the tensors when loading, by a list of names that are not
    reported. The base's files are read again when saving and must still be there.
    """

    name = "nemotron_h_mtp_dropped"
    title = "Loading and saving loses Nemotron-H's multi-token prediction layers (mtp.*)"
    breaks = (
        "Silent: num_nextn_predict_layers stays in config.json and the tensors are gone, so that speculative decoding "
        "finds no weights for its draft layers."
    )
    upstream = "transformers/models/nemotron_h/modeling_nemotron_h.py: _keys_to_ignore_on_load_unexpected = [r'mtp.*']"
    affects = "transformers >=5.3, 5.19 seen, with Nemotron-3-Super and Nemotron-3.5-Lightning"
    libraries = ("transformers",)
    place = Place.HERE
    repair = (
        "The tensors are copied from the base when the model is saved (`qat export` copies every tensor that it does "
        "not change). With other tools: copy the base's mtp.* tensors over, or set num_nextn_predict_layers to 0."
    )

    def probe(self) -> ProbeResult:
        """Load and save a checkpoint that has one tensor of such a layer."""
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import NemotronHForCausalLM

        name = "mtp.layers.0.eh_proj.weight"
        with scratch() as folder:
            NemotronHForCausalLM(nemotron_h_config("mlp", num_nextn_predict_layers=1)).save_pretrained(folder)
            tensors = load_file(folder / "model.safetensors") | {name: torch.ones(2, 2)}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            NemotronHForCausalLM.from_pretrained(folder).save_pretrained(folder / "again")
            kept = name in tensor_names(folder / "again")
        if kept:
            return self.absent(f"{name} is in the saved checkpoint")
        return ProbeResult(Status.NEEDED, f"{name} is not in the saved checkpoint, num_nextn_predict_layers is")

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """Note where the tensors lie on loading; fetch them on saving."""
        from transformers import PreTrainedModel, modeling_utils

        yield PreTrainedModel, "_load_pretrained_model", _load
        # The one step of saving that ModelOpt's export does not switch off.
        yield modeling_utils, "remove_tied_weights_from_state_dict", _save


def _load(original: Around, model: Any, tensors: Any, files: list[str] | None, *rest: Any) -> Any:
    if model.config.model_type == "nemotron_h":
        setattr(model, _FILES, [Path(path).resolve() for path in files or () if path.endswith(".safetensors")])
    return original(model, tensors, files, *rest)


def _save(original: Around, tensors: dict[str, Any], model: Any) -> dict[str, Any]:
    from safetensors import safe_open

    kept: dict[str, Any] = original(tensors, model)
    for path in getattr(model, _FILES, ()):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(_PREFIX)]  # noqa: SIM118 (no mapping)
            kept |= {name: file.get_tensor(name) for name in names}
    return kept


register(NemotronHMtpDropped())
