"""The matrices and layers of a network, from its `config.json` alone: what memory and time are estimated from.

The counts follow the modules' own code (`modeling_nemotron_h.py`, `modeling_qwen3_moe.py`). Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qat.errors import UserError
from qat.quant.linears import layer_kinds

MODEL_TYPES = ("nemotron_h", "llama", "qwen3", "qwen3_moe")
"""`model_type`s whose layers are known here."""

_BF16, _FLOAT32 = 2.0, 4.0


class Weight(NamedTuple):
    """One matrix of the network, or the fused matrices of all experts of a layer.

    Attributes:
        name: The checkpoint's module name.
        target: Adapter target of the recipe that reaches it; empty for none.
        layer: Index of its layer; -1 outside of layers.
        matrices: How many of this shape there are: the experts, 1 otherwise.
        out_features: Rows.
        in_features: Columns.
    """

    name: str
    target: str
    layer: int
    matrices: int
    out_features: int
    in_features: int

    @property
    def numbers(self) -> int:
        """Numbers it holds."""
        return self.matrices * self.out_features * self.in_features

    def factors(self, rank: int) -> int:
        """Numbers of its LoRA factors."""
        return self.matrices * rank * (self.out_features + self.in_features)


class Layer(NamedTuple):
    """What one layer keeps for its backward, bytes a token in BF16 (norms in float32)."""

    kind: str
    saved: float


def network_weights(config: Mapping[str, Any]) -> list[Weight]:
    """List the matrices of a network.

    Args:
        config: `config.json` of a nemotron_h, llama, qwen3 or qwen3_moe model.

    Returns:
        Embeddings, every layer's matrices, the output layer where it is not tied; norms and convolutions are left out
        (less than 0.1 % of the numbers).

    Raises:
        UserError: The model type is not known, or a number is missing.
    """
    hidden, vocabulary = _number(config, "hidden_size"), _number(config, "vocab_size")
    found = [Weight("embeddings", "", -1, 1, vocabulary, hidden)]
    if not config.get("tie_word_embeddings", False):
        found.append(Weight("lm_head", "", -2, 1, vocabulary, hidden))
    if config.get("model_type") == "nemotron_h":
        for layer, kind in enumerate(layer_kinds(config)):
            found += _NEMOTRON[kind](config, layer)
    else:
        _require_decoder(config)
        for layer in range(_number(config, "num_hidden_layers")):
            found += _decoder(config, layer)
    return found


def _mamba(config: Mapping[str, Any], layer: int) -> Iterator[Weight]:
    hidden, inner, shared = _mamba_sizes(config)
    mixer = f"backbone.layers.{layer}.mixer"
    out = 2 * inner + shared + _number(config, "mamba_num_heads")
    yield Weight(f"{mixer}.in_proj", "mamba", layer, 1, out, hidden)
    yield Weight(f"{mixer}.out_proj", "mamba", layer, 1, hidden, inner)


def _mamba_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Hidden size, inner size, and the size of B and C together."""
    inner = _number(config, "mamba_num_heads") * _number(config, "mamba_head_dim")
    return _number(config, "hidden_size"), inner, 2 * _number(config, "n_groups") * _number(config, "ssm_state_size")


def _attention(config: Mapping[str, Any], prefix: str, layer: int) -> Iterator[Weight]:
    hidden, queries, keys = _attention_sizes(config)
    for leaf, rows, columns in (
        ("q_proj", queries, hidden),
        ("k_proj", keys, hidden),
        ("v_proj", keys, hidden),
        ("o_proj", hidden, queries),
    ):
        yield Weight(f"{prefix}.{leaf}", "attention", layer, 1, rows, columns)


def _attention_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Hidden size, size of all query heads, size of all key heads."""
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    size = int(config.get("head_dim") or hidden // heads)
    return hidden, heads * size, int(config.get("num_key_value_heads") or heads) * size


def _moe(config: Mapping[str, Any], layer: int) -> Iterator[Weight]:
    mixer, hidden = f"backbone.layers.{layer}.mixer", _number(config, "hidden_size")
    latent = int(config.get("moe_latent_size") or hidden)
    experts, inner = _number(config, "n_routed_experts"), _number(config, "moe_intermediate_size")
    shared = _number(config, "moe_shared_expert_intermediate_size")
    yield Weight(f"{mixer}.experts.up_proj", "routed_experts", layer, experts, inner, latent)
    yield Weight(f"{mixer}.experts.down_proj", "routed_experts", layer, experts, latent, inner)
    yield Weight(f"{mixer}.shared_experts.up_proj", "shared_experts", layer, 1, shared, hidden)
    yield Weight(f"{mixer}.shared_experts.down_proj", "shared_experts", layer, 1, hidden, shared)
    yield Weight(f"{mixer}.gate", "", layer, 1, experts, hidden)
    if latent != hidden:
        yield Weight(f"{mixer}.fc1_latent_proj", "", layer, 1, latent, hidden)
        yield Weight(f"{mixer}.fc2_latent_proj", "", layer, 1, hidden, latent)


def _mlp(config: Mapping[str, Any], layer: int) -> Iterator[Weight]:
    mixer, hidden = f"backbone.layers.{layer}.mixer", _number(config, "hidden_size")
    inner = _number(config, "intermediate_size")
    yield Weight(f"{mixer}.up_proj", "mlp", layer, 1, inner, hidden)
    yield Weight(f"{mixer}.down_proj", "mlp", layer, 1, hidden, inner)


_NEMOTRON = {
    "mamba": _mamba,
    "attention": lambda config, layer: _attention(config, f"backbone.layers.{layer}.mixer", layer),
    "moe": _moe,
    "mlp": _mlp,
}


def _decoder(config: Mapping[str, Any], layer: int) -> Iterator[Weight]:
    prefix, hidden = f"model.layers.{layer}", _number(config, "hidden_size")
    yield from _attention(config, f"{prefix}.self_attn", layer)
    experts = _experts(config, layer)
    if experts:
        inner = _number(config, "moe_intermediate_size")
        yield Weight(f"{prefix}.mlp.experts.gate_up_proj", "routed_experts", layer, experts, 2 * inner, hidden)
        yield Weight(f"{prefix}.mlp.experts.down_proj", "routed_experts", layer, experts, hidden, inner)
        yield Weight(f"{prefix}.mlp.gate", "", layer, 1, experts, hidden)
        return
    inner = _number(config, "intermediate_size")
    for leaf, rows, columns in (
        ("gate_proj", inner, hidden),
        ("up_proj", inner, hidden),
        ("down_proj", hidden, inner),
    ):
        yield Weight(f"{prefix}.mlp.{leaf}", "mlp", layer, 1, rows, columns)


def _experts(config: Mapping[str, Any], layer: int) -> int:
    """Experts of a decoder layer; 0 for a dense one (`Qwen3MoeDecoderLayer`'s rule)."""
    if config.get("model_type") != "qwen3_moe" or layer in (config.get("mlp_only_layers") or ()):
        return 0
    experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
    return experts if (layer + 1) % int(config.get("decoder_sparse_step") or 1) == 0 else 0


def network_layers(config: Mapping[str, Any]) -> Iterator[Layer]:
    """What every block keeps: the residual, its norm in float32, and what its products and activations need."""
    hidden = _number(config, "hidden_size")
    norm = _BF16 * 2 * hidden + 2 * _FLOAT32 * hidden
    if config.get("model_type") == "nemotron_h":
        for kind in layer_kinds(config):
            yield Layer(kind, norm + _mixer(config, kind))
        return
    _require_decoder(config)
    for layer in range(_number(config, "num_hidden_layers")):
        attention = _mixer(config, "attention")
        experts = _experts(config, layer)
        inner = _number(config, "moe_intermediate_size" if experts else "intermediate_size")
        rows = _number(config, "num_experts_per_tok") if experts else 1
        yield Layer("decoder", 2 * norm + attention + _BF16 * rows * (4 * inner + (2 * hidden if experts else 0)))


def _mixer(config: Mapping[str, Any], kind: str) -> float:
    hidden = _number(config, "hidden_size")
    if kind == "mamba":
        _, inner, shared = _mamba_sizes(config)
        # in_proj's output, the convolution's input and output, the scan's, the gated norm's in float32, out_proj's.
        return _BF16 * (3 * inner + shared + 2 * (inner + shared) + 2 * inner) + 2 * _FLOAT32 * inner
    if kind == "attention":
        _, queries, keys = _attention_sizes(config)
        return _BF16 * (2 * queries + 2 * keys)
    if kind == "moe":
        rows, inner = _number(config, "num_experts_per_tok"), _number(config, "moe_intermediate_size")
        latent = int(config.get("moe_latent_size") or hidden)
        routed = rows * (2 * latent + 2 * inner)
        return _BF16 * (routed + 2 * _number(config, "moe_shared_expert_intermediate_size"))
    return _BF16 * 2 * _number(config, "intermediate_size")


def _require_decoder(config: Mapping[str, Any]) -> None:
    if config.get("model_type") not in MODEL_TYPES:
        raise UserError(
            "The memory of this model type cannot be estimated.",
            where="config.json: model_type",
            value=config.get("model_type"),
            remedy=f"known are {', '.join(MODEL_TYPES)}",
        )


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError("The model's configuration lacks a whole number.", where=f"config.json: {key}", value=value)
    return value
