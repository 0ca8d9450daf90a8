"""Checks of a PEFT LoRA adapter: whole, trained, of the rank it says, and fitting the base.

Layouts are those of `qat.export.adapter`: a linear has `lora_A` (rank, in) and `lora_B` (out, rank); a fused expert
parameter `lora_A` (experts * rank, in) and `lora_B` (out, rank * experts).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qat.errors import UserError
from qat.export.adapter import EXPERT_PARAMETERS
from qat.export.doctor.findings import Finding, Severity, examples
from qat.export.doctor.folder import ADAPTER_WEIGHTS, CheckpointView, is_adapter
from qat.export.doctor.header import TensorInfo
from qat.export.doctor.precision import module_kind, weight_modules
from qat.export.merge import Module, find_modules
from qat.export.shards import TensorEntry
from qat.quant.names import MODEL_TYPES, checkpoint_name

ADAPTER_CONFIG = "adapter_config.json"

_KEY = re.compile(r"base_model\.model\.(?P<module>.+?)(?P<depth>(?:\.base_layer)*)\.lora_(?P<side>[AB])\.weight")
_TRAIN_AGAIN = "Train again, with a check that every adapter gets a gradient."
_RIGHT_BASE = "Give the base that the adapter was trained on; else train again on this one."
#: Factors of this many bytes are read in well under a second; larger ones only when everything is to be read.
_READ_ALWAYS = 256 << 20


class _Factors(NamedTuple):
    """The two factors of one adapted weight.

    Attributes:
        path: The module as PEFT names it, in memory.
        depth: Nesting of its wrapper: parameters of one module are told apart by it.
        a: `lora_A`, or None.
        b: `lora_B`, or None.
    """

    path: str
    depth: int
    a: TensorInfo | None
    b: TensorInfo | None


def check_adapter(view: CheckpointView, base: CheckpointView | None) -> Iterator[Finding]:
    """Check an adapter folder.

    Args:
        view: The folder.
        base: The checkpoint that the adapter belongs to.

    Yields:
        Findings; none where the folder holds a model.
    """
    if not is_adapter(view):
        return
    config = view.adapter_config or {}
    if config.get("peft_type") != "LORA":
        problem = f"The adapter is of type {config.get('peft_type')!r}; LoRA is what is checked here"
        remedy = "Load it with PEFT to check it."
        yield Finding("adapter_kind", Severity.NOTE, ADAPTER_CONFIG, problem, "Its tensors were not looked at.", remedy)
        return
    factors, others = _factors(view)
    yield from _origin(config)
    yield from _config_values(config)
    if not factors:
        consequence = "The base is served, without the persona."
        yield _error("adapter_empty", ADAPTER_WEIGHTS, "The file holds no LoRA factors", consequence, _TRAIN_AGAIN)
        return
    if others:
        problem = f"Tensors beside the LoRA factors: {examples(others)}"
        consequence = "Servers ignore or refuse them; the export cannot merge them."
        remedy = "Train plain LoRA factors."
        yield Finding("adapter_extra", Severity.WARNING, ADAPTER_WEIGHTS, problem, consequence, remedy)
    yield from _pairs(factors)
    yield from _ranks(factors, config)
    yield from _targets(factors, config)
    if base is not None and base.tensors:
        yield from _against_base(factors, config, base)
    if _size(view) <= _READ_ALWAYS:
        yield from _values(view, factors)


def check_adapter_values(view: CheckpointView, base: CheckpointView | None) -> Iterator[Finding]:
    """Check the values of an adapter that is too large for `check_adapter` to read.

    Args:
        view: The folder.
        base: Not needed.

    Yields:
        Findings.
    """
    del base
    if is_adapter(view) and _size(view) > _READ_ALWAYS:
        yield from _values(view, _factors(view)[0])


def _factors(view: CheckpointView) -> tuple[list[_Factors], list[str]]:
    """The factors by module and nesting, and the names of all other tensors."""
    found: dict[tuple[str, int], dict[str, TensorInfo]] = {}
    others = []
    for name, info in view.tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            others.append(name)
        else:
            found.setdefault((match["module"], match["depth"].count(".base_layer")), {})[match["side"]] = info
    return [_Factors(path, depth, sides.get("A"), sides.get("B")) for (path, depth), sides in found.items()], others


def _size(view: CheckpointView) -> int:
    return sum(info.nbytes for info in view.tensors.values())


def _origin(config: Mapping[str, Any]) -> Iterator[Finding]:
    named = config.get("base_model_name_or_path")
    if not named or (isinstance(named, str) and named.startswith(("/", "~", "."))):
        yield Finding(
            "adapter_base_unnamed",
            Severity.NOTE,
            f"{ADAPTER_CONFIG}: base_model_name_or_path",
            f"{named!r} is a folder of one machine" if named else "It names no base",
            "Nobody else can tell which checkpoint the adapter belongs to.",
            "Write the base's name, and revision, before publishing.",
        )


def _config_values(config: Mapping[str, Any]) -> Iterator[Finding]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    wrong = []
    if type(rank) is not int or rank < 1:
        wrong.append(f"r is {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        wrong.append(f"lora_alpha is {alpha!r}")
    if wrong:
        consequence = "The adapter cannot be scaled: servers refuse it, or it adds nothing."
        yield _error("adapter_config_value", ADAPTER_CONFIG, "; ".join(wrong), consequence, _TRAIN_AGAIN)


def _pairs(factors: list[_Factors]) -> Iterator[Finding]:
    single = [factor.path for factor in factors if factor.a is None or factor.b is None]
    if single:
        problem = f"One of the two factors is missing: {examples(single)}"
        consequence = "PEFT starts the missing one anew or servers refuse the adapter: the module is not adapted."
        yield _error("adapter_factor_missing", ADAPTER_WEIGHTS, problem, consequence, "Save the adapter again.")


def _ranks(factors: list[_Factors], config: Mapping[str, Any]) -> Iterator[Finding]:
    """Factors must share their inner extent, and linears' must be a rank of the configuration."""
    torn, other = [], []
    pattern = config.get("rank_pattern")
    named = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    ranks = {rank for rank in named if type(rank) is int and rank > 0}
    for factor in factors:
        if factor.a is None or factor.b is None:
            continue
        a, b = factor.a.shape, factor.b.shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            torn.append(f"{factor.path}: lora_A {list(a)}, lora_B {list(b)}")
        elif a[0] not in ranks and not (_may_be_experts(factor.path) and any(a[0] % rank == 0 for rank in ranks)):
            other.append(f"{factor.path}: {a[0]}")
    if torn:
        consequence = "The factors cannot be multiplied."
        yield _error("adapter_shapes", ADAPTER_WEIGHTS, examples(torn), consequence, "Save the adapter again.")
    if other:
        problem = f"Ranks that the configuration does not name (r {config.get('r')!r}): {examples(other)}"
        consequence = "alpha / r is not the scale of the training: the persona is too strong or too weak."
        yield _error("adapter_rank", ADAPTER_CONFIG, problem, consequence, "Write the rank of the factors.")


def _may_be_experts(path: str) -> bool:
    return path.rpartition(".")[2] == "experts"


def _targets(factors: list[_Factors], config: Mapping[str, Any]) -> Iterator[Finding]:
    """A name in the list of targets that stands behind no factor adapted nothing."""
    paths = {factor.path for factor in factors}
    unmatched = []
    modules = config.get("target_modules")
    for target in modules if isinstance(modules, list) else ():
        if not any(_names(target, path) for path in paths):
            unmatched.append(str(target))
    parameters = config.get("target_parameters")
    for target in parameters if isinstance(parameters, list) else ():
        if not any(_names(str(target).rpartition(".")[0], path) for path in paths):
            unmatched.append(str(target))
    if unmatched:
        yield Finding(
            "adapter_target_unmatched",
            Severity.WARNING,
            f"{ADAPTER_CONFIG}: target_modules, target_parameters",
            f"Targets without a factor: {examples(unmatched)}",
            "Nothing was adapted where these were meant: PEFT matches by name and says nothing when one fails.",
            "Correct the names to the network's; fused experts need target_parameters.",
        )


def _names(target: object, path: str) -> bool:
    return isinstance(target, str) and (path == target or path.endswith(f".{target}"))


def _against_base(factors: list[_Factors], config: Mapping[str, Any], base: CheckpointView) -> Iterator[Finding]:
    model_type = str((base.config or {}).get("model_type"))
    try:
        modules = _base_modules(base)
    except UserError as error:
        consequence = "The adapter was not compared with it."
        remedy = "Give a whole base."
        yield Finding("adapter_base_unusable", Severity.WARNING, "base", error.what, consequence, remedy)
        return
    unknown, unlike = [], []
    adapted: set[str] = set()
    for factor in factors:
        candidates = _candidates(factor.path, model_type, modules)
        if not candidates:
            unknown.append(factor.path)
        elif factor.a is not None and factor.b is not None:
            fitting = [module for module in candidates if _fits(factor.a.shape, factor.b.shape, module)]
            adapted |= {module.name for module in fitting}
            if not fitting:
                shapes = f"lora_A {list(factor.a.shape)}, lora_B {list(factor.b.shape)}"
                unlike.append(f"{factor.path}: weight {list(candidates[0].shape)}, {shapes}")
    if unknown:
        problem = f"Adapted modules that the base does not have: {examples(unknown)}"
        consequence = "Servers refuse the adapter or leave these out: part of the persona is missing."
        yield _error("adapter_module_unknown", ADAPTER_WEIGHTS, problem, consequence, _RIGHT_BASE)
    if unlike:
        problem = f"Factors that do not fit the base's weights: {examples(unlike)}"
        yield _error("adapter_shapes", ADAPTER_WEIGHTS, problem, "The adapter cannot be loaded or merged.", _RIGHT_BASE)
    if adapted:
        yield from _coverage(adapted, modules, config)


def _base_modules(base: CheckpointView) -> dict[str, Module]:
    """The base's modules with the shapes of their unpacked weights."""
    entries = {
        module.weight.name: TensorEntry(
            Path(module.weight.shard),
            module.precision,
            (*module.weight.shape[:-1], module.weight.shape[-1] * (2 if module.precision == "NVFP4" else 1)),
            module.weight.start,
            module.weight.nbytes,
        )
        for module in weight_modules(base).values()
    }
    return find_modules(entries, base.folder)


def _candidates(path: str, model_type: str, modules: Mapping[str, Module]) -> list[Module]:
    """The base's weights that a path may mean: the module itself, or a parameter of its fused experts."""
    names = (path, *(f"{path}.{parameter}" for parameter in EXPERT_PARAMETERS))
    on_disk = (checkpoint_name(name, model_type) if model_type in MODEL_TYPES else name for name in names)
    return [modules[name] for name in on_disk if name in modules]


def _fits(a: tuple[int, ...], b: tuple[int, ...], module: Module) -> bool:
    experts = module.shape[0] if module.is_experts else 1
    return len(a) == len(b) == 2 and a[1] == module.shape[-1] and b[0] == module.shape[-2] and a[0] % experts == 0


def _coverage(adapted: set[str], modules: Mapping[str, Module], config: Mapping[str, Any]) -> Iterator[Finding]:
    """Routed experts hold most weights of such a model, and a target `up_proj` reaches the shared ones alone."""
    experts = {name for name, module in modules.items() if module.is_experts}
    targets = config.get("target_modules")
    meant = sorted({str(name) for name in targets if name in EXPERT_PARAMETERS}) if isinstance(targets, list) else []
    if not experts or experts & adapted:
        return
    weights = {name: torch.Size(module.shape).numel() for name, module in modules.items()}
    share = sum(weights[name] for name in adapted) / max(sum(weights.values()), 1)
    kinds = sorted({module_kind(name) for name in adapted})
    yield Finding(
        "adapter_experts_missed",
        Severity.WARNING if meant else Severity.NOTE,
        f"{ADAPTER_CONFIG}: target_parameters",
        f"No routed expert is adapted; {', '.join(kinds)} are, {share:.1%} of the weights"
        + (f", though {', '.join(meant)} is a target" if meant else ""),
        "Most of the network is the base's: the persona is learned by a small part of it.",
        "Name them in target_parameters, for example mixer.experts.up_proj, unless they are left out on purpose.",
    )


def _values(view: CheckpointView, factors: list[_Factors]) -> Iterator[Finding]:
    broken, untrained, total = [], [], 0
    for factor in factors:
        for side, info in (("A", factor.a), ("B", factor.b)):
            if info is None or not info.elements:
                continue
            values = view.load(info.name)
            if not bool(torch.isfinite(values.float()).all()):
                broken.append(info.name)
            if side == "B":
                total += 1
                if not bool(values.any()):
                    untrained.append(factor.path)
    if broken:
        problem = f"Factors with NaN or infinity: {examples(broken)}"
        consequence = "Every answer is noise: the training diverged."
        yield _error("adapter_value", ADAPTER_WEIGHTS, problem, consequence, _TRAIN_AGAIN)
    if untrained and len(untrained) == total:
        problem = "Every lora_B is zero"
        consequence = "The adapter adds nothing: the base is served, without the persona."
        yield _error("adapter_untrained", ADAPTER_WEIGHTS, problem, consequence, _TRAIN_AGAIN)
    elif untrained:
        problem = f"lora_B is zero, as before training: {examples(untrained)} (of {total})"
        consequence = "These modules got no gradient: a fused kernel went past them, or no token reached them."
        yield Finding("adapter_dead", Severity.WARNING, ADAPTER_WEIGHTS, problem, consequence, _TRAIN_AGAIN)


def _error(code: str, place: str, problem: str, consequence: str, remedy: str) -> Finding:
    return Finding(code, Severity.ERROR, place, problem, consequence, remedy)
