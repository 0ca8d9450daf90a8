"""Transformers 5 saves Nemotron-H's configuration without the fields that other programs read the layers from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch
from qat.patches.tiny import nemotron_h_config, scratch


class NemotronHLayerPattern(ReplacingPatch):
    """Writes `hybrid_override_pattern` and `num_hidden_layers` beside `layers_block_type`.

    Both are properties in Transformers 5, derived from the list, and properties are not saved.
    """

    name = "nemotron_h_layer_pattern"
    title = "save_pretrained drops hybrid_override_pattern and num_hidden_layers of Nemotron-H"
    breaks = (
        "Silent when saving. Code from before Transformers 5, the hub's configuration_nemotron_h.py among it, takes "
        "its default pattern of 52 layers without experts instead: missing and unexpected tensors."
    )
    upstream = "transformers/models/nemotron_h/configuration_nemotron_h.py: num_hidden_layers, hybrid_override_pattern"
    affects = "transformers >=5.3, 5.14 to 5.19 seen"
    libraries = ("transformers",)
    place = Place.HERE
    repair = (
        "Both fields are written again; Transformers 5 reads them without complaint (`qat export` copies the base's "
        "config.json). With other tools: put them back into config.json, one letter a layer: M Mamba, E experts, "
        "* attention, - MLP."
    )

    def probe(self) -> ProbeResult:
        """Save a configuration of three layers and look for the fields."""
        with scratch() as folder:
            nemotron_h_config("linear_attention", "moe", "full_attention").save_pretrained(folder)
            saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        fields = {name: saved.get(name) for name in ("hybrid_override_pattern", "num_hidden_layers")}
        if fields == {"hybrid_override_pattern": "ME*", "num_hidden_layers": 3}:
            return self.absent("saved with the pattern ME* and the number of layers 3")
        missing = [name for name, value in fields.items() if value is None]
        return ProbeResult(Status.NEEDED, f"saved without {' and '.join(missing)}" if missing else f"saved {fields}")

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """Add the fields to what is written."""
        from transformers import NemotronHConfig

        yield NemotronHConfig, "to_dict", _with_pattern


def _with_pattern(original: Around, config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = original(config)
    return fields | {
        "hybrid_override_pattern": config.hybrid_override_pattern,
        "num_hidden_layers": config.num_hidden_layers,
    }


register(NemotronHLayerPattern())
