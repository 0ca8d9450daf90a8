"""How much memory a training needs, from `config.json` and the recipe's numbers alone, before anything is loaded.

Bytes, summed over what is alive at the peak of a step:

    weights      2 a number in BF16, 0.5 + 1/16 a number where the base is kept in NVFP4
    trained      factors: 16 a number (float32 master, gradient, two Adam moments)
                 all weights: 14 more a number (float32 master, two moments, BF16 gradient)
    saved        what the backward needs of the forward, a token: every layer's tensors, or with gradient checkpointing
                 only every layer's input
    layer        the largest layer while its backward runs: its tensors and their gradients
    effective    W + s B A of adapted weights, its rounded copy and its gradient; of one layer with checkpointing
    logits       one piece of the vocabulary-sized tensors (`LOGITS_PIECE` numbers)

The per-layer counts follow the modules' own code (`modeling_nemotron_h.py`, `modeling_qwen3_moe.py`); allocator
fragmentation, CUDA's context and kernels' workspaces are not in them, `RESERVE` stands for those. Nothing here needs
torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from qat.errors import UserError
from qat.train.shapes import Weight, network_layers, network_weights

GIB = 1 << 30
LOGITS_PIECE = 1 << 26
"""Numbers of one piece of logits (`qat.train.objective`)."""
RESERVE = 0.06
"""Share of a device's memory that estimates leave free."""

_BF16 = 2.0
_NVFP4 = 0.5 + 1 / 16
_FACTOR = 16.0
_MASTER = 14.0
# Bytes of a piece's logits alive at once: BF16 and float32 logits, log-probabilities and their gradient; with a teacher
# its own three and the divergence's elements.
_CROSS_ENTROPY, _DIVERGENCE = 18.0, 34.0


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


class Estimate(NamedTuple):
    """Bytes at the peak of a step, by what they are; see the module's text."""

    weights: float
    trained: float
    saved: float
    layer: float
    effective: float
    logits: float

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
    weights, layers = network_weights(config), list(network_layers(config))
    packed, quantized = set(need.packed) if need.memory == "nvfp4" else set(), set(need.quantized)
    tokens = need.batch_size * need.length
    base = sum(weight.numbers * (_NVFP4 if weight.name in packed else _BF16) for weight in weights)
    adapted = [weight for weight in weights if need.trains == "adapter" and weight.target in need.targets]
    trained = (
        sum(weight.numbers for weight in weights) * _MASTER
        if need.trains == "all"
        else sum(weight.factors(need.rank) for weight in adapted) * _FACTOR
    )
    largest = max(layer.saved for layer in layers)
    inputs = len(layers) * int(config["hidden_size"]) * _BF16
    saved = inputs if need.checkpointing else sum(layer.saved for layer in layers)
    made = _effective(weights, {weight.name for weight in adapted}, packed, quantized, need.checkpointing)
    numbers = min(LOGITS_PIECE, tokens * int(config["vocab_size"]))
    return Estimate(
        weights=base,
        trained=trained,
        saved=saved * tokens,
        layer=(2 if need.checkpointing else 1) * largest * tokens,
        effective=made,
        logits=numbers * (_DIVERGENCE if need.teacher else _CROSS_ENTROPY),
    )


def _effective(
    weights: list[Weight], adapted: set[str], packed: set[str], quantized: set[str], checkpointing: bool
) -> float:
    """Bytes of weights that a forward makes: W + s B A, Q(W + s B A), unpacked W, and the largest one's gradient."""
    by_layer: dict[int, float] = {}
    gradient = 0.0
    for weight in weights:
        copies = (weight.name in adapted) + (weight.name in quantized)
        if not copies and weight.name in packed:
            copies = 1
        by_layer[weight.layer] = by_layer.get(weight.layer, 0.0) + copies * weight.numbers * _BF16
        if weight.name in adapted:
            gradient = max(gradient, weight.numbers * _BF16)
    made = max(by_layer.values()) if checkpointing else sum(by_layer.values())
    return made + gradient


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
    config: Mapping[str, Any], need: Need, available: float, packable: Collection[str], where: str
) -> Estimate:
    """Refuse a training that will not fit, before anything is loaded.

    Args:
        config: The base's `config.json`.
        need: What is asked for.
        available: Bytes that the training device has free.
        packable: What `memory: nvfp4` would pack.
        where: Key path of the stage, for the message.

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
            + "; `train.allow: [memory]` tries all the same",
        )
    return found
