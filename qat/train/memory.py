"""How much memory a training needs, from `config.json` and the recipe's numbers alone, before anything is loaded.

Bytes, summed over what is alive at the fullest moment of a step:

    weights      2 a number in BF16, 0.5 + 1/16 a number where the base is kept in NVFP4; in distillation on such a
                 base the persona's factors besides, in BF16
    trained      factors: 12 a number (float32 master, two Adam moments)
                 all weights: the same beside the BF16 ones
    gradients    factors: 4 a number; all weights: 2. Of the layers that the backward has passed, or of all where an
                 earlier batch of the same step has left its own
    saved        what the backward still needs of the forward: tensors of all layers below, or with gradient
                 checkpointing their inputs and the tensors of the one layer that is computed again
    made         W + s B A of adapted weights or its rounded copy, factors in BF16; of one layer with checkpointing.
                 Experts without quantizers keep their product low-rank where that moves fewer bytes
    working      what that moment itself needs

The moments are the loss (pieces of the vocabulary-sized tensors), every layer's backward, and the optimizer's step.
The per-layer counts are those of `qat.train.shapes`; allocator fragmentation, CUDA's context and kernels' workspaces
are not in them, `RESERVE` stands for those. A test counts the same bytes in the true shape with autograd itself.
Layers below the first adapted one keep nothing, which is left out. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from qat.errors import UserError
from qat.train.shapes import Layer, Weight, low_rank_pays, network_layers, network_weights

GIB = 1 << 30
LOGITS_PIECE = 1 << 26
"""Numbers of one piece of logits (`qat.train.objective`)."""
RESERVE = 0.06
"""Share of a device's memory that estimates leave free."""

_BF16, _FLOAT32 = 2.0, 4.0
_NVFP4 = 0.5 + 1 / 16
_MASTER = 3 * _FLOAT32
# Bytes of a piece's logits alive at once, counted like the layers: float32 logits, log-probabilities and gradients;
# with a teacher both networks' and what the divergence is summed from.
_CROSS_ENTROPY, _DIVERGENCE = 12.0, 28.0


class Need(NamedTuple):
    """What is asked for.

    Attributes:
        memory: How base weights are kept: `bf16` or `nvfp4`.
        packed: Checkpoint names of the modules that `nvfp4` packs.
        trains: `adapter` or `all`.
        rank: Of the adapter.
        targets: Kinds of layers with factors.
        batch_size: Rows of a forward.
        length: Tokens of a row.
        checkpointing: Layers are computed again in the backward.
        quantized: Checkpoint names of the modules with quantizers; empty in fine-tuning.
        teacher: A divergence from a teacher is in the loss.
        accumulates: Gradients of earlier batches of the same step stand beside.
    """

    memory: str = "bf16"
    packed: Collection[str] = ()
    trains: str = "adapter"
    rank: int = 16
    targets: Collection[str] = ()
    batch_size: int = 1
    length: int = 2048
    checkpointing: bool = False
    quantized: Collection[str] = ()
    teacher: bool = False
    accumulates: bool = True


class Estimate(NamedTuple):
    """Bytes at the fullest moment of a step, by what they are; see the module's text."""

    weights: float
    trained: float
    gradients: float
    saved: float
    made: float
    working: float

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self)

    def to_json(self) -> dict[str, float]:
        """GiB by part, and the total."""
        parts = {name: round(value / GIB, 2) for name, value in self._asdict().items()}
        return {**parts, "total": round(self.total / GIB, 2)}


def estimate(config: Mapping[str, Any], need: Need) -> Estimate:
    """Estimate the peak memory of a training step.

    Args:
        config: The base's `config.json`.
        need: What is asked for.

    Returns:
        Bytes by part.

    Raises:
        UserError: The model type is not known, or a number is missing.
    """
    weights = network_weights(config)
    packed = set(need.packed) if need.memory == "nvfp4" else set()
    base = sum(_standing(weight, need, packed=weight.name in packed) for weight in weights)
    trained = _MASTER * sum(_trained(weight, need) for weight in weights)
    return max((moment._replace(weights=base, trained=trained) for moment in _moments(config, need)), key=sum)


def _standing(weight: Weight, need: Need, *, packed: bool) -> float:
    """A base weight; beside a packed one stand in distillation the persona's factors, taken to be of the student's."""
    if not packed:
        return _BF16 * weight.numbers
    persona = weight.factors(need.rank) if need.teacher and weight.target in need.targets else 0
    return _NVFP4 * weight.numbers + _BF16 * persona


class _Kept(NamedTuple):
    """Of one layer, bytes.

    Attributes:
        saved: What autograd keeps of the tokens beside the layer's input.
        made: Weights that the forward makes and the backward needs.
        working: At the fullest moment of its backward, or of a forward that is made again.
        gradients: Of what is trained in it.
    """

    saved: float
    made: float
    working: float
    gradients: float


def _moments(config: Mapping[str, Any], need: Need) -> Iterator[Estimate]:
    """What stands beside weights and optimizer at the loss, in each layer's backward, and in the optimizer's step."""
    weights, layers = network_weights(config), list(network_layers(config))
    tokens, row = need.batch_size * need.length, _BF16 * int(config["hidden_size"])
    slots = int(config.get("num_experts_per_tok") or 1)
    kept = [
        _kept(layer, [weight for weight in weights if weight.layer == number], need, tokens, slots)
        for number, layer in enumerate(layers)
    ]
    every = _gradient(need) * sum(_trained(weight, need) for weight in weights)
    behind = every if need.accumulates else 0.0
    saved, made = row * tokens * len(layers), 0.0
    if not need.checkpointing:
        saved = sum(one.saved + layer.entry * tokens for one, layer in zip(kept, layers, strict=True))
        made = sum(one.made for one in kept)
    yield Estimate(0.0, 0.0, behind, saved, made, _loss(config, need, tokens))
    transient = _unpacked(weights, need)
    for number in reversed(range(len(layers))):
        own = kept[number]
        behind = every if need.accumulates else behind + own.gradients
        if need.checkpointing:
            saved, made = row * (number + 1) * tokens + own.saved, own.made
        yield Estimate(0.0, 0.0, behind, saved, made + transient, own.working)
        saved -= own.saved + layers[number].entry * tokens
        made -= own.made
    yield Estimate(0.0, 0.0, every, 0.0, 0.0, _stepping(weights, need))


def _kept(layer: Layer, weights: list[Weight], need: Need, tokens: int, slots: int) -> _Kept:
    """Count a layer: its own tensors, what its trained weights are multiplied with, and what is made of them."""
    saved = (layer.saved + (layer.trained if need.trains == "all" else 0.0)) * tokens
    made, working, read = 0.0, layer.working * tokens, {"kept"}
    for weight in weights:
        rows = tokens * (slots if weight.matrices > 1 else 1)
        adapted, quantized = need.trains == "adapter" and weight.target in need.targets, weight.name in need.quantized
        apart = adapted and not quantized and low_rank_pays(rows, weight)
        if _trained(weight, need):
            # A quantizer gives every module a copy of its own.
            tensor = weight.name if quantized or weight.reads == "own" else weight.reads
            saved += 0.0 if tensor in read else _BF16 * weight.in_features * rows
            read.add(tensor)
        if apart:
            saved += _BF16 * need.rank * rows
            working = max(working, 2 * _BF16 * weight.out_features * rows)  # both products, before they are added
        made += _BF16 * weight.factors(need.rank) if adapted else 0.0
        made += _BF16 * weight.numbers if quantized or (adapted and not apart) else 0.0
    return _Kept(saved, made, working, _gradient(need) * sum(_trained(weight, need) for weight in weights))


def _trained(weight: Weight, need: Need) -> int:
    """Trained numbers: of its factors, or its own but for the router."""
    if need.trains == "all":
        return 0 if weight.name.endswith(".gate") else weight.numbers
    return weight.factors(need.rank) if weight.target in need.targets else 0


def _gradient(need: Need) -> float:
    """Bytes of a trained number's gradient."""
    return _FLOAT32 if need.trains == "adapter" else _BF16


def _unpacked(weights: list[Weight], need: Need) -> float:
    """The largest packed weight, which stands unpacked for the moment of its product and is not kept."""
    if need.memory != "nvfp4":
        return 0.0
    packed = set(need.packed)
    return max((_BF16 * weight.numbers for weight in weights if weight.name in packed), default=0.0)


def _loss(config: Mapping[str, Any], need: Need, tokens: int) -> float:
    """The last norm's input, the rows that are predicted from, their gradient and the teacher's; a piece of logits."""
    hidden, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
    rows = _BF16 * hidden * tokens * (4 if need.teacher else 3)
    pieces = min(LOGITS_PIECE, tokens * vocabulary) * (_DIVERGENCE if need.teacher else _CROSS_ENTROPY)
    return rows + pieces + (_FLOAT32 * hidden * vocabulary if need.trains == "all" else 0.0)


def _stepping(weights: list[Weight], need: Need) -> float:
    """AdamW takes whole weights one by one, with three copies of the largest; factors in one kernel, with none."""
    return 3 * _FLOAT32 * max(weight.numbers for weight in weights) if need.trains == "all" else 0.0


def what_fits(config: Mapping[str, Any], need: Need, available: float, packable: Collection[str]) -> list[str]:
    """Look for smaller settings that fit, the least change first.

    Args:
        config: The base's `config.json`.
        need: What was asked for and does not fit.
        available: Bytes.
        packable: What `memory: nvfp4` would pack.

    Returns:
        Sentences for the user; empty where none of the settings tried fits.
    """
    options: list[tuple[str, Need]] = []
    base = need._replace(trains="adapter", targets=need.targets or ("attention",))
    batches = [size for size in (4, 2, 1) if size < need.batch_size]
    for size in batches:
        options.append((f"batch_size {size}", need._replace(batch_size=size)))
    if not need.checkpointing:
        options.append(("gradient_checkpointing", need._replace(checkpointing=True)))
    if need.trains == "all":
        options.append(("trains: adapter", base._replace(batch_size=1, checkpointing=True)))
    small = base._replace(batch_size=1, checkpointing=True)
    options.append(("batch_size 1 with gradient_checkpointing", small))
    half = small._replace(length=max(256, need.length // 2))
    options.append((f"the same at max_length {half.length}", half))
    if need.memory == "bf16" and packable:
        four = small._replace(memory="nvfp4", packed=packable)
        options.append(("memory: nvfp4, batch_size 1, gradient_checkpointing", four))
        few = four._replace(targets=("attention",))
        options.append(("the same with factors on attention only", few))
    fitting = []
    for words, option in options:
        total = estimate(config, option).total
        if total <= available * (1 - RESERVE):
            fitting.append(f"{words} ({total / GIB:.1f} GiB)")
    return fitting[:3]


def require_memory(
    config: Mapping[str, Any],
    need: Need,
    available: float,
    packable: Collection[str],
    where: str,
    otherwise: str = "",
) -> Estimate:
    """Refuse a training that will not fit, before anything is loaded.

    Args:
        config: The base's `config.json`.
        need: What is asked for.
        available: Bytes that the training device has free.
        packable: What `memory: nvfp4` would pack.
        where: Key path of the stage, for the message.
        otherwise: A remedy besides, said between what would fit and the permission to try.

    Returns:
        The estimate.

    Raises:
        UserError: The estimate is above what is available less the reserve; says what would fit.
    """
    found = estimate(config, need)
    if found.total > available * (1 - RESERVE):
        fitting = what_fits(config, need, available, packable)
        parts = ", ".join(f"{name} {size}" for name, size in found.to_json().items())
        raise UserError(
            "The training does not fit into memory.",
            where=where,
            value=f"needs about {found.total / GIB:.1f} GiB of {available / GIB:.1f} GiB free ({parts})",
            remedy=(f"this would fit: {'; '.join(fitting)}" if fitting else "nothing smaller fits: take another device")
            + f"; {otherwise}`train.allow: [memory]` tries all the same",
        )
    return found
