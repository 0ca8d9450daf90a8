"""Loading and saving change the dtypes of Nemotron-H's state space parameters and router biases."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch
from qat.patches.tiny import nemotron_h_config, scratch

if TYPE_CHECKING:
    from pathlib import Path

    import torch

# The group is what the names on disk (backbone.…) and in memory (model.…) have in common.
_SPECIAL = re.compile(r"(?:backbone|model)\.(layers\.\d+\.mixer\.(?:A_log|D|dt_bias|gate\.e_score_correction_bias))")
# On the model, so that it goes where the model goes (adapters merged in, copies).
_STORED = "_qat_stored_dtypes"


class NemotronHSpecialDtypes(ReplacingPatch):
    """Loads `A_log`, `D` and `dt_bias` no narrower than they are stored and saves all four as they were stored.

    What changes them, seen with Transformers 5.19, PEFT 0.21.2 and ModelOpt 0.47:

    - `from_pretrained(dtype=bfloat16)` and `"auto"` round a float32 `A_log`, `D` or `dt_bias` to bfloat16; vLLM
      computes exp(A_log) in float32 from what the checkpoint holds, so training and serving use different decays
      (`D` and `dt_bias` it holds in the model's dtype itself).
    - `from_pretrained` widens `e_score_correction_bias` to float32, and `save_pretrained` and ModelOpt's export write
      that; `from_config(dtype=bfloat16)` and `model.to(bfloat16)` make it bfloat16.
    - PEFT's `prepare_model_for_kbit_training` widens every parameter that is not quantized, these among them. Building
      an adapter and merging it change nothing.
    """

    name = "nemotron_h_special_dtypes"
    title = "A_log, D, dt_bias and e_score_correction_bias do not keep the base's dtypes from load to save"
    breaks = (
        "Silent: a float32 A_log, D or dt_bias is rounded to bfloat16 on loading, and the saved checkpoint differs "
        "from its base in tensors that were never trained."
    )
    upstream = "transformers/core_model_loading.py: convert_and_load_state_dict_in_model, dtype_plan"
    affects = "transformers 5.14 to 5.19"
    libraries = ("transformers",)
    place = Place.HERE
    repair = (
        "These tensors are loaded in their stored precision where it is higher, and saved in it (`qat export` copies "
        "the base's bytes). With other tools: compare the dtypes in the headers with the base's (`qat doctor --base`)."
    )

    def probe(self) -> ProbeResult:
        """Load and save a tiny Nemotron-H with float32 state space parameters and a bfloat16 router bias."""
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import NemotronHForCausalLM

        with scratch() as folder:
            model = NemotronHForCausalLM(nemotron_h_config("linear_attention", "moe")).to(torch.bfloat16)
            model.save_pretrained(folder)
            base = load_file(folder / "model.safetensors")
            for name in filter(_SPECIAL.fullmatch, base):
                if not name.endswith("e_score_correction_bias"):
                    base[name] = torch.rand(base[name].shape)
            save_file(base, folder / "model.safetensors", metadata={"format": "pt"})
            loaded = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            loaded.save_pretrained(folder / "again")
            saved = load_file(folder / "again" / "model.safetensors")
        changed = [
            f"{name.rpartition('.')[2]} {base[name].dtype} becomes {saved[name].dtype}"
            for name in sorted(filter(_SPECIAL.fullmatch, base))
            if saved[name].dtype != base[name].dtype or not torch.equal(saved[name], base[name])
        ]
        if changed:
            return ProbeResult(Status.NEEDED, "; ".join(changed).replace("torch.", ""))
        return self.absent("all four come out of loading and saving as they were")

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """Note the stored dtypes on loading; use them there and on saving."""
        from transformers import PreTrainedModel, modeling_utils

        yield PreTrainedModel, "_load_pretrained_model", _load
        # The one step of saving that ModelOpt's export does not switch off.
        yield modeling_utils, "remove_tied_weights_from_state_dict", _save


def _load(original: Around, model: Any, tensors: Any, files: list[Path] | None, settings: Any, *rest: Any) -> Any:
    if model.config.model_type == "nemotron_h":
        stored = _stored_dtypes(tensors, files)
        setattr(model, _STORED, stored)
        for name, dtype in stored.items():
            if dtype.itemsize > settings.dtype.itemsize:
                settings.dtype_plan[f"{name}$"] = dtype
    return original(model, tensors, files, settings, *rest)


def _stored_dtypes(tensors: Any, files: list[Path] | None) -> dict[str, torch.dtype]:
    """The special tensors' dtypes, from given tensors or from safetensors' headers, by the names' common part."""
    from safetensors import safe_open

    if tensors:
        found = {name: tensor.dtype for name, tensor in tensors.items() if _SPECIAL.fullmatch(name)}
    else:
        found = {}
        for path in files or ():
            if not str(path).endswith(".safetensors"):
                continue
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name).dtype for name in filter(_SPECIAL.fullmatch, file.keys())}
    return {_SPECIAL.sub(r"\1", name): dtype for name, dtype in found.items()}


def _save(original: Around, tensors: dict[str, Any], model: Any) -> dict[str, Any]:
    stored = getattr(model, _STORED, {})
    cast = dict(tensors)
    for name in filter(_SPECIAL.fullmatch, tensors):
        cast[name] = tensors[name].to(stored.get(_SPECIAL.sub(r"\1", name), tensors[name].dtype))
    kept: dict[str, Any] = original(cast, model)
    return kept


register(NemotronHSpecialDtypes())
