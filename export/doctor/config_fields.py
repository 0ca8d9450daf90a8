"""What the fields of a `config.json` mean, whatever release wrote it, and what follows where one is not the base's.

Two releases of Transformers write one model in different words (`rope_theta` and `rope_parameters`, a pattern of
letters and a list of layer kinds), so configurations are compared by their `effective` fields.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qat.errors import UserError
from qat.export.doctor.findings import Finding, Severity
from qat.quant.linears import layer_kinds

CONFIG = "config.json"

_FROM_BASE = "Take the value of the base's config.json: training does not change it."


class Meaning(NamedTuple):
    """What it means for serving when a field is not the base's.

    Attributes:
        code: Of the finding.
        severity: Of the finding.
        fields: Effective fields.
        consequence: What follows.
    """

    code: str
    severity: Severity
    fields: tuple[str, ...]
    consequence: str


#: Every other field that differs is a `config_field` of unknown effect.
MEANINGS = (
    Meaning(
        "config_architecture",
        Severity.ERROR,
        ("model_type", "architectures"),
        "The server builds another network than the one that was trained, or none.",
    ),
    Meaning(
        "config_rope",
        Severity.ERROR,
        ("rope",),
        "Positions are encoded otherwise than in training: answers decay with the length of the prompt.",
    ),
    Meaning(
        "config_epsilon",
        Severity.WARNING,
        ("rms_norm_eps", "layer_norm_epsilon", "norm_eps"),
        "Every normalization divides by something else than in training.",
    ),
    Meaning(
        "config_time_step_limit",
        Severity.WARNING,
        ("time_step_limit", "time_step_min"),
        "Transformers and the publisher's code clamp Mamba's step sizes by it, vLLM never does: training and serving "
        "compute different networks.",
    ),
    Meaning(
        "config_groups",
        Severity.ERROR,
        ("n_groups",),
        "Mamba shares B and C and normalizes over other groups of heads: every Mamba layer computes something else.",
    ),
    Meaning(
        "config_router",
        Severity.ERROR,
        (
            *("norm_topk_prob", "routed_scaling_factor", "num_experts_per_tok", "n_group", "topk_group"),
            *("num_experts", "n_shared_experts", "mlp_only_layers", "decoder_sparse_step", "moe_latent_size"),
        ),
        "Tokens go to other experts, or their experts' outputs are weighted otherwise than in training.",
    ),
    Meaning(
        "config_layers",
        Severity.ERROR,
        ("layers", "mtp_layers", "num_nextn_predict_layers"),
        "Layers of another kind or number are built: weights are missing, left over or used for something else.",
    ),
    Meaning(
        "config_vocabulary",
        Severity.ERROR,
        ("vocab_size",),
        "Embedding and output have other rows than the tokenizer has tokens.",
    ),
    Meaning(
        "config_tied",
        Severity.ERROR,
        ("tie_word_embeddings",),
        "The server takes the embedding for the output layer, or looks for an output layer that is not there.",
    ),
    Meaning(
        "config_sizes",
        Severity.ERROR,
        (
            *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
            *("moe_intermediate_size", "moe_shared_expert_intermediate_size", "mamba_num_heads", "mamba_head_dim"),
            *("ssm_state_size", "conv_kernel", "expand"),
        ),
        "Weights do not fit the network that the server builds.",
    ),
    Meaning(
        "config_function",
        Severity.ERROR,
        (
            *("hidden_act", "mlp_hidden_act", "mamba_hidden_act", "attention_bias", "mlp_bias", "mamba_proj_bias"),
            *("use_bias", "use_conv_bias", "sliding_window", "use_sliding_window", "max_window_layers"),
        ),
        "Layers compute another function than the one that was trained.",
    ),
    Meaning(
        "config_dtype",
        Severity.WARNING,
        ("dtype", "residual_in_fp32", "mamba_ssm_cache_dtype"),
        "The server computes in another precision than training did.",
    ),
    Meaning(
        "config_context",
        Severity.WARNING,
        ("max_position_embeddings", "model_max_length"),
        "The server refuses prompts that the model can read, or accepts prompts that it cannot.",
    ),
    Meaning(
        "config_token_ids",
        Severity.WARNING,
        ("bos_token_id", "eos_token_id", "pad_token_id"),
        "Generation starts or stops at another token than in training.",
    ),
)
_MEANING = {field: meaning for meaning in MEANINGS for field in meaning.fields}
_ROUTER = _MEANING["norm_topk_prob"].fields

#: Fields that say who wrote the file, that only training or speed depends on, or that have checks of their own.
_IRRELEVANT = frozenset(
    (
        *("_name_or_path", "transformers_version", "auto_map", "quantization_config", "text_config", "layer_types"),
        *("use_cache", "use_mamba_kernels", "chunk_size", "num_logits_to_keep", "pretraining_tp", "time_step_rank"),
        *("initializer_range", "rescale_prenorm_residual", "attention_dropout", "hidden_dropout"),
        *("time_step_max", "time_step_floor"),
        *("router_aux_loss_coef", "router_jitter_noise", "output_router_logits", "moe_shared_expert_overlap"),
    )
)

#: What Transformers 5 takes where a configuration says nothing.
DEFAULTS: dict[str, dict[str, object]] = {
    "nemotron_h": {
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 0,
        "mamba_ssm_cache_dtype": "float32",
        "time_step_limit": [0.0, math.inf],
    },
    "llama": {"attention_bias": False, "mlp_bias": False},
    "qwen3": {"attention_bias": False, "use_sliding_window": False, "max_window_layers": 28},
    "qwen3_moe": {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
}
_DEFAULT_THETA = 10000.0

# Effective field -> the names that releases gave it.
_ALIASES = {
    "dtype": ("dtype", "torch_dtype"),
    "head_dim": ("head_dim", "attention_head_dim"),
    "num_experts": ("n_routed_experts", "num_experts", "num_local_experts"),
}
_PATTERNS = {
    "layers": ("layers_block_type", "hybrid_override_pattern"),
    "mtp_layers": ("mtp_layers_block_type", "mtp_hybrid_override_pattern"),
}
_ROPE = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
_RENAMED = frozenset(
    (*_ROPE, "num_hidden_layers", *(name for names in (*_ALIASES.values(), *_PATTERNS.values()) for name in names))
)


def flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give the fields of the language model: those of the text part where the configuration is a multimodal one."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else dict(config)


def whole(config: Mapping[str, Any], key: str) -> int | None:
    """Read a positive whole number; None where the field is absent or anything else."""
    value = config.get(key)
    return value if type(value) is int and value > 0 else None


def first(config: Mapping[str, Any], field: str) -> Any:
    """Read a field by whichever of its names is set; None where none is."""
    return next((config[name] for name in _ALIASES.get(field, (field,)) if config.get(name) is not None), None)


def token_ids(value: object) -> list[int]:
    """Read `eos_token_id` and its like: one id or a list of them; what is no id is left out."""
    return sorted({entry for entry in (value if isinstance(value, list) else [value]) if type(entry) is int})


def layers(config: Mapping[str, Any], field: str = "layers") -> list[str] | None:
    """Read the kinds of the layers (`layers`) or of the multi-token prediction ones (`mtp_layers`).

    Returns:
        `mamba`, `attention`, `moe` or `mlp` for each layer; None where the configuration does not list them or lists
        others.
    """
    words, letters = (config.get(name) for name in _PATTERNS[field])
    try:
        return layer_kinds({"layers_block_type": words, "hybrid_override_pattern": letters})
    except (UserError, TypeError):  # a list of lists, in a file of a stranger
        return None


def effective(config: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a configuration to the fields that a server acts on, the same for every release that wrote it.

    Args:
        config: `config.json`.

    Returns:
        The fields that are set, by their effective names (`layers`, `mtp_layers`, `rope`, `dtype`, `head_dim`,
        `num_experts`, else their own), and the defaults of known model types.
    """
    flat = flattened(config)
    fields = {key: value for key, value in flat.items() if key not in _RENAMED | _IRRELEVANT and value is not None}
    fields |= {field: value for field in _ALIASES if (value := first(flat, field)) is not None}
    if isinstance(fields.get("dtype"), str):
        fields["dtype"] = fields["dtype"].removeprefix("torch.")
    heads, hidden = whole(flat, "num_attention_heads"), whole(flat, "hidden_size")
    if "head_dim" not in fields and heads and hidden:
        fields["head_dim"] = hidden // heads
    if "time_step_limit" in fields:
        fields["time_step_limit"] = _plain_floats(fields["time_step_limit"])
    fields |= {key: token_ids(fields[key]) for key in fields if key.endswith("_token_id")}
    kinds = layers(flat)
    fields |= {"layers": kinds or flat.get("num_hidden_layers")}
    if flat.get("num_nextn_predict_layers"):
        fields |= {"mtp_layers": layers(flat, "mtp_layers")}
    fields = DEFAULTS.get(str(flat.get("model_type")), {}) | fields
    if flat.get("model_type") != "nemotron_h":  # whose attention knows no positions, whatever the file says
        fields["rope"] = _rope(flat)
    elif kinds is not None and "moe" not in kinds:
        fields = {key: value for key, value in fields.items() if key not in _ROUTER and not key.startswith("moe_")}
    return fields


def differences(config: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[Finding]:
    """Compare a configuration with the one it was made from.

    Yields:
        One finding per effective field that differs, with what follows from it.
    """
    ours, theirs = effective(config), effective(base)
    text = base.get("text_config")
    if isinstance(text, dict) and "text_config" not in config:
        yield Finding(
            "config_wrapper_lost",
            Severity.ERROR,
            CONFIG,
            f"The base wraps a {text.get('model_type')!r} in a {base.get('model_type')!r}, the checkpoint does not",
            "Servers that know the wrapped model only do not load it; tensor names lose their prefix.",
            "Keep the base's whole config.json and its tensor names.",
        )
        return
    for field in sorted(ours.keys() | theirs.keys()):
        mine, its = ours.get(field), theirs.get(field)
        lost_by_itself = field in ("architectures", "model_type") and not mine
        if mine != its and not lost_by_itself:
            yield _difference(field, mine, its)


def _difference(field: str, mine: object, its: object) -> Finding:
    meaning = _MEANING.get(field)
    place = f"{CONFIG}: {'/'.join(_ALIASES.get(field, _PATTERNS.get(field, (field,))))}"
    problem = f"{_shown(mine)} here, {_shown(its)} in the base"
    if meaning is not None:
        return Finding(meaning.code, meaning.severity, place, problem, meaning.consequence, _FROM_BASE)
    if mine is None:
        consequence = "The library's default stands in for a value that the base was trained with."
        return Finding("config_field_lost", Severity.WARNING, place, problem, consequence, _FROM_BASE)
    severity = Severity.NOTE if its is None else Severity.WARNING
    consequence = "What the field does is not known here; the network may compute something else."
    return Finding("config_field", severity, place, problem, consequence, _FROM_BASE)


def _shown(value: object) -> str:
    text = "nothing" if value is None else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _plain_floats(value: object) -> object:
    """Read floats as Transformers 5 tags them: `{"__float__": "Infinity"}`."""
    if isinstance(value, list | tuple):
        return [_plain_floats(entry) for entry in value]
    if isinstance(value, dict) and value.get("__float__") in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return value


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Gather the rotary embedding's parameters in the form of Transformers 5."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    rope = dict(scaling) if isinstance(scaling, dict) else {}
    kind = rope.pop("type", "default")
    rope.setdefault("rope_type", kind)
    rope.setdefault("rope_theta", config.get("rope_theta") or _DEFAULT_THETA)
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    return rope
