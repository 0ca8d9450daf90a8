"""The JSON files of an exported checkpoint: what ModelOpt 0.47 writes for NVFP4 and vLLM 0.32 reads.

`config.json` keeps every field of the base and gains `quantization_config` (compressed-tensors' shape, as
`modelopt/torch/export/convert_hf_config.py` gives it); `hf_quant_config.json` is ModelOpt's own form of the same facts.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.export.merge import Module
from qat.export.shards import TensorEntry
from qat.quant.names import sharing_groups
from qat.quant.nvfp4 import BLOCK
from qat.quant.presets import FP8, NVFP4, W4A16

#: ModelOpt's name of each of our formats (`quant_algo`).
ALGORITHMS = {NVFP4: "NVFP4", W4A16: "W4A16_NVFP4", FP8: "FP8"}

#: The release whose checkpoint format is written; readers look at the producer to choose a parser.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}

#: Everything beside the weights that a server or a tokenizer reads. Copied byte for byte.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)


_TEMPLATE_PLACES = (
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "tokenizer_config.json",
)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's `config.json`.

    Bare `Infinity`, which old configurations hold, is accepted and written back as it was.

    Raises:
        UserError: Missing, no JSON object, without `architectures`, or of a checkpoint that is quantized already.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("The checkpoint has no config.json.", where=str(folder)) from None
    except ValueError as error:
        raise UserError("config.json is not valid JSON.", where=str(path), value=str(error)) from error
    if not isinstance(config, dict) or not config.get("architectures") or not config.get("model_type"):
        raise UserError(
            "config.json lacks `architectures` or `model_type`, so no server can load the export.", where=str(path)
        )
    if "quantization_config" in config or (folder / "hf_quant_config.json").exists():
        raise UserError(
            "The base checkpoint is quantized already.",
            where=str(path),
            remedy="Give the BF16 checkpoint that it was made from.",
        )
    return config


def dump_json(content: Mapping[str, Any]) -> str:
    """Encode as every JSON file of an export is: two spaces, keys in the given order, one closing newline."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def exclude_modules(
    entries: Mapping[str, TensorEntry], modules: Mapping[str, Module], packed: Collection[str]
) -> list[str]:
    """List the modules that stay unquantized, in the form that vLLM matches against its own module names.

    Every weight of two or more dimensions that is not packed is named (embeddings, router and conv1d among them, as
    ModelOpt does). vLLM asks for all routed experts of a layer at once, so these are named `….experts*`.

    Args:
        entries: The base's tensors.
        modules: The base's modules.
        packed: Names of the modules that are packed.

    Returns:
        Sorted names and patterns; `lm_head` is always among them unless it is packed (a tied head has no tensor).

    Raises:
        UserError: vLLM cannot represent the choice: a fused group or the experts of a layer are packed in part, or a
            name of the list would, as a substring, also exclude a packed module.
    """
    names: set[str] = set() if "lm_head" in packed else {"lm_head"}
    for group in (*sharing_groups(modules), *_experts_by_layer(modules)):
        chosen = [name for name in group if name in packed]
        if chosen and len(chosen) < len(group):
            raise UserError(
                "Weights that the server computes as one are to be quantized only in part.",
                where=", ".join(group),
                value=", ".join(chosen),
                remedy="Quantize all of them or none.",
            )
    for name, module in modules.items():
        if name not in packed:
            names.add(f"{name.rpartition('.')[0]}*" if module.is_experts else name)
    known = {tensor for module in modules.values() for tensor in module.tensors}
    for tensor, entry in entries.items():
        if tensor.endswith(".weight") and len(entry.shape) > 2 and tensor not in known:
            names.add(tensor.removesuffix(".weight"))
    for name in sorted(packed):
        asked = name.rpartition(".")[0] if modules[name].is_experts else name
        if (pattern := excluding_pattern(asked, names)) is not None:
            raise UserError("A packed module would be excluded by the name of another.", where=name, value=pattern)
    return sorted(names)


def excluding_pattern(prefix: str, patterns: Iterable[str]) -> str | None:
    """Tell which pattern excludes a module, by vLLM's rules (`ModelOptQuantConfigBase.is_layer_excluded`).

    Args:
        prefix: The module's name.
        patterns: Names, or names with `*`; `name*` counts as `name` and `name.*`; a name matches as a substring too.
    """
    for pattern in patterns:
        stem = pattern.removesuffix("*") if pattern.endswith("*") and not pattern.endswith(".*") else pattern
        if stem in prefix or fnmatch.fnmatchcase(prefix, stem):
            return pattern
    return None


def quantization_files(
    config: Mapping[str, Any], excluded: list[str], kv_cache: str, layers: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Make `config.json` and `hf_quant_config.json` of a quantized checkpoint.

    Args:
        config: The base's `config.json`; every field is kept.
        excluded: From `exclude_modules`.
        kv_cache: `bf16` or `fp8` (E4M3 with the static scale 1.0, which vLLM takes where the checkpoint has none).
        layers: Format of each packed module by its name on disk, where they are not all NVFP4: ModelOpt's
            `MIXED_PRECISION`.

    Returns:
        File name to content.
    """
    if kv_cache not in ("bf16", "fp8"):
        raise UserError("Unknown format of the KV cache.", value=kv_cache, remedy="bf16 or fp8")
    mixed = _mixed_layers(layers or {})
    algorithm = "MIXED_PRECISION" if mixed else "NVFP4"
    groups = _groups(layers or {}) if mixed else {"group_0": {**_group(NVFP4), "targets": ["Linear"]}}
    quantization: dict[str, Any] = {"config_groups": groups, **mixed, "ignore": excluded, "quant_algo": algorithm}
    if kv_cache == "fp8":
        quantization["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    quantization |= {"producer": PRODUCER, "quant_method": "modelopt"}
    own_form = {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": "FP8" if kv_cache == "fp8" else None,
            **(mixed or {"group_size": BLOCK}),
            "exclude_modules": excluded,
        },
    }
    return {
        "config.json": dump_json({**config, "quantization_config": quantization}),
        "hf_quant_config.json": dump_json(own_form),
    }


def _mixed_layers(layers: Mapping[str, str]) -> dict[str, Any]:
    """`quantized_layers` as ModelOpt writes it; empty where everything is NVFP4."""
    if set(layers.values()) <= {NVFP4}:
        return {}
    block = {"group_size": BLOCK}
    return {
        "quantized_layers": {
            name: {"quant_algo": ALGORITHMS[kind], **(block if kind != FP8 else {})}
            for name, kind in sorted(layers.items())
        }
    }


def _groups(layers: Mapping[str, str]) -> dict[str, Any]:
    """One config group for each format, in compressed-tensors' shape, in the order in which names bring them up."""
    kinds = dict.fromkeys(kind for _, kind in sorted(layers.items()))
    return {
        f"group_{index}": {**_group(kind), "targets": sorted(name for name in layers if layers[name] == kind)}
        for index, kind in enumerate(kinds)
    }


def _group(kind: str) -> dict[str, Any]:
    """`_quant_algo_to_group_config` of ModelOpt's `convert_hf_config.py`."""
    eight_bits = {"dynamic": False, "num_bits": 8, "type": "float"}
    four_bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    bits = eight_bits if kind == FP8 else four_bits
    inputs = {} if kind == W4A16 else {"input_activations": bits}
    return {**inputs, "weights": dict(bits)}


def copy_companions(base: Path, out: Path, *, own_template: bool = False) -> list[str]:
    """Copy tokenizer, chat template and generation settings byte for byte; the names relative to `out`, sorted.

    Args:
        base: The checkpoint.
        out: The export.
        own_template: The export carries a chat template of its own: what `template_files` replaces is left out.
    """
    found = sorted({path for pattern in COMPANION_FILES for path in base.glob(pattern) if path.is_file()})
    names = [path.relative_to(base) for path in found]
    if own_template:
        names = [name for name in names if name.parts[0] not in _TEMPLATE_PLACES]
    for name in names:
        target = out / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(base / name, target)
    return [str(name) for name in names]


def template_files(base: Path, template: Path) -> dict[str, bytes]:
    """Make the files through which an export carries another chat template than its base's.

    The template stands in `chat_template.jinja` alone: readers differ in which place they look at first, and a
    tokenizer that kept named templates beside it would take one of those for conversations with tools.

    Returns:
        File name to content: the template, and the tokenizer's configuration without one.

    Raises:
        UserError: The template cannot be read or is empty, or the base's `tokenizer_config.json` is no JSON object.
    """
    try:
        files = {"chat_template.jinja": template.read_bytes()}
        text = files["chat_template.jinja"].decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("The chat template cannot be read.", where=str(template), value=str(error)) from error
    if not text.strip():
        raise UserError("The chat template is empty.", where=str(template))
    path = base / "tokenizer_config.json"
    if path.is_file():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError("The tokenizer's configuration is no JSON.", where=str(path), value=str(error)) from error
        if not isinstance(settings, dict):
            raise UserError("The tokenizer's configuration is no JSON object.", where=str(path))
        inside = settings.pop("chat_template", None) is not None
        files[path.name] = dump_json(settings).encode() if inside else path.read_bytes()
    return files


def _experts_by_layer(modules: Mapping[str, Module]) -> list[list[str]]:
    layers: dict[str, list[str]] = {}
    for name, module in modules.items():
        if module.is_experts:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
    return list(layers.values())
