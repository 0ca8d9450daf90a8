"""The tensors that a checkpoint must hold, derived from `config.json` alone for the architectures that are known.

Names and shapes are those of the published checkpoints (Transformers' `modeling_nemotron_h.py`, `modeling_llama.py`,
`modeling_qwen2.py`, `modeling_qwen3.py`, `modeling_qwen3_moe.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qat.errors import UserError
from qat.quant.linears import layer_kinds

KNOWN_TYPES = ("nemotron_h", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")

#: A hostile configuration may announce any number of layers and experts.
_MAX_TENSORS = 1_000_000

Shape = tuple[int, ...]


class UnknownArchitectureError(Exception):
    """The list of tensors cannot be derived; the message says why."""


def expected_tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    """List every tensor of an unquantized checkpoint and its shape.

    Multi-token prediction layers (`mtp.…`) are not part of the list. `lm_head.weight` is, unless it is tied.

    Raises:
        UnknownArchitectureError: The model type is none of `KNOWN_TYPES`, or a size is missing or impossible.
    """
    model_type = config.get("model_type")
    if model_type not in KNOWN_TYPES:
        raise UnknownArchitectureError(f"model_type {model_type!r}; known are {', '.join(KNOWN_TYPES)}")
    expected: dict[str, Shape] = {}
    for name, shape in _nemotron_h(config) if model_type == "nemotron_h" else _decoder(config):
        expected[name] = shape
        if len(expected) > _MAX_TENSORS:
            raise UnknownArchitectureError(f"it announces more than {_MAX_TENSORS} tensors")
    return expected


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output layer is the input embedding; all known architectures have two unless the field says so."""
    return config.get("tie_word_embeddings") is True


def expert_count(config: Mapping[str, Any]) -> int | None:
    """Number of routed experts of a layer; None where the configuration has no usable field for it."""
    for key in ("n_routed_experts", "num_experts", "num_local_experts"):
        if type(value := config.get(key)) is int:
            return value
    return None


def _nemotron_h(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, vocabulary = _size(config, "hidden_size"), _size(config, "vocab_size")
    try:
        kinds = layer_kinds(config)
    except (UserError, TypeError, KeyError) as error:  # a list of lists or of nulls, in a file of a stranger
        raise UnknownArchitectureError("the kinds of its layers cannot be read") from error
    layer_of = {"mamba": _mamba, "attention": _nemotron_attention, "mlp": _nemotron_mlp, "moe": _nemotron_moe}
    yield "backbone.embeddings.weight", (vocabulary, hidden)
    for layer, kind in enumerate(kinds):
        yield f"backbone.layers.{layer}.norm.weight", (hidden,)
        for name, shape in layer_of[kind](config):
            yield f"backbone.layers.{layer}.mixer.{name}", shape
    yield "backbone.norm_f.weight", (hidden,)
    if not is_tied(config):
        yield "lm_head.weight", (vocabulary, hidden)


def _mamba(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, heads = _size(config, "hidden_size"), _size(config, "mamba_num_heads")
    inner = heads * _size(config, "mamba_head_dim")
    mixed = inner + 2 * _size(config, "n_groups") * _size(config, "ssm_state_size")
    bias = bool(config.get("use_bias"))
    yield from _linear("in_proj", inner + mixed + heads, hidden, bias)
    yield "conv1d.weight", (mixed, 1, _size(config, "conv_kernel"))
    if config.get("use_conv_bias", True):
        yield "conv1d.bias", (mixed,)
    for name in ("A_log", "D", "dt_bias"):
        yield name, (heads,)
    yield "norm.weight", (inner,)
    yield from _linear("out_proj", hidden, inner, bias)


def _nemotron_attention(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    return _attention(config, bias=False, output_bias=False)


def _nemotron_mlp(
    config: Mapping[str, Any], prefix: str = "", size: str = "intermediate_size"
) -> Iterator[tuple[str, Shape]]:
    hidden, inner, bias = _size(config, "hidden_size"), _size(config, size), bool(config.get("mlp_bias"))
    yield from _linear(f"{prefix}up_proj", inner, hidden, bias)
    yield from _linear(f"{prefix}down_proj", hidden, inner, bias)


def _nemotron_moe(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, experts = _size(config, "hidden_size"), _size(config, "n_routed_experts")
    inner = _size(config, "moe_intermediate_size")
    latent = _size(config, "moe_latent_size") if config.get("moe_latent_size") is not None else None
    yield "gate.weight", (experts, hidden)
    yield "gate.e_score_correction_bias", (experts,)
    for expert in range(experts):
        yield f"experts.{expert}.up_proj.weight", (inner, latent or hidden)
        yield f"experts.{expert}.down_proj.weight", (latent or hidden, inner)
    yield from _nemotron_mlp(config, "shared_experts.", "moe_shared_expert_intermediate_size")
    if latent:
        bias = bool(config.get("mlp_bias"))
        yield from _linear("fc1_latent_proj", latent, hidden, bias)
        yield from _linear("fc2_latent_proj", hidden, latent, bias)


def _decoder(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Llama and its relatives."""
    hidden, vocabulary = _size(config, "hidden_size"), _size(config, "vocab_size")
    model_type = config["model_type"]
    bias = model_type == "qwen2" or bool(config.get("attention_bias"))
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(_size(config, "num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        for name, shape in _attention(config, bias=bias, output_bias=bias and model_type != "qwen2"):
            yield f"{prefix}.self_attn.{name}", shape
        if model_type.startswith("qwen3"):
            for name in ("q_norm", "k_norm"):
                yield f"{prefix}.self_attn.{name}.weight", (_head_size(config),)
        for name, shape in _sparse_mlp(config) if _is_sparse(config, layer) else _gated_mlp(config):
            yield f"{prefix}.mlp.{name}", shape
    yield "model.norm.weight", (hidden,)
    if not is_tied(config):
        yield "lm_head.weight", (vocabulary, hidden)


def _gated_mlp(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, inner, bias = _size(config, "hidden_size"), _size(config, "intermediate_size"), bool(config.get("mlp_bias"))
    yield from _linear("gate_proj", inner, hidden, bias)
    yield from _linear("up_proj", inner, hidden, bias)
    yield from _linear("down_proj", hidden, inner, bias)


def _sparse_mlp(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, inner = _size(config, "hidden_size"), _size(config, "moe_intermediate_size")
    experts = expert_count(config) or 0
    yield "gate.weight", (experts, hidden)
    for expert in range(experts):
        yield f"experts.{expert}.gate_proj.weight", (inner, hidden)
        yield f"experts.{expert}.up_proj.weight", (inner, hidden)
        yield f"experts.{expert}.down_proj.weight", (hidden, inner)


def _is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    """Qwen3-MoE's own rule for which layers have experts (`Qwen3MoeDecoderLayer`)."""
    dense = config.get("mlp_only_layers")
    if config["model_type"] != "qwen3_moe" or (isinstance(dense, list) and layer in dense):
        return False
    step = _size(config, "decoder_sparse_step") if config.get("decoder_sparse_step") is not None else 1
    return (expert_count(config) or 0) > 0 and (layer + 1) % max(step, 1) == 0


def _attention(config: Mapping[str, Any], *, bias: bool, output_bias: bool) -> Iterator[tuple[str, Shape]]:
    hidden, size = _size(config, "hidden_size"), _head_size(config)
    queries = size * _size(config, "num_attention_heads")
    grouped = config.get("num_key_value_heads") is not None
    keys = size * _size(config, "num_key_value_heads" if grouped else "num_attention_heads")
    yield from _linear("q_proj", queries, hidden, bias)
    yield from _linear("k_proj", keys, hidden, bias)
    yield from _linear("v_proj", keys, hidden, bias)
    yield from _linear("o_proj", hidden, queries, output_bias)


def _head_size(config: Mapping[str, Any]) -> int:
    if config.get("head_dim") is not None:
        return _size(config, "head_dim")
    return _size(config, "hidden_size") // max(_size(config, "num_attention_heads"), 1)


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 <= value < 2**40:
        raise UnknownArchitectureError(f"`{key}` is {value!r}")
    return value
