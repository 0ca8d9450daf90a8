"""The matrices and layers of a network, from its `config.json` alone: what memory and time are estimated from.

The counts follow the code that trains on a GPU: Nemotron-H with this package's kernels and mamba-ssm's scan, the others
on Transformers' modules, experts of both on `qat.quant.experts`. A test holds them against the tensors that autograd
really keeps. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qat.errors import UserError
from qat.quant.linears import layer_kinds
from qat.quant.names import memory_name

MODEL_TYPES = ("nemotron_h", "llama", "qwen3", "qwen3_moe")
"""`model_type`s whose layers are known here."""

_BF16, _FLOAT32 = 2.0, 4.0
FORMED = 4.0
"""Bytes a number of an adapted weight that forming W + s B A moves: read and write."""
LOW_RANK = 10.0
"""Bytes a row and feature of a low-rank product beside the weight's own, forward and backward together."""


class Weight(NamedTuple):
    """One matrix of the network, or the fused matrices of all experts of a layer.

    Attributes:
        name: The checkpoint's module name.
        target: Adapter target of the recipe that reaches it; empty for none.
        layer: Index of its layer; -1 outside of layers.
        matrices: How many of this shape there are: the experts, 1 otherwise.
        out_features: Rows.
        in_features: Columns.
        reads: The tensor that it is multiplied with: `norm` or `second norm`, which a layer's weights share; `kept`,
            which the layer keeps for its backward in any case; or `own`.
    """

    name: str
    target: str
    layer: int
    matrices: int
    out_features: int
    in_features: int
    reads: str = "own"

    @property
    def numbers(self) -> int:
        """Numbers it holds."""
        return self.matrices * self.out_features * self.in_features

    def factors(self, rank: int) -> int:
        """Numbers of its LoRA factors."""
        return self.matrices * rank * (self.out_features + self.in_features)


class Layer(NamedTuple):
    """What one layer with frozen weights needs for its backward, bytes a token.

    Attributes:
        kind: `mamba`, `attention`, `moe`, `mlp`, or `decoder`.
        entry: Of its input, where it is kept as it came; 0 where only a float32 copy is (in `saved`).
        saved: Of everything else that autograd keeps from the forward.
        working: Gradients and work space at the fullest moment of its backward, less what has been given back by then.
        trained: Kept besides where norms and convolutions are trained too.
    """

    kind: str
    entry: float
    saved: float
    working: float
    trained: float


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


def described(config: Mapping[str, Any], target: str) -> set[str]:
    """Name the weights that an adapter target stands for, as the network in memory names them.

    Args:
        config: `config.json`, or what Transformers made of it.
        target: Adapter target of the recipe.

    Returns:
        Paths of linears and of fused expert parameters; empty for a model type that is not known here.
    """
    model_type = str(config.get("model_type"))
    if model_type not in MODEL_TYPES:
        return set()
    return {memory_name(weight.name, model_type) for weight in network_weights(config) if weight.target == target}


def _mamba(config: Mapping[str, Any], layer: int) -> Iterator[Weight]:
    hidden, inner, shared = _mamba_sizes(config)
    mixer = f"backbone.layers.{layer}.mixer"
    out = 2 * inner + shared + _number(config, "mamba_num_heads")
    yield Weight(f"{mixer}.in_proj", "mamba", layer, 1, out, hidden, "norm")
    yield Weight(f"{mixer}.out_proj", "mamba", layer, 1, hidden, inner)


def _mamba_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Hidden size, inner size, and the size of B and C together."""
    inner = _number(config, "mamba_num_heads") * _number(config, "mamba_head_dim")
    return _number(config, "hidden_size"), inner, 2 * _number(config, "n_groups") * _number(config, "ssm_state_size")


def _attention(config: Mapping[str, Any], prefix: str, layer: int) -> Iterator[Weight]:
    hidden, queries, keys = _attention_sizes(config)
    for leaf, rows, columns, reads in (
        ("q_proj", queries, hidden, "norm"),
        ("k_proj", keys, hidden, "norm"),
        ("v_proj", keys, hidden, "norm"),
        ("o_proj", hidden, queries, "kept"),
    ):
        yield Weight(f"{prefix}.{leaf}", "attention", layer, 1, rows, columns, reads)


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
    yield Weight(f"{mixer}.shared_experts.up_proj", "shared_experts", layer, 1, shared, hidden, "norm")
    yield Weight(f"{mixer}.shared_experts.down_proj", "shared_experts", layer, 1, hidden, shared)
    yield Weight(f"{mixer}.gate", "", layer, 1, experts, hidden)
    if latent != hidden:
        yield Weight(f"{mixer}.fc1_latent_proj", "", layer, 1, latent, hidden)
        yield Weight(f"{mixer}.fc2_latent_proj", "", layer, 1, hidden, latent)


def _mlp(config: Mapping[str, Any], layer: int) -> Iterator[Weight]:
    mixer, hidden = f"backbone.layers.{layer}.mixer", _number(config, "hidden_size")
    inner = _number(config, "intermediate_size")
    yield Weight(f"{mixer}.up_proj", "mlp", layer, 1, inner, hidden, "norm")
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
    for leaf, rows, columns, reads in (
        ("gate_proj", inner, hidden, "second norm"),
        ("up_proj", inner, hidden, "second norm"),
        ("down_proj", hidden, inner, "own"),
    ):
        yield Weight(f"{prefix}.mlp.{leaf}", "mlp", layer, 1, rows, columns, reads)


def _experts(config: Mapping[str, Any], layer: int) -> int:
    """Experts of a decoder layer; 0 for a dense one (`Qwen3MoeDecoderLayer`'s rule)."""
    if config.get("model_type") != "qwen3_moe" or layer in (config.get("mlp_only_layers") or ()):
        return 0
    experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
    return experts if (layer + 1) % int(config.get("decoder_sparse_step") or 1) == 0 else 0


def network_layers(config: Mapping[str, Any]) -> Iterator[Layer]:
    """What every layer keeps for its backward and makes in it; arguments and errors as of `network_weights`."""
    if config.get("model_type") == "nemotron_h":
        for kind in layer_kinds(config):
            yield _NEMOTRON_LAYERS[kind](config)
        return
    _require_decoder(config)
    for layer in range(_number(config, "num_hidden_layers")):
        yield _decoder_layer(config, layer)


def _mamba_layer(config: Mapping[str, Any]) -> Layer:
    """Kept: in_proj's output (gate, what is convolved, time steps), the convolution's, the scan's, the decays."""
    hidden, inner, shared = _mamba_sizes(config)
    heads, groups, chunk = (_number(config, key) for key in ("mamba_num_heads", "n_groups", "chunk_size"))
    saved = _BF16 * (2 * inner + shared + heads + inner + shared + inner) + _FLOAT32 * heads
    # mamba-ssm makes states and their gradients at the ends of the chunks in float32 and rounds both to BF16; besides
    # the products of B and C within a chunk, float32, and room for the gradients of B and C.
    states = inner * _number(config, "ssm_state_size") / chunk * 2 * (_FLOAT32 + _BF16)
    working = states + _FLOAT32 * groups * chunk + _BF16 * shared + (3 * _FLOAT32 + _BF16) * heads
    working += _BF16 * (hidden + 2 * inner)  # the gradients of the result, the scan's output and the gate
    # Transformers' own mixer: of its gated norm four float32 tensors and the normalized one, its convolution's output.
    trained = _norm_trained(hidden) + 4 * _FLOAT32 * inner + _BF16 * inner + _BF16 * (inner + shared)
    return Layer("mamba", _BF16 * hidden, saved, working, trained)


def _attention_layer(config: Mapping[str, Any]) -> Layer:
    hidden, _, _ = _attention_sizes(config)
    saved, working = _attending(config)
    return Layer("attention", _BF16 * hidden, saved, _BF16 * hidden + working, _norm_trained(hidden))


def _attending(config: Mapping[str, Any]) -> tuple[float, float]:
    """Kept: queries, keys, values, the result, each head's log of the sum. Made: gradients, one in float32 as well."""
    _, queries, keys = _attention_sizes(config)
    saved = _BF16 * (2 * queries + 2 * keys) + _FLOAT32 * _number(config, "num_attention_heads")
    return saved, _BF16 * (2 * queries + 2 * keys) + _FLOAT32 * queries


def _moe_layer(config: Mapping[str, Any]) -> Layer:
    """Kept: the pairs' rows before the activation and as results, the shared expert's activation, the routes."""
    hidden, inner = _number(config, "hidden_size"), _number(config, "moe_intermediate_size")
    slots, latent = _number(config, "num_experts_per_tok"), int(config.get("moe_latent_size") or hidden)
    shared = _BF16 * _number(config, "moe_shared_expert_intermediate_size")
    saved = _BF16 * slots * (inner + latent) + shared + _routes(config, "n_routed_experts")
    # Of the results, while all is there but the shared expert's part; or in that part's own backward.
    working = max(_BF16 * (2 * hidden + slots * latent) - shared, _BF16 * hidden + 3 * shared)
    return Layer("moe", _BF16 * hidden, saved, working, _norm_trained(hidden))


def _routes(config: Mapping[str, Any], experts: str) -> float:
    """Scores in float32, their sum, and for each slot its expert and place in int64 and its weight twice."""
    return _FLOAT32 * (_number(config, experts) + 1) + _number(config, "num_experts_per_tok") * (16 + 2 * _FLOAT32)


def _mlp_layer(config: Mapping[str, Any]) -> Layer:
    hidden, inner = _number(config, "hidden_size"), _BF16 * _number(config, "intermediate_size")
    return Layer("mlp", _BF16 * hidden, inner, _BF16 * hidden + 3 * inner, _norm_trained(hidden))


def _norm_trained(hidden: int) -> float:
    """Transformers' own norm: its input and the normalized one in float32 in the place of the input as it came."""
    return 2 * _FLOAT32 * hidden - _BF16 * hidden


_NEMOTRON_LAYERS = {"mamba": _mamba_layer, "attention": _attention_layer, "moe": _moe_layer, "mlp": _mlp_layer}


def _decoder_layer(config: Mapping[str, Any], layer: int) -> Layer:
    """Transformers' norms keep their input in float32; silu keeps its input, the product of the halves both factors."""
    hidden, queries, keys = _attention_sizes(config)
    heads = _number(config, "num_attention_heads") * (queries + keys) / queries
    experts = _experts(config, layer)
    rows = _number(config, "num_experts_per_tok") if experts else 1
    inner = _BF16 * rows * _number(config, "moe_intermediate_size" if experts else "intermediate_size")
    attending, gradients = _attending(config)
    heads_normed = config.get("model_type") != "llama"
    saved = 2 * _FLOAT32 * (hidden + 1) + attending + 3 * inner
    saved += _FLOAT32 * (queries + keys + heads) if heads_normed else 0.0
    if experts:
        results = _BF16 * rows * hidden
        saved += results + _routes(config, "num_experts" if "num_experts" in config else "num_local_experts")
        # Of the results; or of the gated activation, when the results are gone.
        working = _BF16 * hidden + max(results, 3 * inner - results)
    else:
        working = _BF16 * hidden + 3 * inner
    trained = 2 * _BF16 * hidden + (_BF16 * (queries + keys) if heads_normed else 0.0)
    return Layer("decoder", 0.0, saved, max(working, gradients), trained)


def low_rank_pays(rows: float, weight: Weight) -> bool:
    """The rule of `qat.quant.products.low_rank_pays`, without torch; there it applies to experts alone."""
    return (
        weight.matrices > 1 and rows * LOW_RANK * (weight.in_features + weight.out_features) < FORMED * weight.numbers
    )


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
