"""Transformers writes infinite numbers of a configuration as objects."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch
from qat.patches.tiny import nemotron_h_config, scratch


class TransformersFloatTags(ReplacingPatch):
    """Writes `Infinity`, as every published Nemotron-H configuration does, instead of `{"__float__": "Infinity"}`.

    Neither form is standard JSON's: `Infinity` is refused by strict parsers but is a number to every Python program;
    the object is read by everybody and is a number to Transformers 5 only. What trains and serves these models is
    Python.
    """

    name = "transformers_float_tags"
    title = 'save_pretrained writes time_step_limit as [0.0, {"__float__": "Infinity"}]'
    breaks = (
        "Silent when saving. Whatever reads config.json without Transformers 5 gets a dict for a number: remote code "
        'fails with "TypeError: clamp() received an invalid combination of arguments".'
    )
    upstream = "transformers/configuration_utils.py: PreTrainedConfig._encode_special_floats"
    affects = "transformers >=5.0, 5.14 to 5.19 seen"
    libraries = ("transformers",)
    place = Place.HERE
    repair = (
        "config.json gets the number in the base's own form (`qat export` copies the base's text). With other tools: "
        "put the field of the base's config.json back; null instead is refused by Transformers 5."
    )

    def probe(self) -> ProbeResult:
        """Save Nemotron-H's configuration and read it as any Python program does."""
        with scratch() as folder:
            nemotron_h_config("linear_attention", time_step_limit=[0.0, float("inf")]).save_pretrained(folder)
            limit = json.loads((folder / "config.json").read_text(encoding="utf-8"))["time_step_limit"]
        if limit == [0.0, float("inf")]:
            return self.absent(f"time_step_limit is read back as {limit}")
        return ProbeResult(Status.NEEDED, f"time_step_limit is read back as {limit}")

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """Leave numbers to Python's own JSON writer."""
        from transformers import PreTrainedConfig

        yield PreTrainedConfig, "_encode_special_floats", _as_it_is


def _as_it_is(_original: Around, _cls: type, value: Any) -> Any:
    return value


register(TransformersFloatTags())
