"""PEFT LoRA adapters, read from their files alone: no model is built and no PEFT class is needed.

Layouts (PEFT 0.21, `tuners/lora/layer.py`): a linear has `lora_A` (rank, in) and `lora_B` (out, rank). A fused expert
parameter, adapted through `target_parameters`, has `lora_A` (experts * rank, in) and `lora_B` (out, rank * experts),
cut apart by `qat.quant.effective.expert_factors`. Several parameters of one module are nested wrappers, so their keys
name the depth and not the parameter: the parameter that the module registers last is outermost
(`BaseTuner._inject_parameters`), every earlier one lies one `base_layer` deeper.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qat.errors import UserError
from qat.export.merge import LowRank, Module
from qat.export.shards import TensorEntry, file_sha256, read_header, read_tensor
from qat.quant.effective import expert_factors
from qat.quant.names import checkpoint_name

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
SIDECAR_NAME = "qat_adapter.json"

#: The expert parameters in the order in which Transformers' modules register them.
EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")

_KEY = re.compile(r"base_model\.model\.(?P<module>.+?)(?P<depth>(?:\.base_layer)*)\.lora_(?P<side>[AB])\.weight")
# Other initializations (PiSSA, OLoRA, LoftQ, …) change the base weights that the adapter is then relative to.
_PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva")
_PLAIN_SETTINGS: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "init_lora_weights": _PLAIN_INITIALIZATIONS,
}


class Factors(NamedTuple):
    """Where the two factors of one module lie; read when the module's turn comes, so that memory holds one module.

    Attributes:
        a: `lora_A` on disk.
        b: `lora_B` on disk.
        experts: Number of experts, None for a linear.
        scale: alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA.
    """

    a: TensorEntry
    b: TensorEntry
    experts: int | None
    scale: float

    def load(self) -> LowRank:
        """Read the factors and give them the shapes of `qat.quant.effective.effective_weight`."""
        a, b = read_tensor(self.a), read_tensor(self.b)
        if self.experts is not None:
            a, b = expert_factors(a, b, self.experts)
        return LowRank(a, b, self.scale)


class Adapter(NamedTuple):
    """One adapter, by the checkpoint's module names.

    Attributes:
        factors: What it adds to each module.
        sha256: Of its weight file.
        base_sha256: The base it was trained on; None where the adapter does not say.
        parent_sha256: The adapter it was trained on top of; None where it stands on the base or does not say.
        packed: Modules of the base that were kept in NVFP4 while it was trained.
    """

    factors: dict[str, Factors]
    sha256: str
    base_sha256: str | None
    parent_sha256: str | None
    packed: tuple[str, ...] = ()


def read_adapter(folder: Path, modules: Mapping[str, Module], model_type: str) -> Adapter:
    """Read a PEFT LoRA adapter's headers and fit them to a base checkpoint's modules.

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
        modules: The base's modules (`merge.find_modules`).
        model_type: The base's, from `config.json`: module names in memory and on disk differ by it.

    Returns:
        The adapter; factors keep the file's dtype (float32 as training saves them).

    Raises:
        UserError: A file is missing or damaged, the adapter is no plain LoRA, or a key or shape fits no module of the
            base.
    """
    config = _read_json(folder / CONFIG_NAME)
    weights = folder / WEIGHTS_NAME
    _require_plain_lora(config, folder)
    found: dict[tuple[str, int], dict[str, TensorEntry]] = {}
    for key, entry in read_header(weights).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise _unmatched(folder, key, "it is no LoRA factor of a linear or of an expert parameter")
        found.setdefault((match["module"], match["depth"].count(".base_layer")), {})[match["side"]] = entry
    if not found:
        raise UserError("The adapter holds no LoRA factors.", where=str(weights))
    factors: dict[str, Factors] = {}
    for (path, depth), sides in found.items():
        if set(sides) != {"A", "B"}:
            raise _unmatched(folder, path, f"it has lora_{''.join(sides)} alone")
        depths = [other_depth for other, other_depth in found if other == path]
        if sorted(depths) != list(range(len(depths))):
            raise _unmatched(folder, path, "a level of nested factors is missing")
        in_module = [name for name in EXPERT_PARAMETERS if checkpoint_name(f"{path}.{name}", model_type) in modules]
        parameter = _parameter_path(path, in_module, depth, len(depths), config, folder)
        module = modules.get(checkpoint_name(parameter, model_type))
        if module is None:
            raise _unmatched(folder, parameter, "the base has no such module")
        factors[module.name] = _factors(sides["A"], sides["B"], module, parameter, config, folder)
    sidecar = folder / SIDECAR_NAME
    origin = _read_json(sidecar) if sidecar.is_file() else {}
    packed = tuple(origin.get("packed") or ())
    unknown = [name for name in packed if name not in modules]
    if unknown:
        raise _unmatched(folder, unknown[0], "it was trained on a base that has this module packed")
    return Adapter(factors, file_sha256(weights), origin.get("base_sha256"), origin.get("parent_sha256"), packed)


def packed_below(adapters: Sequence[Adapter], folders: Sequence[Path]) -> tuple[str, ...]:
    """The modules that all adapters agree were packed in the base they were trained on.

    Raises:
        UserError: Some were trained on a packed base and others on another one.
    """
    packed = adapters[0].packed if adapters else ()
    for adapter, folder in zip(adapters, folders, strict=True):
        if set(adapter.packed) != set(packed):
            raise UserError(
                "The adapters were trained on different forms of the base.",
                where=str(folder),
                value=f"{len(adapter.packed)} modules of the base in NVFP4, {len(packed)} below {folders[0]}",
                remedy="Give adapters of one run: an adapter fits the packed or the unpacked base, never both.",
            )
    return packed


def _parameter_path(
    path: str, in_module: Sequence[str], depth: int, levels: int, config: Mapping[str, Any], folder: Path
) -> str:
    """Name the adapted weight in memory: the module itself, or the expert parameter at this depth of nesting."""
    if not in_module:
        if depth:
            raise _unmatched(folder, path, "a linear cannot be wrapped twice")
        return path
    targets = config.get("target_parameters") or []
    names = [f"{path}.{parameter}" for parameter in in_module]
    adapted = [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]
    if levels != len(adapted):
        raise _unmatched(folder, path, f"{levels} levels of factors for target_parameters {sorted(targets)}")
    return adapted[-1 - depth]


def _factors(
    a: TensorEntry, b: TensorEntry, module: Module, parameter: str, config: Mapping[str, Any], folder: Path
) -> Factors:
    """Check the factors' shapes against the module and compute the scale as PEFT does (`LoraLayer.update_layer`)."""
    experts = module.shape[0] if module.is_experts else None
    columns = a.shape[0] if len(a.shape) == 2 else 0
    rank = columns // (experts or 1)
    out_features, in_features = module.shape[-2:]
    if rank == 0 or a.shape != (rank * (experts or 1), in_features) or b.shape != (out_features, columns):
        raise UserError(
            "The adapter does not fit the base: the shapes of its factors do not match the weight.",
            where=f"{folder}: {module.name}",
            value=f"weight {module.shape}, lora_A {a.shape}, lora_B {b.shape}",
            remedy="Give the base checkpoint that the adapter was trained on.",
        )
    expected = _pattern(config, "rank_pattern", parameter, config.get("r"))
    if rank != expected:
        raise UserError(
            "The adapter's rank is not the one its configuration names.",
            where=f"{folder / CONFIG_NAME}: {module.name}",
            value=f"{rank} in the factors, {expected!r} in the configuration",
        )
    alpha = _pattern(config, "alpha_pattern", parameter, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UserError("The adapter's lora_alpha is no number.", where=str(folder / CONFIG_NAME), value=alpha)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Factors(a, b, experts, scale)


def _pattern(config: Mapping[str, Any], name: str, parameter: str, default: object) -> object:
    """Look a per-module value up as PEFT does (`peft.utils.other.get_pattern_key`): the first pattern that matches."""
    for pattern, value in (config.get(name) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", parameter):
            return value
    return default


def _require_plain_lora(config: Mapping[str, Any], folder: Path) -> None:
    for name, allowed in _PLAIN_SETTINGS.items():
        value = config.get(name, allowed[0])
        if not any(value == entry and type(value) is type(entry) for entry in allowed):
            raise UserError(
                f"The adapter is no plain LoRA: its {name} is not supported by the export.",
                where=str(folder / CONFIG_NAME),
                value=value,
                remedy=f"Train with {name} = {allowed[0]!r}.",
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("A file of the adapter is missing.", where=str(path)) from None
    except ValueError as error:
        raise UserError("A file of the adapter is not valid JSON.", where=str(path), value=str(error)) from error
    if not isinstance(content, dict):
        raise UserError("A file of the adapter is no JSON object.", where=str(path))
    return content


def _unmatched(folder: Path, key: str, reason: str) -> UserError:
    return UserError(
        f"A key of the adapter matches nothing that can be merged: {reason}.",
        where=str(folder / WEIGHTS_NAME),
        value=key,
        remedy="Give the base checkpoint that the adapter was trained on; only plain LoRA factors are merged.",
    )
