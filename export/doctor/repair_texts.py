"""The small files of a checkpoint, mended: config.json, the quantization's configuration, tokenizer and template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from qat.export.config import dump_json
from qat.export.doctor.checks_tensors import compare_names, reference_of
from qat.export.doctor.config_fields import CONFIG, differences
from qat.export.doctor.findings import Severity, examples
from qat.export.doctor.folder import CHAT_TEMPLATE, CheckpointView
from qat.export.doctor.precision import QUANT_CONFIG
from qat.export.doctor.renames import fits

ARCHITECTURES = {
    "nemotron_h": "NemotronHForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKENIZER = (*_VOCABULARIES, "merges.txt", "tokenizer_config.json")
_TOKENIZER_BESIDE = ("special_tokens_map.json", "added_tokens.json")
_OTHERS = ("generation_config.json", "preprocessor_config.json", "processor_config.json")


class Mended(NamedTuple):
    """New content of a file, and what changed in one line."""

    content: bytes
    what: str


def mended_texts(view: CheckpointView, base: CheckpointView | None) -> dict[str, Mended]:
    """Mend what the base or the checkpoint itself tells; files that stay as they are are not among the results."""
    config, what = _mended_config(view, base)
    mended = {CONFIG: Mended(dump_json(config).encode(), "; ".join(what))} if config is not None and what else {}
    if view.hf_quant_config is not None:
        cut = _without_sentinels(view.hf_quant_config)
        if cut != view.hf_quant_config:
            mended[QUANT_CONFIG] = Mended(dump_json(cut).encode(), "names of excluded modules cut at the sentinel")
    for name, content in _from_base(view, base).items() if base is not None else ():
        mended[name] = Mended(content, "copied from the base")
    return mended


def _mended_config(view: CheckpointView, base: CheckpointView | None) -> tuple[dict[str, Any] | None, list[str]]:
    config, what = view.config, []
    if base is not None and base.config is not None and _describes(base, view):
        differing = [
            finding.place.removeprefix(f"{CONFIG}: ")
            for finding in (differences(config, base.config) if config is not None else ())
            if finding.severity is not Severity.NOTE
        ]
        lost = config is not None and not config.get("architectures") and base.config.get("architectures")
        if config is None or differing or lost:
            own = {key: (config or {})[key] for key in ("quantization_config", "auto_map") if key in (config or {})}
            kept = {key: value for key, value in base.config.items() if key not in ("quantization_config", "auto_map")}
            fields = [*differing, *(["architectures"] if lost else [])]
            what.append(f"fields of the base: {examples(fields)}" if config is not None else "the base's")
            config = kept | own
    if config is None:
        return None, []
    if not config.get("architectures") and (name := ARCHITECTURES.get(str(config.get("model_type")))):
        config = {**config, "architectures": [name]}
        what.append(f"architectures: {name}")
    cut = _without_sentinels(config.get("quantization_config"))
    if cut != config.get("quantization_config"):
        config = {**config, "quantization_config": cut}
        what.append("names of excluded modules cut at the sentinel")
    return config, what


def _describes(base: CheckpointView, view: CheckpointView) -> bool:
    """Whether the base's configuration fits the checkpoint: the same tensors in the same shapes.

    Where they differ, training may have changed the network (a grown vocabulary), and the fields are left alone.
    """
    if not view.tensors or not base.tensors or not view.whole:
        return False
    reference = reference_of(view, base)
    difference = compare_names(view, reference)
    now = {difference.renames.get(name, name): tensor for name, tensor in view.tensors.items()}
    return (
        not difference.missing
        and not difference.extra
        and all(fits(now[name], expected) for name, expected in reference.tensors.items() if name in now)
    )


def _without_sentinels(value: Any) -> Any:
    """Cut names at the NUL that an unfinished renaming of ModelOpt's leaves behind the name proper."""
    if isinstance(value, str):
        return value.partition("\0")[0].removesuffix(".") if "\0" in value else value
    if isinstance(value, Mapping):
        return {_without_sentinels(key): _without_sentinels(inner) for key, inner in value.items()}
    if isinstance(value, list):
        cut = [_without_sentinels(inner) for inner in value]
        return list(dict.fromkeys(cut)) if cut != value and all(isinstance(inner, str) for inner in cut) else cut
    return value


def _from_base(view: CheckpointView, base: CheckpointView) -> dict[str, bytes]:
    """Files that the checkpoint lacks or that cannot be read, from the base; what is there and readable stays."""
    for name in (*_TOKENIZER, *_TOKENIZER_BESIDE, *_OTHERS):
        if name.endswith(".json"):
            view.read_json(name)
    unusable = {finding.place for finding in view.findings if finding.severity is Severity.ERROR}
    usable = view.files - unusable
    wanted = {name for name in (*_TOKENIZER, *_TOKENIZER_BESIDE) if name in unusable}
    wanted |= {name for name in _OTHERS if name not in usable}
    if not usable & set(_VOCABULARIES):
        wanted |= {*_TOKENIZER, *_TOKENIZER_BESIDE}
    content = {name: raw for name in sorted(wanted) if (raw := base.read_bytes(name)) is not None}
    own_template = usable & {CHAT_TEMPLATE, "chat_template.json"} or "chat_template" in (view.tokenizer_config or {})
    template = base.chat_template or (base.tokenizer_config or {}).get("chat_template")
    if not own_template and isinstance(template, str):
        content[CHAT_TEMPLATE] = template.encode()
    return content
