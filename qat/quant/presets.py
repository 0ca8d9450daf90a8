"""Precision presets: which modules are quantized and to what, decided from `config.json` alone.

A module is stored in one of three formats, or stays in BF16: `nvfp4` (weights and activations in four bits), `w4a16`
(weights in NVFP4, activations left alone), `fp8` (E4M3 weights and activations under one scale each).

Embeddings, router, conv1d, norms and lm_head always stay in BF16. Beyond these:

- `all`: nothing stays in BF16, everything is NVFP4;
- `nvidia-nano`: attention and the Mamba layer right before each attention layer stay (the list published with
  NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4), the rest is NVFP4;
- `conservative`: attention, all Mamba projections and latent projections stay (ModelOpt's
  `MAMBA_MOE_NVFP4_CONSERVATIVE_CFG`);
- `aggressive`: attention and latent projections stay (ModelOpt's `MAMBA_MOE_NVFP4_AGGRESSIVE_CFG`);
- `lightning`: attention and latent projections stay, Mamba projections are FP8, experts are W4A16 (as published with
  NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4, whose lm_head is W4A16 too; here it stays in BF16, because teacher and
  student share the output matrix).

A recipe composes presets of its own from these (`compose`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qat.errors import UserError
from qat.quant import BLOCK
from qat.quant.linears import Linear, layer_kinds, linears, never_quantized
from qat.quant.names import sharing_groups

if TYPE_CHECKING:
    from qat.recipe.schema import PresetBlock

PRESETS = ("all", "nvidia-nano", "conservative", "aggressive", "lightning")
"""The presets that have a name here; recipes may add their own."""

NVFP4, W4A16, FP8 = "nvfp4", "w4a16", "fp8"
FORMATS = (NVFP4, W4A16, FP8)
"""What a module can be quantized to."""

_HYBRID_ONLY = ("nvidia-nano", "conservative", "aggressive", "lightning")


@dataclass(frozen=True)
class Preset:
    """A rule that says for every module of a model what it is quantized to.

    Args:
        name: One of `PRESETS`, or the name of an own one.
        own: Of an own preset, the format of each module that it quantizes.

    Raises:
        UserError: There is no such preset, or an own one takes the name of another.
    """

    name: str
    own: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.own is None and self.name not in PRESETS:
            raise UserError(
                "There is no such precision preset.",
                value=self.name,
                remedy=f"Use one of {', '.join(PRESETS)}, or describe it under quant.presets in the recipe.",
            )
        if self.own is not None and self.name in PRESETS:
            raise UserError("An own preset cannot have the name of a shipped one.", value=self.name)

    def formats(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Say what every quantized module is quantized to.

        Args:
            config: The model's `config.json`.

        Returns:
            One of `FORMATS` by checkpoint name of a linear or fused expert parameter, layer by layer.

        Raises:
            UserError: The preset does not fit the model, a weight cannot be stored in its format, or weights that a
                server computes as one are to be stored in different ones.
        """
        known = self._linears(config)
        if self.own is None:
            chosen = {linear.name: kind for linear in known if (kind := self._format(linear, config)) is not None}
        else:
            _require_known(self.own, known, self.name)
            chosen = {linear.name: self.own[linear.name] for linear in known if linear.name in self.own}
        if not chosen:
            raise UserError("The preset matches no module of this model.", where="config.json", value=self.name)
        _require_storable(chosen, known)
        _require_whole(chosen, known)
        return chosen

    def quantized_modules(self, config: Mapping[str, Any]) -> list[str]:
        """List what this preset quantizes: the names of `formats`."""
        return list(self.formats(config))

    def excludes(self, config: Mapping[str, Any]) -> list[str]:
        """List what stays in BF16 and has to be named to a server, as `hf_quant_config.json` lists it.

        Args:
            config: The model's `config.json`.

        Returns:
            Checkpoint names: `lm_head`, the linears left out, the convolutions, and routers where a server would
            otherwise expect them quantized.

        Raises:
            UserError: As `formats`.
        """
        chosen = self.formats(config)
        left_out = [linear.name for linear in self._linears(config) if linear.name not in chosen]
        return ["lm_head", *left_out, *never_quantized(config)]

    def _linears(self, config: Mapping[str, Any]) -> list[Linear]:
        model_type = config.get("model_type")
        if self.name in _HYBRID_ONLY and model_type != "nemotron_h":
            raise UserError(
                f"The preset {self.name} names Mamba and MoE layers and does not fit this model.",
                where="config.json: model_type",
                value=model_type,
                remedy="Use the preset all.",
            )
        return list(linears(config))

    def _format(self, linear: Linear, config: Mapping[str, Any]) -> str | None:
        """The format of a module under a shipped preset; None for BF16."""
        if self.name == "all":
            return NVFP4
        if linear.role == "attention":
            return None
        if self.name == "nvidia-nano":
            kinds = layer_kinds(config)
            following = kinds[linear.layer + 1] if linear.layer + 1 < len(kinds) else None
            return None if linear.role == "mamba" and following == "attention" else NVFP4
        if linear.role == "latent" or (self.name == "conservative" and linear.role == "mamba"):
            return None
        if self.name == "lightning":
            return FP8 if linear.role == "mamba" else W4A16
        return NVFP4


def preset_of(name: str, own: Mapping[str, PresetBlock], config: Mapping[str, Any]) -> Preset:
    """Find a preset by the name that an arm gives it.

    Args:
        name: Of a shipped preset or of one in `own`.
        own: `quant.presets` of the recipe.
        config: The model's `config.json`.

    Raises:
        UserError: No such preset, or one that does not fit the model.
    """
    if name not in own:
        return Preset(name)
    block = own[name]
    changes = {"bf16": block.bf16, NVFP4: block.nvfp4, W4A16: block.w4a16, FP8: block.fp8}
    return compose(name, block.like, changes, config)


def compose(name: str, like: str, changes: Mapping[str, Sequence[str]], config: Mapping[str, Any]) -> Preset:
    """Make an own preset: a shipped one with some modules stored otherwise.

    Args:
        name: Of the new preset.
        like: The shipped preset that says what holds for all others.
        changes: `bf16` or one of `FORMATS` -> checkpoint names, or patterns with `*`, of the modules it is for.
        config: The model's `config.json`.

    Raises:
        UserError: A pattern matches no module, two formats claim one module, or the result cannot be stored.
    """
    names = [linear.name for linear in linears(config)]
    claimed: dict[str, str] = {}
    for kind, patterns in changes.items():
        for pattern in patterns:
            matched = fnmatch.filter(names, pattern)
            if not matched:
                raise UserError(
                    "A pattern of the preset matches no module.",
                    where=f"quant.presets.{name}.{kind}",
                    value=pattern,
                    remedy=f"Use the checkpoint's names, as {names[0]}; `*` stands for any characters.",
                )
            twice = [module for module in matched if claimed.get(module, kind) != kind]
            if twice:
                raise UserError(
                    "Two formats of the preset claim one module.",
                    where=f"quant.presets.{name}",
                    value=f"{twice[0]}: {claimed[twice[0]]} and {kind}",
                )
            claimed |= dict.fromkeys(matched, kind)
    formats = Preset(like).formats(config) | claimed
    preset = Preset(name, {module: kind for module, kind in formats.items() if kind != "bf16"})
    preset.formats(config)
    return preset


def _require_known(own: Mapping[str, str], known: Sequence[Linear], name: str) -> None:
    unknown = sorted(set(own) - {linear.name for linear in known})
    if unknown:
        raise UserError(
            f"The preset {name} names {len(unknown)} modules that the model does not have.",
            where="config.json",
            value=unknown[0],
            remedy="Use it with the model that it was made for.",
        )


def _require_storable(chosen: Mapping[str, str], known: Sequence[Linear]) -> None:
    for linear in known:
        kind = chosen.get(linear.name)
        if kind in (NVFP4, W4A16) and linear.in_features % BLOCK:
            raise UserError(
                f"NVFP4 needs rows whose length is a multiple of {BLOCK}.",
                where=linear.name,
                value=linear.in_features,
                remedy="Choose a preset that leaves this module in BF16.",
            )
        if kind == FP8 and linear.role == "experts":
            raise UserError(
                "Routed experts cannot be FP8 here: they are NVFP4, W4A16 or BF16.",
                where=linear.name,
                remedy="Take the module out of the preset's fp8 list.",
            )
        if kind is not None and kind not in FORMATS:
            raise UserError("Unknown format of a module.", where=linear.name, value=kind, remedy=", ".join(FORMATS))


def _require_whole(chosen: Mapping[str, str], known: Sequence[Linear]) -> None:
    """A server computes q/k/v, gate/up and the experts of a layer each in one call, in one format."""
    experts: dict[int, list[str]] = {}
    for linear in known:
        if linear.role == "experts":
            experts.setdefault(linear.layer, []).append(linear.name)
    for group in (*sharing_groups(linear.name for linear in known), *experts.values()):
        found = {name: chosen.get(name, "bf16") for name in group}
        if len(set(found.values())) > 1:
            raise UserError(
                "Weights that the server computes as one are to be stored in different formats.",
                where=", ".join(group),
                value=", ".join(found.values()),
                remedy="Give all of them the same.",
            )
