"""Precision presets: which modules go to four bits, decided from `config.json` alone.

Embeddings, router, conv1d, norms and lm_head always stay in BF16. Beyond these:

- `all`: nothing stays in BF16;
- `nvidia-nano`: attention and the Mamba layer right before each attention layer stay (the list published with
  NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4);
- `conservative`: attention, all Mamba projections and latent projections stay (ModelOpt's
  `MAMBA_MOE_NVFP4_CONSERVATIVE_CFG`);
- `aggressive`: attention and latent projections stay (ModelOpt's `MAMBA_MOE_NVFP4_AGGRESSIVE_CFG`);
- `lightning`: mixes FP8 and weight-only NVFP4 as NVIDIA-Nemotron-3.5-Lightning does; known by name, not buildable yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from qat.errors import UserError
from qat.quant import BLOCK

SUPPORTED_PRESETS = ("all", "nvidia-nano", "conservative", "aggressive")
"""Presets that can be trained and exported."""
PRESETS = (*SUPPORTED_PRESETS, "lightning")
"""All presets known by name."""

_HYBRID_ONLY = ("nvidia-nano", "conservative", "aggressive")
_LAYER_LETTERS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
_LAYER_WORDS = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "moe": "moe",
    "mlp": "mlp",
}


class _Linear(NamedTuple):
    """A weight that could be quantized.

    Attributes:
        name: The checkpoint's module name; experts by their fused name.
        role: attention, mamba, experts, shared_experts, mlp or latent.
        layer: Index of its layer.
        in_features: Length of a row.
    """

    name: str
    role: str
    layer: int
    in_features: int


@dataclass(frozen=True)
class Preset:
    """A rule that says for every module of a model whether it is quantized.

    Args:
        name: One of `PRESETS`.

    Raises:
        UserError: There is no such preset.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in PRESETS:
            raise UserError(
                "There is no such precision preset.",
                value=self.name,
                remedy=f"Use one of {', '.join(SUPPORTED_PRESETS)}.",
            )

    def quantized_modules(self, config: Mapping[str, Any]) -> list[str]:
        """List what this preset quantizes.

        Args:
            config: The model's `config.json`.

        Returns:
            Checkpoint names of linears and of fused expert parameters, layer by layer.

        Raises:
            UserError: The preset does not fit the model, cannot be built yet, or a weight's rows do not divide into
                blocks.
        """
        chosen = [linear for linear in self._linears(config) if not self._keeps(linear, config)]
        for linear in chosen:
            if linear.in_features % BLOCK:
                raise UserError(
                    f"NVFP4 needs rows whose length is a multiple of {BLOCK}.",
                    where=linear.name,
                    value=linear.in_features,
                    remedy="Choose a preset that leaves this module in BF16.",
                )
        if not chosen:
            raise UserError("The preset matches no module of this model.", where="config.json", value=self.name)
        return [linear.name for linear in chosen]

    def excludes(self, config: Mapping[str, Any]) -> list[str]:
        """List what stays in BF16 and has to be named to a server, as `hf_quant_config.json` lists it.

        Args:
            config: The model's `config.json`.

        Returns:
            Checkpoint names: `lm_head`, the linears left out, the convolutions, and routers where a server would
            otherwise expect them quantized.

        Raises:
            UserError: As `quantized_modules`.
        """
        left_out = [linear.name for linear in self._linears(config) if self._keeps(linear, config)]
        return ["lm_head", *left_out, *_never_quantized(config)]

    def _linears(self, config: Mapping[str, Any]) -> list[_Linear]:
        model_type = config.get("model_type")
        if self.name not in SUPPORTED_PRESETS:
            raise UserError(
                "This preset cannot be built yet: it mixes FP8 and weight-only NVFP4 modules.",
                value=self.name,
                remedy=f"Use one of {', '.join(SUPPORTED_PRESETS)}.",
            )
        if self.name in _HYBRID_ONLY and model_type != "nemotron_h":
            raise UserError(
                f"The preset {self.name} names Mamba and MoE layers and does not fit this model.",
                where="config.json: model_type",
                value=model_type,
                remedy="Use the preset all.",
            )
        return list(_linears(config))

    def _keeps(self, linear: _Linear, config: Mapping[str, Any]) -> bool:
        """Whether a module stays in BF16."""
        if self.name == "all":
            return False
        if linear.role == "attention":
            return True
        if self.name == "nvidia-nano":
            kinds = layer_kinds(config)
            following = kinds[linear.layer + 1] if linear.layer + 1 < len(kinds) else None
            return linear.role == "mamba" and following == "attention"
        return linear.role == "latent" or (self.name == "conservative" and linear.role == "mamba")


def layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """Read the kinds of a Nemotron-H model's layers.

    Args:
        config: `config.json`, with `layers_block_type` (Transformers 5) or `hybrid_override_pattern` (the published
            form).

    Returns:
        `mamba`, `attention`, `moe` or `mlp` for each layer.

    Raises:
        UserError: Neither field is there, or it holds an unknown kind.
    """
    words, pattern = config.get("layers_block_type"), config.get("hybrid_override_pattern")
    field, entries, known = (
        ("layers_block_type", list(words), _LAYER_WORDS)
        if words
        else ("hybrid_override_pattern", list(pattern or ""), _LAYER_LETTERS)
    )
    unknown = [entry for entry in entries if not isinstance(entry, str) or entry not in known]
    if not entries or unknown:
        raise UserError(
            "The kinds of the layers cannot be read.",
            where=f"config.json: {field}",
            value=unknown[0] if unknown else None,
            remedy=f"Each layer is one of {', '.join(known)}.",
        )
    return [known[entry] for entry in entries]


def _linears(config: Mapping[str, Any]) -> Iterator[_Linear]:
    model_type = config.get("model_type")
    if model_type == "nemotron_h":
        for layer, kind in enumerate(layer_kinds(config)):
            yield from _nemotron_layer(config, layer, kind)
    elif model_type in ("llama", "qwen3", "qwen3_moe"):
        for layer in range(_number(config, "num_hidden_layers")):
            yield from _decoder_layer(config, layer)
    else:
        raise UserError(
            "The modules of this model type are not known.",
            where="config.json: model_type",
            value=model_type,
            remedy="Use a model of type nemotron_h, llama, qwen3 or qwen3_moe.",
        )


def _nemotron_layer(config: Mapping[str, Any], layer: int, kind: str) -> Iterator[_Linear]:
    """Modules of one Nemotron-H layer (`modeling_nemotron_h.py`), in the order of the published exclude list."""
    mixer = f"backbone.layers.{layer}.mixer"
    hidden = _number(config, "hidden_size")
    if kind == "mamba":
        inner = _number(config, "mamba_num_heads") * _number(config, "mamba_head_dim")
        yield _Linear(f"{mixer}.in_proj", "mamba", layer, hidden)
        yield _Linear(f"{mixer}.out_proj", "mamba", layer, inner)
    elif kind == "attention":
        yield from _attention(config, mixer, layer)
    elif kind == "mlp":
        yield _Linear(f"{mixer}.up_proj", "mlp", layer, hidden)
        yield _Linear(f"{mixer}.down_proj", "mlp", layer, _number(config, "intermediate_size"))
    else:
        latent = config.get("moe_latent_size")
        shared = _number(config, "moe_shared_expert_intermediate_size")
        yield _Linear(f"{mixer}.experts.up_proj", "experts", layer, latent or hidden)
        yield _Linear(f"{mixer}.experts.down_proj", "experts", layer, _number(config, "moe_intermediate_size"))
        yield _Linear(f"{mixer}.shared_experts.up_proj", "shared_experts", layer, hidden)
        yield _Linear(f"{mixer}.shared_experts.down_proj", "shared_experts", layer, shared)
        if latent:
            yield _Linear(f"{mixer}.fc1_latent_proj", "latent", layer, hidden)
            yield _Linear(f"{mixer}.fc2_latent_proj", "latent", layer, latent)


def _decoder_layer(config: Mapping[str, Any], layer: int) -> Iterator[_Linear]:
    """Modules of one Llama, Qwen3 or Qwen3-MoE layer."""
    prefix = f"model.layers.{layer}"
    hidden = _number(config, "hidden_size")
    yield from _attention(config, f"{prefix}.self_attn", layer)
    if _is_sparse(config, layer):
        inner = _number(config, "moe_intermediate_size")
        yield _Linear(f"{prefix}.mlp.experts.gate_up_proj", "experts", layer, hidden)
        yield _Linear(f"{prefix}.mlp.experts.down_proj", "experts", layer, inner)
        return
    yield _Linear(f"{prefix}.mlp.gate_proj", "mlp", layer, hidden)
    yield _Linear(f"{prefix}.mlp.up_proj", "mlp", layer, hidden)
    yield _Linear(f"{prefix}.mlp.down_proj", "mlp", layer, _number(config, "intermediate_size"))


def _attention(config: Mapping[str, Any], prefix: str, layer: int) -> Iterator[_Linear]:
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    inner = heads * (config.get("head_dim") or hidden // heads)
    for leaf, in_features in (("q_proj", hidden), ("k_proj", hidden), ("v_proj", hidden), ("o_proj", inner)):
        yield _Linear(f"{prefix}.{leaf}", "attention", layer, in_features)


def _never_quantized(config: Mapping[str, Any]) -> list[str]:
    """Convolutions, routers that vLLM builds with the model's quantization, and multi-token prediction heads."""
    if config["model_type"] == "nemotron_h":
        kinds = layer_kinds(config)
        names = [f"backbone.layers.{layer}.mixer.conv1d" for layer, kind in enumerate(kinds) if kind == "mamba"]
        return [*names, "mtp*"] if config.get("num_nextn_predict_layers") else names
    layers = range(_number(config, "num_hidden_layers"))
    return [f"model.layers.{layer}.mlp.gate" for layer in layers if _is_sparse(config, layer)]


def _is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    """Qwen3-MoE's own rule for which layers have experts (`Qwen3MoeDecoderLayer`)."""
    if config["model_type"] != "qwen3_moe" or layer in (config.get("mlp_only_layers") or ()):
        return False
    # Transformers 5 writes the number of experts under its common name.
    experts = _number(config, "num_experts" if "num_experts" in config else "num_local_experts")
    return experts > 0 and (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError("The model's configuration lacks a whole number.", where=f"config.json: {key}", value=value)
    return value
