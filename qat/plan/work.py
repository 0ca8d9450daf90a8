"""What a forward and a backward have to do: operations, bytes moved, and kernels launched.

Counted from `config.json`; which of it takes how long is fitted to measurements in `qat.plan.timing`. A step consists
of passes over the blocks: the forward, with gradient checkpointing the forward once more, and the backward, which for
frozen weights is one product for the gradient of the input. Weights with an adapter move bytes of their own:

    cheapest   fine-tuning here: the low-rank product on the tokens where that moves fewer bytes, else as `formed`
    formed     distillation and validation here: W + s B A is made in every forward; the factors' gradients come from
               the tokens
    dense      PEFT's way with expert parameters: W + s B A is made, and so is its whole gradient
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from qat.train.shapes import FORMED, LOW_RANK, Layer, Weight, low_rank_pays, network_layers, network_weights

_BF16 = 2.0
GRADIENT = 6.0
"""Bytes a number of an adapted weight that its whole gradient moves: written, and read for either factor."""
ROUNDED = 4.0
"""Bytes a number of a weight that is rounded to four bits in a forward (read, write)."""


_HEAD_PASSES = {"whole": (1, 2), "pieces": (1, 3), "divergence": (2, 5)}


class Step(NamedTuple):
    """One forward and backward.

    Attributes:
        tokens: Rows times their padded length.
        length: Of a row.
        targets: Positions whose logits are made.
        checkpointing: Blocks are computed again in the backward.
        adapted: Names of the weights with an adapter.
        route: How these are computed: `cheapest`, `formed` or `dense`; see the module's text.
        rounded: Names of the weights that are rounded to four bits.
        backward: False for a forward alone.
        logits: Products with the output layer: `whole` makes the targets' once and takes the gradient, `pieces` makes
            them a second time in the backward, `divergence` also the teacher's.
    """

    tokens: float
    length: float
    targets: float
    checkpointing: bool = False
    adapted: Collection[str] = ()
    route: str = "formed"
    rounded: Collection[str] = ()
    backward: bool = True
    logits: str = "pieces"


class Work(NamedTuple):
    """What a step has to do.

    Attributes:
        flops: Of matrix products and scans.
        streamed: Bytes of base weights, read once a pass.
        made: Bytes moved for adapters and for rounding.
        activations: Bytes of activations written and read.
        block_passes: Blocks times passes: what the processor has to issue.
        weight_passes: Adapted and rounded expert weights times passes (of linears that is two small kernels).
    """

    flops: float
    streamed: float
    made: float
    activations: float
    block_passes: float
    weight_passes: float


@dataclass(frozen=True)
class Network:
    """A base as the planner sees it.

    Attributes:
        weights: Its matrices; embeddings and output layer are the ones outside of layers.
        layers: What each layer keeps.
        active: How many of an expert layer's matrices one token is multiplied with.
        mixing: FLOPs beside the products, a token.
        mixing_per_position: The same a token and position that it looks back on (attention).
    """

    weights: tuple[Weight, ...]
    layers: tuple[Layer, ...]
    active: int
    mixing: float
    mixing_per_position: float

    @property
    def parameters(self) -> int:
        """Numbers of all matrices."""
        return sum(weight.numbers for weight in self.weights)

    @property
    def active_parameters(self) -> int:
        """Numbers that one token is multiplied with, the output layer included, the embedding not."""
        return sum(self._active(weight) for weight in self.weights if weight.name != "embeddings")

    def named(self, targets: Collection[str]) -> list[Weight]:
        """The weights that an adapter with these targets reaches."""
        return [weight for weight in self.weights if weight.target in targets]

    def _active(self, weight: Weight) -> int:
        return weight.numbers // weight.matrices * (self.active if weight.matrices > 1 else 1)

    def work(self, step: Step) -> Work:
        """Count what a step has to do."""
        inside = [weight for weight in self.weights if weight.layer >= 0]
        outside = sum(weight.numbers for weight in self.weights if weight.name == "lm_head") or sum(
            weight.numbers for weight in self.weights if weight.name == "embeddings"
        )
        forwards = 1 + (step.checkpointing and step.backward)
        passes = forwards + step.backward
        adapted = [weight for weight in inside if weight.name in step.adapted]
        apart = [w for w in adapted if step.route == "cheapest" and low_rank_pays(self._rows(w, step.tokens), w)]
        formed = [weight for weight in adapted if weight not in apart]
        dense = formed if step.route == "dense" and step.backward else []
        rounded = sum(weight.numbers for weight in inside if weight.name in step.rounded)
        mixing = self.mixing + self.mixing_per_position * step.length / 2
        flops = step.tokens * passes * (2 * sum(map(self._active, inside)) + mixing)
        flops += step.tokens * 2 * sum(map(self._active, dense))
        flops += step.targets * _HEAD_PASSES[step.logits][step.backward] * 2 * outside
        return Work(
            flops=flops,
            streamed=passes * _BF16 * (sum(map(self._read(step.tokens), inside)) + outside),
            made=FORMED * forwards * sum(weight.numbers for weight in formed)
            + GRADIENT * sum(weight.numbers for weight in dense)
            + sum(LOW_RANK * self._rows(w, step.tokens) * (w.in_features + w.out_features) for w in apart)
            + ROUNDED * forwards * rounded,
            activations=step.tokens * passes * sum(layer.entry + layer.saved for layer in self.layers),
            block_passes=passes * len(self.layers),
            weight_passes=passes
            * sum((w.name in step.adapted) + (w.name in step.rounded) for w in inside if w.matrices > 1),
        )

    def _rows(self, weight: Weight, tokens: float) -> float:
        """Rows that are multiplied with a weight: of experts the pairs of token and expert."""
        return tokens * (self.active if weight.matrices > 1 else 1)

    def _read(self, tokens: float) -> Callable[[Weight], float]:
        """Numbers of a weight that a pass reads: of experts those that some token reaches, routes taken as random."""

        def numbers(weight: Weight) -> float:
            if weight.matrices == 1:
                return float(weight.numbers)
            return float(weight.numbers * (1 - (1 - self.active / weight.matrices) ** tokens))

        return numbers


def read_network(config: Mapping[str, Any]) -> Network:
    """Read a base's sizes.

    Args:
        config: `config.json`, of a model with several towers the language model's part.

    Raises:
        UserError: The model type is not known, or a number is missing.
    """
    layers = tuple(network_layers(config))
    kinds = [layer.kind for layer in layers]
    mamba = kinds.count("mamba")
    attending = sum(kind in ("attention", "decoder") for kind in kinds)
    heads = int(config.get("num_attention_heads") or 0)
    size = int(config.get("head_dim") or (config["hidden_size"] // heads if heads else 0))
    return Network(
        weights=tuple(network_weights(config)),
        layers=layers,
        active=int(config.get("num_experts_per_tok") or 1),
        mixing=mamba * _scan_flops(config) if mamba else 0.0,
        mixing_per_position=attending * 4.0 * heads * size,
    )


def _scan_flops(config: Mapping[str, Any]) -> float:
    """Of Mamba-2's chunked scan, a token and layer (Dao and Gu 2024, arXiv:2405.21060, section 6)."""
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    state, chunk = config["ssm_state_size"], config["chunk_size"]
    return float(2 * chunk * (config["n_groups"] * state + inner) + 4 * state * inner)
