"""Checks that need more than one block of a recipe: each fault names the key path where it is mended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from qat.recipe.schema import AdapterBlock, Recipe

KeyPath = tuple[str | int, ...]

PRESETS = ("nvidia-nano", "conservative", "aggressive", "lightning", "all")
# These name Mamba and MoE layers, which only this family has.
NEMOTRON_H_PRESETS = ("nvidia-nano", "conservative", "aggressive", "lightning")
_TARGETS_OF_FAMILY = {
    "nemotron_h": ("attention", "mamba", "routed_experts", "shared_experts", "mlp"),
    "qwen": ("attention", "routed_experts", "shared_experts", "mlp"),
    "llama": ("attention", "mlp"),
}


class CrossFault(NamedTuple):
    """A fault that only the whole recipe shows; `allowed` is empty where there is no closed list."""

    key: KeyPath
    value: object
    problem: str
    allowed: tuple[str, ...] = ()

    @property
    def key_path(self) -> str:
        """Dotted form of `key`."""
        return ".".join(str(part) for part in self.key)


def cross_faults(recipe: Recipe) -> list[CrossFault]:
    """All faults that need more than one block."""
    return [
        *_arms(recipe),
        *_own_presets(recipe),
        *_gate(recipe),
        *_adapters(recipe),
        *_training(recipe),
        *_data(recipe),
        *_sampling(recipe),
        *_serving(recipe),
    ]


def _repeated(values: Sequence[object]) -> Iterator[int]:
    """Positions whose value already stood further up."""
    for index, value in enumerate(values):
        if value in values[:index]:
            yield index


def _arms(recipe: Recipe) -> Iterator[CrossFault]:
    arms, own = recipe.arms, recipe.quant.presets
    known = (*PRESETS, *own)
    for index in _repeated([arm.name for arm in arms]):
        yield CrossFault(("arms", index, "name"), arms[index].name, "two arms have this name")
    for index in _repeated([(arm.kind, arm.preset) for arm in arms]):
        yield CrossFault(("arms", index), arms[index].name, "another arm has the same kind and preset")
    for index, arm in enumerate(arms):
        key = ("arms", index, "preset")
        if arm.kind in ("base", "persona"):
            if arm.preset is not None:
                yield CrossFault(key, arm.preset, f"an arm of kind {arm.kind} is not quantized and takes no preset")
        elif arm.preset is None:
            yield CrossFault(key, None, f"an arm of kind {arm.kind} needs a preset", known)
        elif arm.preset not in known:
            yield CrossFault(key, arm.preset, "unknown preset", known)
        elif arm.preset not in own:
            yield from _family(key, arm.preset, recipe.base.family)


def _own_presets(recipe: Recipe) -> Iterator[CrossFault]:
    for name, block in recipe.quant.presets.items():
        key: KeyPath = ("quant", "presets", name)
        if name in PRESETS:
            yield CrossFault(key, name, "a shipped preset has this name")
        yield from _family((*key, "like"), block.like, recipe.base.family)


def _family(key: KeyPath, preset: str, family: str) -> Iterator[CrossFault]:
    if preset in NEMOTRON_H_PRESETS and family != "nemotron_h":
        yield CrossFault(key, preset, f"this preset is for nemotron_h, base.family is {family}", ("all",))


def _gate(recipe: Recipe) -> Iterator[CrossFault]:
    gate = recipe.behavior.gate
    arms = tuple(arm.name for arm in recipe.arms)
    for side in ("candidate", "reference"):
        name = getattr(gate, side)
        if name not in arms:
            yield CrossFault(("behavior", "gate", side), name, "no arm of this name", arms)
    if gate.candidate == gate.reference:
        yield CrossFault(("behavior", "gate", "candidate"), gate.candidate, "is also the reference", arms)
    passes = tuple(sampling.name for sampling in recipe.behavior.sampling)
    if gate.sampling not in passes:
        yield CrossFault(("behavior", "gate", "sampling"), gate.sampling, "no sampling of this name", passes)


def _adapters(recipe: Recipe) -> Iterator[CrossFault]:
    yield from _adapter(("train", "adapter"), recipe.train.adapter, recipe.base.family)
    own = recipe.train.distill.adapter
    if own is not None:
        yield from _adapter(("train", "distill", "adapter"), own, recipe.base.family)
    shared_with_experts = own is None and "routed_experts" in recipe.train.adapter.targets
    if recipe.distilled_presets and recipe.distill_adapter.dropout > 0 and not shared_with_experts:
        where: KeyPath = ("train", "adapter", "dropout") if own is None else ("train", "distill", "adapter", "dropout")
        problem = "distillation quantizes W + s B A itself, so its adapter cannot have dropout: must be 0"
        yield CrossFault(where, recipe.distill_adapter.dropout, problem)


def _training(recipe: Recipe) -> Iterator[CrossFault]:
    train, distill, replies = recipe.train, recipe.train.distill, recipe.train.distill.replies
    if train.memory == "nvfp4" and train.trains == "all":
        yield CrossFault(("train", "memory"), "nvfp4", "a packed base cannot be trained itself: trains must be adapter")
    if distill.ce_weight > 0 and distill.tokens == "all":
        problem = "cross entropy would teach the prompts too: tokens must be replies where ce_weight is not 0"
        yield CrossFault(("train", "distill", "tokens"), "all", problem, ("replies",))
    for index in _repeated(train.allow):
        yield CrossFault(("train", "allow", index), train.allow[index], "named twice")
    if replies is not None and (replies.count is None) == (replies.file is None):
        key: KeyPath = ("train", "distill", "replies")
        yield CrossFault(key, replies.count, "the persona's replies need a count or a file, one of the two")


def _adapter(key: KeyPath, adapter: AdapterBlock, family: str) -> Iterator[CrossFault]:
    allowed = _TARGETS_OF_FAMILY[family]
    for index in _repeated(adapter.targets):
        yield CrossFault((*key, "targets", index), adapter.targets[index], "named twice")
    for index, target in enumerate(adapter.targets):
        if target not in allowed:
            yield CrossFault((*key, "targets", index), target, f"the family {family} has no such layers", allowed)
    if adapter.dropout > 0 and "routed_experts" in adapter.targets:
        problem = "fused experts take their factors as a parameter, which has no input to drop: must be 0"
        yield CrossFault((*key, "dropout"), adapter.dropout, problem)


def _data(recipe: Recipe) -> Iterator[CrossFault]:
    data = recipe.data
    if data.source == "generated" and data.count is None:
        yield CrossFault(("data", "count"), None, "generated conversations need a count")
    if data.source != "generated" and data.count is not None:
        yield CrossFault(("data", "count"), data.count, "a file is used whole: leave count out")
    if data.source != "generated" and recipe.train.distill.prompts is not None:
        key = ("train", "distill", "prompts")
        yield CrossFault(key, data.source, "only generated conversations have fresh prompts: leave prompts out")
    if recipe.base.revision is not None and recipe.base.model == "tiny-base":
        yield CrossFault(("base", "revision"), recipe.base.revision, "the embedded base has no revisions: leave it out")


def _sampling(recipe: Recipe) -> Iterator[CrossFault]:
    passes = recipe.behavior.sampling
    for index in _repeated([sampling.name for sampling in passes]):
        yield CrossFault(("behavior", "sampling", index, "name"), passes[index].name, "two samplings have this name")
    for index, sampling in enumerate(passes):
        key = ("behavior", "sampling", index, "seeds")
        for seed_index in _repeated(sampling.seeds):
            yield CrossFault((*key, seed_index), sampling.seeds[seed_index], "named twice")
        if sampling.temperature == 0 and len(sampling.seeds) > 1:
            yield CrossFault(key, list(sampling.seeds), "greedy answers do not depend on the seed: one is enough")


def _serving(recipe: Recipe) -> Iterator[CrossFault]:
    serve, behavior = recipe.serve, recipe.behavior
    if behavior.max_tokens >= serve.max_model_len:
        problem = f"leaves no room for a prompt: serve.max_model_len is {serve.max_model_len}"
        yield CrossFault(("behavior", "max_tokens"), behavior.max_tokens, problem)
