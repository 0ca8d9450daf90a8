"""Checks of `config.json` and `generation_config.json`: in themselves, against the tensors, and against the base's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qat.export.doctor.config_fields import CONFIG, differences, first, flattened, layers, token_ids, whole
from qat.export.doctor.findings import Finding, Severity, examples
from qat.export.doctor.folder import CheckpointView
from qat.quant.names import MODEL_TYPES

GENERATION = "generation_config.json"

_WRONG_CONFIG = "Take config.json from the base, or correct the field."
_NO_LOAD = "The network cannot be built, or is built with shapes that the weights do not have."

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "n_routed_experts", "num_experts", "num_local_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"),
)
_VOCABULARY_TENSORS = (".embed_tokens.weight", "backbone.embeddings.weight", "lm_head.weight")
_EPSILONS = ("layer_norm_epsilon", "rms_norm_eps", "norm_eps")
#: Settings with which vLLM samples where a request does not say otherwise (`--generation-config auto`).
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")


def check_config(view: CheckpointView, base: CheckpointView | None) -> Iterator[Finding]:
    """Check a checkpoint's `config.json`.

    Args:
        view: The checkpoint.
        base: The checkpoint that it was made from.

    Yields:
        Findings; nothing where there is no readable `config.json` (reading reports that).
    """
    if view.config is None:
        return
    config = flattened(view.config)
    yield from _architecture(view.config)
    yield from _remote_code(view, view.config)
    invalid = [key for key in _SIZES if config.get(key) is not None and whole(config, key) is None]
    for key in invalid:
        yield _wrong("config_value", key, f"{config[key]!r} is no positive whole number", _NO_LOAD)
    yield from _layer_count(config)
    yield from _heads(config)
    yield from _experts(config)
    yield from _epsilons(config)
    yield from _dtype(view, config)
    yield from _vocabulary(view, config)
    if base is not None and base.config is not None:
        yield from differences(view.config, base.config)


def check_generation(view: CheckpointView, base: CheckpointView | None) -> Iterator[Finding]:
    """Check a checkpoint's `generation_config.json` against its `config.json` and against the base's.

    Args:
        view: The checkpoint.
        base: The checkpoint that it was made from.

    Yields:
        Findings.
    """
    own = view.generation_config or {}
    config = flattened(view.config or {})
    vocabulary = whole(config, "vocab_size")
    for place, source in ((CONFIG, config), (GENERATION, own)):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            outside = [token for token in token_ids(source.get(key)) if vocabulary and not 0 <= token < vocabulary]
            if outside:
                yield Finding(
                    "token_id_outside",
                    Severity.ERROR,
                    f"{place}: {key}",
                    f"{', '.join(map(str, outside))} is outside the vocabulary of {vocabulary} tokens",
                    "The token cannot be produced or looked up: generation does not stop, or the engine fails.",
                    "Write the id that the tokenizer has for the token.",
                )
    if base is None or base.generation_config is None:
        return
    if view.generation_config is None:
        if GENERATION not in view.files:
            yield Finding(
                "generation_missing",
                Severity.WARNING,
                GENERATION,
                "The base has this file, the checkpoint does not",
                "Servers take further stop tokens and the publisher's sampling defaults from it.",
                "Copy the base's file.",
            )
        return
    yield from _generation_differences(own, base.generation_config)


def _generation_differences(own: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[Finding]:
    lost = sorted(set(token_ids(base.get("eos_token_id"))) - set(token_ids(own.get("eos_token_id"))))
    if lost:
        yield Finding(
            "generation_stop_token",
            Severity.WARNING,
            f"{GENERATION}: eos_token_id",
            f"The base stops at {', '.join(map(str, lost))}, this does not",
            "Answers run on behind their end, where the model writes one of these tokens.",
            "Copy the base's file.",
        )
    other = [key for key in _SAMPLING if own.get(key) != base.get(key)]
    if other:
        shown = "; ".join(f"{key} {own.get(key)!r} here, {base.get(key)!r} in the base" for key in other)
        yield Finding(
            "generation_sampling",
            Severity.WARNING,
            GENERATION,
            shown,
            "vLLM samples with these wherever a request does not say otherwise.",
            "Copy the base's file, unless the change is meant.",
        )


def _architecture(config: Mapping[str, Any]) -> Iterator[Finding]:
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and all(isinstance(name, str) for name in architectures)):
        yield _wrong(
            "config_architectures_missing",
            "architectures",
            f"{architectures!r} names no class",
            "Servers choose the model's class by it; ModelOpt's export stops with "
            "\"'NoneType' object is not iterable\".",
        )
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        yield _wrong(
            "config_model_type_missing",
            "model_type",
            f"{config.get('model_type')!r} names no model type",
            "Transformers and vLLM cannot choose the configuration's class.",
        )


def _remote_code(view: CheckpointView, config: Mapping[str, Any]) -> Iterator[Finding]:
    """`auto_map` names classes as `file.Class`, or `repository--file.Class` where the code lies elsewhere."""
    auto_map = config.get("auto_map")
    entries = auto_map.values() if isinstance(auto_map, dict) else ()
    named = {entry.rpartition(".")[0] for entry in entries if isinstance(entry, str) and "--" not in entry}
    missing = sorted(f"{module}.py" for module in named if f"{module}.py" not in view.files)
    if missing:
        native = config.get("model_type") in MODEL_TYPES
        yield Finding(
            "config_remote_code",
            Severity.NOTE if native else Severity.WARNING,
            f"{CONFIG}: auto_map",
            f"It names code that is not in the folder: {examples(missing)}",
            "Loading with trust_remote_code fails"
            + ("; without it the library's own class is used." if native else ", and the library may have no class."),
            "Remove auto_map where the library knows the model type; else copy the code that you trust from the base.",
        )


def _layer_count(config: Mapping[str, Any]) -> Iterator[Finding]:
    count = whole(config, "num_hidden_layers")
    named = [name for name in ("layers_block_type", "hybrid_override_pattern") if config.get(name) is not None]
    forms = {name: layers({name: config[name]}) for name in named}
    for name, kinds in forms.items():
        if kinds is None:
            yield _wrong("config_pattern", name, "It lists kinds of layers that the model type does not have", _NO_LOAD)
        elif count is not None and len(kinds) != count:
            problem = f"It lists {len(kinds)} layers, num_hidden_layers is {count}"
            yield _wrong("config_pattern", name, problem, _NO_LOAD)
    if len(forms) == 2 and len({tuple(kinds or ()) for kinds in forms.values()}) == 2:
        problem = "layers_block_type and hybrid_override_pattern list different layers"
        yield _wrong("config_pattern", "layers_block_type", problem, "Releases build different networks from it.")
    if config.get("model_type") == "nemotron_h" and not forms:
        yield _wrong("config_pattern", "layers_block_type", "The kinds of the layers are not listed", _NO_LOAD)


def _heads(config: Mapping[str, Any]) -> Iterator[Finding]:
    heads, shared = whole(config, "num_attention_heads"), whole(config, "num_key_value_heads")
    hidden = whole(config, "hidden_size")
    if heads and shared and heads % shared:
        yield _wrong("config_heads", "num_key_value_heads", f"{shared} do not divide {heads} heads", _NO_LOAD)
    if heads and hidden and first(config, "head_dim") is None and hidden % heads:
        problem = f"{heads} heads do not divide a hidden size of {hidden}, and there is no head_dim"
        yield _wrong("config_heads", "num_attention_heads", problem, _NO_LOAD)
    mamba, groups = whole(config, "mamba_num_heads"), whole(config, "n_groups")
    if mamba and groups and mamba % groups:
        yield _wrong("config_heads", "n_groups", f"{groups} groups do not divide {mamba} Mamba heads", _NO_LOAD)


def _experts(config: Mapping[str, Any]) -> Iterator[Finding]:
    experts, chosen = first(config, "num_experts"), whole(config, "num_experts_per_tok")
    groups, kept = whole(config, "n_group"), whole(config, "topk_group")
    if type(experts) is int and chosen and chosen > experts:
        problem = f"{chosen} of {experts} experts are to be chosen"
        yield _wrong("config_experts", "num_experts_per_tok", problem, "The router fails at the first token.")
    if groups and type(experts) is int and experts % groups:
        yield _wrong("config_experts", "n_group", f"{groups} groups do not divide {experts} experts", _NO_LOAD)
    if groups and kept and kept > groups:
        problem = f"{kept} of {groups} groups are to be kept"
        yield _wrong("config_experts", "topk_group", problem, "The router fails at the first token.")


def _epsilons(config: Mapping[str, Any]) -> Iterator[Finding]:
    found = {key: config[key] for key in _EPSILONS if config.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, int | float) or not 0 < value <= 1e-2:
            consequence = "Normalizations divide by zero or flatten their input."
            yield _wrong("config_epsilon_value", key, f"{value!r} is no small positive number", consequence)
    if len({value for value in found.values() if isinstance(value, int | float)}) > 1:
        problem = ", ".join(f"{key} {value!r}" for key, value in found.items())
        consequence = "Which of them a server takes depends on its code: train and serve normalize differently."
        yield _wrong("config_epsilon_value", "/".join(found), problem, consequence)


def _dtype(view: CheckpointView, config: Mapping[str, Any]) -> Iterator[Finding]:
    given = {key: str(config[key]).removeprefix("torch.") for key in ("dtype", "torch_dtype") if config.get(key)}
    if len(set(given.values())) > 1:
        consequence = "Transformers 5 and older releases load the model in different precisions."
        yield _wrong("config_dtype_conflict", "dtype/torch_dtype", ", ".join(given.values()), consequence)
        return
    dtype = next(iter(given.values()), None)
    stored: dict[str, int] = {}
    for tensor in view.tensors.values():
        if tensor.dtype in _DTYPES.values() and len(tensor.shape) > 1:
            stored[tensor.dtype] = stored.get(tensor.dtype, 0) + tensor.elements
    most = max(stored, key=lambda name: stored[name], default=None)
    if dtype in _DTYPES and most is not None and _DTYPES[dtype] != most:
        yield Finding(
            "config_dtype_stored",
            Severity.WARNING,
            f"{CONFIG}: dtype",
            f"It says {dtype}; most weights that are not quantized are stored as {most}",
            "The server converts the weights at loading: another precision than the file's, or twice the memory.",
            "Write the dtype that the weights are stored in.",
        )


def _vocabulary(view: CheckpointView, config: Mapping[str, Any]) -> Iterator[Finding]:
    rows = whole(config, "vocab_size")
    other = [
        tensor
        for tensor in view.tensors.values()
        if tensor.name.endswith(_VOCABULARY_TENSORS) and tensor.shape and rows is not None and tensor.shape[0] != rows
    ]
    if other:
        problem = f"{rows} tokens; {other[0].shape[0]} rows have: {examples(tensor.name for tensor in other)}"
        yield _wrong("config_vocabulary_rows", "vocab_size", problem, _NO_LOAD)


def _wrong(code: str, key: str, problem: str, consequence: str) -> Finding:
    return Finding(code, Severity.ERROR, f"{CONFIG}: {key}", problem, consequence, _WRONG_CONFIG)
