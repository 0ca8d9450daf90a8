"""Which weights of a model could be quantized, read from `config.json` alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qat.errors import UserError

_LAYER_LETTERS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
_LAYER_WORDS = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "moe": "moe",
    "mlp": "mlp",
}


class Linear(NamedTuple):
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


def linears(config: Mapping[str, Any]) -> Iterator[Linear]:
    """List the weights that could be quantized, layer by layer; embeddings, router, conv1d and lm_head are none.

    Args:
        config: The model's `config.json`.

    Raises:
        UserError: A model type that is not known, or a field that is missing.
    """
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


def _nemotron_layer(config: Mapping[str, Any], layer: int, kind: str) -> Iterator[Linear]:
    """Modules of one Nemotron-H layer (`modeling_nemotron_h.py`), in the order of the published exclude list."""
    mixer = f"backbone.layers.{layer}.mixer"
    hidden = _number(config, "hidden_size")
    if kind == "mamba":
        inner = _number(config, "mamba_num_heads") * _number(config, "mamba_head_dim")
        yield Linear(f"{mixer}.in_proj", "mamba", layer, hidden)
        yield Linear(f"{mixer}.out_proj", "mamba", layer, inner)
    elif kind == "attention":
        yield from _attention(config, mixer, layer)
    elif kind == "mlp":
        yield Linear(f"{mixer}.up_proj", "mlp", layer, hidden)
        yield Linear(f"{mixer}.down_proj", "mlp", layer, _number(config, "intermediate_size"))
    else:
        latent = config.get("moe_latent_size")
        shared = _number(config, "moe_shared_expert_intermediate_size")
        yield Linear(f"{mixer}.experts.up_proj", "experts", layer, latent or hidden)
        yield Linear(f"{mixer}.experts.down_proj", "experts", layer, _number(config, "moe_intermediate_size"))
        yield Linear(f"{mixer}.shared_experts.up_proj", "shared_experts", layer, hidden)
        yield Linear(f"{mixer}.shared_experts.down_proj", "shared_experts", layer, shared)
        if latent:
            yield Linear(f"{mixer}.fc1_latent_proj", "latent", layer, hidden)
            yield Linear(f"{mixer}.fc2_latent_proj", "latent", layer, latent)


def _decoder_layer(config: Mapping[str, Any], layer: int) -> Iterator[Linear]:
    """Modules of one Llama, Qwen3 or Qwen3-MoE layer."""
    prefix = f"model.layers.{layer}"
    hidden = _number(config, "hidden_size")
    yield from _attention(config, f"{prefix}.self_attn", layer)
    if _is_sparse(config, layer):
        inner = _number(config, "moe_intermediate_size")
        yield Linear(f"{prefix}.mlp.experts.gate_up_proj", "experts", layer, hidden)
        yield Linear(f"{prefix}.mlp.experts.down_proj", "experts", layer, inner)
        return
    yield Linear(f"{prefix}.mlp.gate_proj", "mlp", layer, hidden)
    yield Linear(f"{prefix}.mlp.up_proj", "mlp", layer, hidden)
    yield Linear(f"{prefix}.mlp.down_proj", "mlp", layer, _number(config, "intermediate_size"))


def _attention(config: Mapping[str, Any], prefix: str, layer: int) -> Iterator[Linear]:
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    inner = heads * (config.get("head_dim") or hidden // heads)
    for leaf, in_features in (("q_proj", hidden), ("k_proj", hidden), ("v_proj", hidden), ("o_proj", inner)):
        yield Linear(f"{prefix}.{leaf}", "attention", layer, in_features)


def never_quantized(config: Mapping[str, Any]) -> list[str]:
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
