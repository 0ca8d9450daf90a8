"""LoRA adapters: from the recipe's block to PEFT, what they reach, and how they are kept.

PEFT's own `target_modules` never reaches fused experts (they are parameters, not modules) and says nothing of what it
missed. Here every kind of layer that the recipe names must match something, and the router never carries factors.

Forward: the model computes with `effective_weight` (one rounding to the weight's dtype), the very tensor that merging
    and export
write, so that a validation loss is the loss of the merged persona and not of a neighbour of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qat import __version__
from qat.errors import UserError
from qat.receipt import sha256_file
from qat.train.shapes import described

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from qat.recipe.schema import AdapterBlock

ADAPTER = "default"
SIDECAR = "qat_adapter.json"
WEIGHTS = "adapter_model.safetensors"


class Target(NamedTuple):
    """Where one kind of layer stands in a model.

    Attributes:
        modules: Regular expression of the linears' paths behind `layers.<n>.`; empty for none.
        parameters: Path endings of fused expert parameters (experts, out, in).
    """

    modules: str = ""
    parameters: tuple[str, ...] = ()


_GATED_MLP = r"mlp\.(gate|up|down)_proj"
_SELF_ATTENTION = r"self_attn\.(q|k|v|o)_proj"

TARGETS: dict[str, dict[str, Target]] = {
    "nemotron_h": {
        "attention": Target(r"mixer\.(q|k|v|o)_proj"),
        "mamba": Target(r"mixer\.(in|out)_proj"),
        "routed_experts": Target(parameters=("mixer.experts.up_proj", "mixer.experts.down_proj")),
        "shared_experts": Target(r"mixer\.shared_experts\.(up|down)_proj"),
        "mlp": Target(r"mixer\.(up|down)_proj"),
    },
    # Qwen3.5 alternates self-attention with gated delta nets; their two small gates (in_proj_a, in_proj_b) are left
    # alone.
    "qwen": {
        "attention": Target(rf"({_SELF_ATTENTION}|linear_attn\.(in_proj_qkvz|in_proj_qkv|in_proj_z|out_proj))"),
        "mlp": Target(_GATED_MLP),
        "routed_experts": Target(parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
        "shared_experts": Target(r"mlp\.shared_expert\.(gate|up|down)_proj"),
    },
    "llama": {"attention": Target(_SELF_ATTENTION), "mlp": Target(_GATED_MLP)},
}
"""Family of the recipe -> kind of layer -> where it stands."""


class Coverage(NamedTuple):
    """What an adapter reaches.

    Attributes:
        matched: Kind of layer -> number of adapted weights (a fused parameter of all experts of a layer counts as one).
        trainable: Trainable numbers.
        total: Numbers of the base.
        skipped: Linears and expert parameters without factors, by the last two parts of their path -> how many.
        router_frozen: Router parameters, none of which is trained.
    """

    matched: dict[str, int]
    trainable: int
    total: int
    skipped: dict[str, int]
    router_frozen: int

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return self._asdict()


def find_targets(model: PreTrainedModel, family: str, kinds: tuple[str, ...]) -> dict[str, list[str]]:
    """Find the weights that each kind of layer stands for.

    Args:
        model: The base, without adapter.
        family: Family of the recipe.
        kinds: Kinds that the recipe names.

    Returns:
        Kind -> paths of linears (without `.weight`) and of fused expert parameters.

    Raises:
        UserError: A kind is unknown to the family, or matches nothing in this model or less than its configuration
            describes (a library that fuses or renames a projection would else leave a smaller adapter).
    """
    import torch

    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    fused = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    found: dict[str, list[str]] = {}
    for kind in kinds:
        target = TARGETS[family].get(kind)
        if target is None:
            raise UserError(
                f"The family {family} has no such layers.",
                where="train.adapter.targets",
                value=kind,
                remedy=f"allowed: {', '.join(TARGETS[family])}",
            )
        pattern = _pattern(target)
        found[kind] = [name for name in linears if target.modules and re.fullmatch(pattern, name)]
        found[kind] += [name for name in fused if name.endswith(tuple(f".{ending}" for ending in target.parameters))]
        if not found[kind]:
            present = [
                other for other in TARGETS[family] if other != kind and _matches(TARGETS[family][other], linears, fused)
            ]
            raise UserError(
                f"The adapter target {kind!r} matches no layer of the base.",
                where="train.adapter.targets",
                value=kind,
                remedy=f"leave it out; this base has {', '.join(present) or 'none of the known kinds'}",
            )
        wanted = described(model.config.to_dict(), kind)
        if missing := sorted(wanted - set(found[kind])):
            raise UserError(
                f"The adapter target {kind!r} reaches {len(wanted) - len(missing)} of {len(wanted)} weights.",
                where=missing[0],
                value=kind,
                remedy="this version of transformers builds the base otherwise than its config.json says; take another",
            )
    return found


def _pattern(target: Target) -> str:
    return rf"(?:.*\.)?layers\.\d+\.{target.modules}"


def _matches(target: Target, linears: list[str], fused: list[str]) -> bool:
    if target.modules and any(re.fullmatch(_pattern(target), name) for name in linears):
        return True
    return any(name.endswith(f".{ending}") for name in fused for ending in target.parameters)


def attach_adapter(model: PreTrainedModel, block: AdapterBlock, family: str, seed: int) -> tuple[PeftModel, Coverage]:
    """Put fresh LoRA factors on a model.

    Args:
        model: The base or the merged persona; frozen here.
        block: Rank, alpha, dropout, targets.
        family: Family of the recipe.
        seed: Of the initial A factors (B starts at zero, so the model is unchanged at first).

    Returns:
        The PEFT model, factors in float32 and trainable, and what they reach.

    Raises:
        UserError: A target matches nothing, or less than the base's configuration describes.
        RuntimeError: PEFT reached other weights than the recipe's targets stand for.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    found = find_targets(model, family, block.targets)
    total = sum(parameter.numel() for parameter in model.parameters())
    linears = sorted(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    fused = sorted(name for name, parameter in model.named_parameters() if parameter.dim() == 3 and ".experts." in name)
    targets = [TARGETS[family][kind] for kind in block.targets]
    patterns = [_pattern(target) for target in targets if target.modules]
    config = LoraConfig(
        r=block.rank,
        lora_alpha=block.alpha,
        lora_dropout=block.dropout,
        # A list, even an empty one: with None PEFT would add attention on its own.
        target_modules="|".join(patterns) if patterns else [],
        target_parameters=[ending for target in targets for ending in target.parameters],
        bias="none",
        task_type="CAUSAL_LM",
    )
    ensure_peft_patches(family)
    torch.manual_seed(seed)
    wrapped: PeftModel = get_peft_model(model, config, adapter_name=ADAPTER)
    _require_same(adapted_weights(wrapped), found)
    routers = [name for name, _ in wrapped.named_parameters() if re.search(r"\.(gate|router)\.", name)]
    trained = [name for name in routers if "lora_" in name]
    if trained:
        raise RuntimeError(f"the router carries factors: {trained[:3]}")
    reached = {name for names in found.values() for name in names}
    coverage = Coverage(
        matched={kind: len(names) for kind, names in found.items()},
        trainable=sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad),
        total=total,
        skipped=_count_endings(name for name in (*linears, *fused) if name not in reached),
        router_frozen=len(routers),
    )
    return wrapped, coverage


def ensure_peft_patches(model_type: str) -> None:
    """Apply the repairs that adapters on a model need."""
    from qat.patches.registry import ensure

    if model_type == "nemotron_h":
        ensure("peft_mamba_out_proj", "nemotron_h_fused_mamba")


def _count_endings(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        ending = ".".join(name.split(".")[-2:])
        counts[ending] = counts.get(ending, 0) + 1
    return counts


def adapted_weights(model: PeftModel) -> dict[str, torch.nn.Module]:
    """The LoRA layers of a PEFT model by the base's path of what they adapt (linears without `.weight`)."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    found: dict[str, torch.nn.Module] = {}
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            name = path.replace(".base_layer", "")
            found[f"{name}.{module.parameter_name}" if isinstance(module, ParamWrapper) else name] = module
    return found


def _require_same(reached: dict[str, torch.nn.Module], found: dict[str, list[str]]) -> None:
    wanted = {name for names in found.values() for name in names}
    if set(reached) != wanted:
        missing, extra = sorted(wanted - set(reached)), sorted(set(reached) - wanted)
        raise RuntimeError(f"PEFT adapted other weights than asked: missing {missing[:3]}, extra {extra[:3]}")


def use_effective_weights_(model: PeftModel) -> None:
    """Let every adapted layer compute with W + s B A rounded once, instead of W x + s B (A x).

    On a GPU experts may stay low-rank while they train (`qat.quant.lora.use_fast_experts_`), never in `eval` mode.

    Args:
        model: A PEFT model without LoRA dropout; changed in place. Not needed where quantizers are inserted: they do
            the same.

    Raises:
        ValueError: The adapter has dropout, which acts on the input of A and cannot be expressed in the weight.
    """
    from peft.tuners.lora.layer import Linear, ParamWrapper

    from qat.quant.lora import lora_linear, use_fast_experts_

    for name, layer in adapted_weights(model).items():
        if isinstance(layer, ParamWrapper):
            layer._activate_lora = partial(_effective_parameter, layer)
        elif isinstance(layer, Linear):
            if layer.lora_dropout[ADAPTER].__class__.__name__ != "Identity":
                raise ValueError(f"{name}: LoRA dropout cannot be part of an effective weight")
            layer.forward = partial(lora_linear, layer)
        else:
            raise ValueError(f"{name}: unknown LoRA layer {type(layer).__name__}")
    if next(model.parameters()).is_cuda:
        use_fast_experts_(model)


@contextmanager
def _effective_parameter(layer: Any, active_adapters: list[str]) -> Iterator[None]:
    """For one forward, let the module that holds an adapted parameter see the effective weight in its place.

    An instance attribute comes before a parameter in look-up. PEFT registers a parametrization instead, whose check
    computes the weight one time more, and which swaps the parameter itself.
    """
    from qat.quant.lora import parameter_weight

    weight = parameter_weight(layer)
    attributes = layer.get_base_layer().__dict__
    attributes[layer.parameter_name] = weight
    try:
        yield
    finally:
        del attributes[layer.parameter_name]


def save_adapter(model: PeftModel, folder: Path, base_sha256: str, **origin: Any) -> None:
    """Write a standard PEFT adapter; the folder appears when it is whole.

    Args:
        model: The PEFT model.
        folder: Where it goes; replaced.
        base_sha256: `qat.train.base.base_sha256` of the base.
        origin: Further facts for `qat_adapter.json`, such as the parent adapter.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    from qat.storage import write_atomic, write_json
    from qat.train.parallel import whole

    fresh = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    factors = get_peft_model_state_dict(model)
    state = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in factors.items()}
    write_atomic(fresh / WEIGHTS, save(state, metadata={"format": "pt"}))
    model.peft_config[ADAPTER].save_pretrained(str(fresh))
    write_json(fresh / SIDECAR, {"base_sha256": base_sha256, "qat_version": __version__, **origin})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)


def adapter_sha256(folder: Path) -> str:
    """SHA-256 of an adapter's weights: what a distillation adapter remembers of the persona it stands on."""
    return sha256_file(folder / WEIGHTS)


def load_adapter(model: PreTrainedModel, folder: Path, base_sha256: str, parent: str | None = None) -> PeftModel:
    """Put a saved adapter on its base.

    Args:
        model: The base; for a distillation adapter the merged persona.
        folder: A PEFT adapter with `qat_adapter.json`.
        base_sha256: Of the base that `model` was loaded from.
        parent: `adapter_sha256` of the persona adapter that is merged into `model`, or None.

    Returns:
        The PEFT model, factors in float32 and frozen, in `eval` mode.

    Raises:
        UserError: The adapter is of another base or persona, incomplete, or does not fit the model's shapes.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _require_origin(folder, base_sha256, parent)
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:  # KeyError: a kind of adapter that PEFT does not know
        raise UserError("The adapter's configuration cannot be read.", where=str(folder), value=repr(error)) from error
    if not isinstance(config, LoraConfig):
        raise UserError("The adapter is no LoRA.", where=str(folder), value=type(config).__name__)
    config.inference_mode = False
    ensure_peft_patches(str(model.config.model_type))
    wrapped: PeftModel = get_peft_model(model, config, adapter_name=ADAPTER)
    try:
        state = load_file(folder / WEIGHTS)
        result = set_peft_model_state_dict(wrapped, state, adapter_name=ADAPTER)
    except (SafetensorError, RuntimeError) as error:
        raise UserError("The adapter cannot be loaded.", where=str(folder / WEIGHTS), value=str(error)) from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    unknown = list(result.unexpected_keys)
    if missing or unknown:
        raise UserError(
            "The adapter does not fit the base.",
            where=str(folder),
            value=f"{len(missing)} factors missing, {len(unknown)} unknown: {[*missing, *unknown][:2]}",
        )
    wrapped.requires_grad_(False)
    return wrapped.eval()


def _require_origin(folder: Path, base_sha256: str, parent: str | None) -> None:
    sidecar = folder / SIDECAR
    try:
        origin = json.loads(sidecar.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            "The adapter does not say which base it belongs to.",
            where=str(sidecar),
            remedy="use an adapter that `qat train` wrote",
        ) from error
    for key, wanted, what in (("base_sha256", base_sha256, "base"), ("parent_sha256", parent, "persona")):
        if origin.get(key) != wanted:
            raise UserError(
                f"The adapter was trained on another {what}.",
                where=str(sidecar),
                value=f"{key} {origin.get(key)}, here {wanted}",
                remedy=f"name the {what} it was trained on, or train again",
            )
