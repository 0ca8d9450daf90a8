"""Checks of what a checkpoint says about its quantization: the two files against each other and against the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qat.export.doctor.config_fields import CONFIG
from qat.export.doctor.exclusions import Exclusions, served_layers
from qat.export.doctor.findings import Finding, Severity, examples
from qat.export.doctor.folder import CheckpointView
from qat.export.doctor.precision import (
    ALGORITHMS,
    MIXED,
    QUANT_CONFIG,
    Claim,
    WeightModule,
    claims,
    foreign_method,
    module_kind,
    weight_modules,
)
from qat.quant import BLOCK

#: The algorithms that vLLM takes from `hf_quant_config.json` without a `quantization_config` beside it.
_OLD_FORM = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4")
_REQUIRED = ("group_size", "kv_cache_quant_algo", "exclude_modules")
_EXPORT_AGAIN = "Export again; both files come from one list then."
#: What vLLM never quantizes, whatever the lists say: it builds them without the quantization's configuration.
_NEVER_QUANTIZED = ("embedding", "convolution")
_VISION = ("vision_tower", "vision_model", "vit_large_projector")


def check_quantization(view: CheckpointView, base: CheckpointView | None) -> Iterator[Finding]:
    """Check the quantization's configuration.

    Args:
        view: The checkpoint.
        base: Not needed: a quantization is judged by itself.

    Yields:
        Findings.
    """
    del base
    found = claims(view)
    modules = weight_modules(view)
    if method := foreign_method(view):
        consequence = "Its scales, names and precisions are not checked here."
        place = f"{CONFIG}: quantization_config"
        problem = f"Quantized by {method!r}, not in ModelOpt's form"
        yield Finding("quant_method_unknown", Severity.NOTE, place, problem, consequence, "Trust its own tools.")
        return
    if not found:
        yield from _undeclared(modules)
        return
    for claim in found:
        yield from _fields(claim)
        yield from _required_fields(claim, claim is found[0])
        yield from _names(claim)
    yield from _readable_by_vllm(found[0])
    if len(found) == 2:
        yield from _disagreement(*found)
    if not modules:
        return
    for claim in found:
        exclusions = Exclusions(claim.excluded)
        if not exclusions.is_usable:
            problem = f"{len(claim.excluded)} excluded names: more than any model has modules"
            yield _error("quant_exclude_invalid", claim.place, problem, "They were not compared.", _EXPORT_AGAIN)
            continue
        if claim is found[0]:
            yield from _facts(claim, exclusions, modules, str((view.config or {}).get("model_type")))
        yield from _unused(claim, exclusions, modules)


def _undeclared(modules: Mapping[str, WeightModule]) -> Iterator[Finding]:
    packed = [module.name for module in modules.values() if module.is_quantized]
    if packed:
        yield _error(
            "quant_undeclared",
            CONFIG,
            f"No file says that weights are quantized, and these are: {examples(packed)}",
            "The server loads packed bytes as weights: shapes do not match, or the output is noise.",
            f"Write quantization_config and {QUANT_CONFIG} as the exporter did.",
        )


def _fields(claim: Claim) -> Iterator[Finding]:
    known = [*ALGORITHMS, MIXED]
    if claim.algorithm not in known:
        problem = f"quant_algo is {claim.content.get('quant_algo')!r}; vLLM knows {', '.join(known)}"
        consequence = 'vLLM refuses the checkpoint ("Missing \'quant_algo\'", "ModelOpt currently only supports").'
        remedy = "Name the algorithm of the tensors; null means that the recipe's patterns matched no module."
        yield _error("quant_algorithm", claim.place, problem, consequence, remedy)
    if "NVFP4" in claim.algorithm and claim.group_size not in (None, BLOCK):
        problem = f"group_size is {claim.group_size}; NVFP4 has blocks of {BLOCK}"
        consequence = "The server cuts the scales at the wrong places or refuses their shapes."
        yield _error("quant_group_size", claim.place, problem, consequence, f"Write {BLOCK}.")
    if claim.algorithm == MIXED and not claim.layers:
        problem = "MIXED_PRECISION without `quantized_layers`"
        consequence = "vLLM refuses it: no module has an algorithm."
        yield _error("quant_layers_missing", claim.place, problem, consequence, _EXPORT_AGAIN)
    strange = sorted({algo for algo in claim.layers.values() if algo not in ALGORITHMS})
    if strange:
        problem = f"quantized_layers names algorithms that vLLM does not know: {examples(map(repr, strange))}"
        yield _error("quant_algorithm", claim.place, problem, "vLLM loads these modules unquantized.", _EXPORT_AGAIN)
    if claim.kv_cache not in ("", "FP8", "NVFP4"):
        problem = f"The KV cache's format is {claim.kv_cache}; vLLM knows FP8 and NVFP4"
        consequence = "vLLM warns and keeps the cache in the model's precision: twice the memory for each token."
        remedy = "Write FP8, or null."
        yield Finding("quant_kv_cache", Severity.WARNING, claim.place, problem, consequence, remedy)


def _names(claim: Claim) -> Iterator[Finding]:
    for key in ("exclude_modules", "ignore"):
        listed = claim.content.get(key, [])
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            consequence = 'vLLM refuses it ("exclude_modules must be a list").'
            place = f"{claim.place}: {key}"
            yield _error("quant_exclude_invalid", place, "No list of names", consequence, _EXPORT_AGAIN)
    broken = [name for name in claim.excluded if _is_sentinel(name)]
    if broken:
        yield _error(
            "quant_sentinel",
            claim.place,
            f"Names that an unfinished renaming left behind: {examples(map(repr, broken))}",
            "They match no module: the server expects the modules that they meant to be quantized.",
            "Cut each name before `.\\u0000` (`--fix` does); ModelOpt 0.47 writes them with Transformers 5.",
        )


def _is_sentinel(name: str) -> bool:
    return "\0" in name or "name_sentinel" in name


def _readable_by_vllm(first: Claim) -> Iterator[Finding]:
    """Apply the rules by which vLLM 0.32 recognizes a quantization (`_normalize_quantization_config`)."""
    producer = first.document.get("producer")
    named = isinstance(producer, dict) and producer.get("name") == "modelopt"
    if named and "quantization" in first.document:
        if first.algorithm in ALGORITHMS.keys() - set(_OLD_FORM) or first.algorithm == MIXED:
            problem = f"{first.algorithm} in ModelOpt's old form, of which vLLM takes {', '.join(_OLD_FORM)}"
            consequence = f'vLLM refuses the model ("Unknown ModelOpt quant algo: {first.algorithm}").'
            remedy = "Write quantization_config into config.json, as ModelOpt does since 0.31."
            yield _error("quant_form", first.place, problem, consequence, remedy)
    elif not str(first.document.get("quant_method") or "").lower().startswith("modelopt"):
        yield _error(
            "quant_method_missing",
            first.place,
            f"quant_method is {first.document.get('quant_method')!r}, the producer {producer!r}; neither is modelopt",
            "vLLM does not recognize the quantization and builds an unquantized network.",
            'Write "quant_method": "modelopt", as ModelOpt does today.',
        )


def _required_fields(claim: Claim, first: bool) -> Iterator[Finding]:
    missing = [key for key in _REQUIRED if key not in claim.content]
    if claim.place == QUANT_CONFIG and "NVFP4" in claim.algorithm and missing:
        yield Finding(
            "quant_fields_missing",
            Severity.ERROR if first else Severity.WARNING,
            claim.place,
            f"Fields that NVFP4 needs are missing: {', '.join(missing)}",
            'vLLM refuses the file ("NVFP4 quantization requires the following fields in hf_quant_config.json")'
            + ("." if first else " where it reads it; here it reads config.json."),
            _EXPORT_AGAIN,
        )


def _disagreement(served: Claim, other: Claim) -> Iterator[Finding]:
    pairs = {
        "quant_algo": (served.algorithm, other.algorithm),
        "group_size": (served.group_size or BLOCK, other.group_size or BLOCK),
        "KV cache": (served.kv_cache or "none", other.kv_cache or "none"),
    }
    differ = [f"{key} {mine} and {its}" for key, (mine, its) in pairs.items() if mine != its]
    only = set(served.excluded) ^ set(other.excluded)
    if only:
        differ.append(f"{len(only)} excluded names stand in one file only: {examples(sorted(only))}")
    if served.layers and other.layers and served.layers != other.layers:
        differ.append("quantized_layers")
    if differ:
        yield _error(
            "quant_files_disagree",
            f"{served.place} / {other.place}",
            "; ".join(differ),
            "vLLM goes by config.json, TensorRT-LLM and SGLang by hf_quant_config.json: they serve different networks.",
            _EXPORT_AGAIN,
        )


def _facts(
    claim: Claim, exclusions: Exclusions, modules: Mapping[str, WeightModule], model_type: str
) -> Iterator[Finding]:
    """Hold the claim that vLLM goes by against what the tensors are."""
    declared = {ALGORITHMS.get(algo) for algo in (claim.algorithm, *claim.layers.values())} - {None}
    stored = {module.precision for module in modules.values() if module.is_quantized}
    if declared and not stored:
        yield _error(
            "quant_declared_only",
            claim.place,
            f"It says {claim.algorithm}; every weight is stored unquantized",
            'vLLM fails at loading ("NVFP4 weight_scale … was never loaded").',
            "Remove the claim, or export again: the quantization did not reach the weights.",
        )
        return
    wrong: dict[str, list[str]] = {"quant_fused_partial": [], "quant_exclude_partial": []}
    wrong |= {"quant_excluded_packed": [], "quant_not_excluded": [], "quant_precision": []}
    for layer in served_layers(modules):
        precisions = {modules[member].precision for member in layer.members}
        if len(precisions) > 1 and any(modules[member].is_quantized for member in layer.members):
            wrong["quant_fused_partial"].append(layer.name)
            continue
        module = modules[layer.members[0]]
        algorithm, excluded = claim.algorithm, exclusions.exclude(layer)
        if claim.algorithm == MIXED:
            algorithm = next((claim.layers[member] for member in layer.members if member in claim.layers), "")
            excluded = excluded or not algorithm
        if excluded is None:
            wrong["quant_exclude_partial"].append(layer.name)
        elif module.is_quantized and excluded:
            wrong["quant_excluded_packed"].append(layer.name)
        elif module.is_quantized and ALGORITHMS.get(algorithm, module.precision) != module.precision:
            wrong["quant_precision"].append(layer.name)
        elif not module.is_quantized and not excluded and _is_quantizable(module, model_type):
            wrong["quant_not_excluded"].append(layer.name)
    for code, names in wrong.items():
        if names:
            problem, consequence = _FACTS[code]
            yield _error(code, claim.place, f"{problem}: {examples(names)}", consequence, _EXPORT_AGAIN)


_FACTS = {
    "quant_fused_partial": (
        "Weights that the server computes as one are quantized in part",
        "vLLM builds one layer of them and cannot load both kinds.",
    ),
    "quant_exclude_partial": (
        "Some parts of a fused layer are excluded and others are not",
        'vLLM refuses it ("Detected some but not all shards of … are quantized").',
    ),
    "quant_excluded_packed": (
        "Modules that are excluded (or listed nowhere) are stored quantized",
        "The server allots an unquantized weight: shapes do not match at loading.",
    ),
    "quant_not_excluded": (
        "Modules are stored unquantized and are not excluded",
        'vLLM looks for scales that are not there ("NVFP4 weight_scale … was never loaded").',
    ),
    "quant_precision": (
        "Modules are stored in another precision than the files say",
        "The server reads the bytes as numbers of another format.",
    ),
}


def _is_quantizable(module: WeightModule, model_type: str) -> bool:
    """Whether vLLM would build this weight quantized where nothing excludes it."""
    kind = module_kind(module.name)
    if len(module.weight.shape) != 2 or kind in _NEVER_QUANTIZED or any(part in module.name for part in _VISION):
        return False
    # vLLM's Nemotron-H builds its router without the quantization's configuration, its Qwen3-MoE does not.
    return kind != "router" or (model_type == "qwen3_moe" and module.name.endswith(".gate"))


def _unused(claim: Claim, exclusions: Exclusions, modules: Mapping[str, WeightModule]) -> Iterator[Finding]:
    """Find excluded names that match nothing. A tied `lm_head` has no tensor and is named all the same."""
    known = {"lm_head", *modules, *(layer.name for layer in served_layers(modules))}
    roots = {name.partition(".")[0] for name in known}
    unused = [name for name in exclusions.unmatched(known) if not _is_sentinel(name)]
    # `mtp` or a vision tower that this checkpoint does not have is no mistake; a part of a module that it has is.
    absent = [name for name in unused if name.partition(".")[0] not in roots and "*" not in name]
    for severity, names in ((Severity.WARNING, sorted(set(unused) - set(absent))), (Severity.NOTE, absent)):
        if names:
            problem = f"Excluded names that match no module: {examples(names)}"
            consequence = "What they were meant for is not excluded, or is not in this checkpoint at all."
            remedy = "Correct the names to the tensors', or remove them."
            yield Finding("quant_exclude_unused", severity, claim.place, problem, consequence, remedy)


def _error(code: str, place: str, problem: str, consequence: str, remedy: str) -> Finding:
    return Finding(code, Severity.ERROR, place, problem, consequence, remedy)
