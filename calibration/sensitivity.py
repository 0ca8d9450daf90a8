"""How much each group of weights costs when it alone is quantized, and the mixed preset that follows from it.

The persona reads the calibration conversations once for each format, which gives every quantizer its range. Then each
group in turn is the only one whose quantizers are on, and the divergence from the BF16 persona on held-out replies is
that group's price. Ranges stay those of the unquantized network, as in a calibration of the whole.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.calibration.groups import Group, fixed_bytes, kinds_of_groups, servable_groups
from qat.calibration.mixed import Choice, Option, choose
from qat.calibration.run import set_ranges
from qat.calibration.samples import choose_samples
from qat.data.render import IGNORED
from qat.errors import UserError
from qat.progress import progress_bar
from qat.quant import modelopt
from qat.quant.linears import linears
from qat.quant.presets import FORMATS, FP8, NVFP4, Preset
from qat.train.base import load_tokenizer
from qat.train.batches import Sample, encode_file
from qat.train.compare import Divergence, compare, make_references
from qat.train.persona import load_persona, standing_on

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qat.recipe.schema import Recipe

EVERYTHING = "everything"
"""Name of the row in which all groups are quantized together."""


class Score(NamedTuple):
    """The price of one group in one format.

    Attributes:
        group: Its name; `EVERYTHING` for all groups.
        format: One of `qat.quant.presets.FORMATS`.
        modules: The checkpoint's names.
        bytes_bf16: On disk in BF16.
        bytes: On disk in the format, scales included.
        kl: KL(persona || persona with this group quantized), nats per reply token.
        kl_se: Its standard error; None for fewer than two conversations.
        top1: Share of reply tokens at which both hold the same token most likely.
    """

    group: str
    format: str
    modules: list[str]
    bytes_bf16: int
    bytes: int
    kl: float
    kl_se: float | None
    top1: float


class Sensitivity(NamedTuple):
    """What every group costs.

    Attributes:
        kinds: By kind of layer, over all layers, and `EVERYTHING`.
        groups: Group by group; the smallest units that may have a format of their own.
        fixed_bytes: Of tensors that stay as they are.
        conversations: Held-out conversations.
        tokens: Their reply tokens.
    """

    kinds: list[Score]
    groups: list[Score]
    fixed_bytes: int
    conversations: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return {
            **self._asdict(),
            "kinds": [score._asdict() for score in self.kinds],
            "groups": [score._asdict() for score in self.groups],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Sensitivity:
        """Read what `to_json` wrote."""
        scores = {key: [Score(**score) for score in content[key]] for key in ("kinds", "groups")}
        return cls(**{**content, **scores})


def measure(
    recipe: Recipe,
    base: Path,
    persona_adapter: Path,
    train_file: Path,
    held_out: Path,
    *,
    formats: Sequence[str] = (NVFP4,),
    conversations: int = 64,
) -> Sensitivity:
    """Measure every group in every format.

    Args:
        recipe: Calibration block, chat template, length.
        base: Folder of the base checkpoint.
        persona_adapter: Adapter of fine-tuning.
        train_file: Conversations, JSONL; the recipe's calibration sample is taken from them.
        held_out: Conversations, JSONL, on whose replies divergence is counted.
        formats: Of `qat.quant.presets.FORMATS`, NVFP4 among them. Routed experts have no FP8.
        conversations: How many held-out ones are read, over categories and lengths; all where there are no more.

    Raises:
        UserError: A file does not fit, a format is unknown, or a quantizer saw no usable range.
    """
    unknown = [kind for kind in formats if kind not in FORMATS]
    if unknown or NVFP4 not in formats:
        raise UserError(
            "Unknown format.", value=", ".join(unknown), remedy=f"{NVFP4} and others of {', '.join(FORMATS)}"
        )
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    sha256 = standing_on(base, persona_adapter)
    tokenizer = load_tokenizer(recipe.base, base)
    train = encode_file(train_file, tokenizer, recipe.data.max_length).samples
    replies = _some(encode_file(held_out, tokenizer, recipe.data.max_length).samples, conversations, recipe.seed)
    calibrating = _rows(train, recipe.quant.calibration.samples, recipe.seed)
    persona = load_persona(base, persona_adapter, sha256)
    references = make_references(persona, replies)
    loaded: PreTrainedModel | None = persona
    del persona
    kinds, groups = kinds_of_groups(config), servable_groups(config)
    scores: dict[str, list[Score]] = {"kinds": [], "groups": []}
    tokens = sum(int((reference.batch.targets != IGNORED).sum()) for reference in references)
    for kind in formats:
        model = load_persona(base, persona_adapter, sha256) if loaded is None else loaded
        able = {linear.name for linear in linears(config) if kind != FP8 or linear.role != "experts"}
        modelopt.insert_quantizers(model, Preset(f"all_{kind}", dict.fromkeys(able, kind)), config)
        set_ranges(model, recipe.quant.calibration, train, calibrating, kind)
        parts = {"kinds": [_union(groups, able), *kinds], "groups": groups}
        measured = _score(
            model,
            {part: [group for group in found if able.issuperset(group.modules)] for part, found in parts.items()},
            kind,
            lambda network: compare(network, references, replies),
        )
        for part, found in measured.items():
            scores[part] += found
        # The quantizers of one format cannot become another's, and two networks need not fit into memory.
        del model
        loaded = None
        gc.collect()
    return Sensitivity(
        kinds=scores["kinds"],
        groups=scores["groups"],
        fixed_bytes=fixed_bytes(base, groups),
        conversations=len(replies),
        tokens=tokens,
    )


def choose_preset(sensitivity: Sensitivity, budget: int) -> tuple[Choice, dict[str, list[str]]]:
    """Choose a format for every group within a byte budget for the whole checkpoint's tensors.

    Args:
        sensitivity: Measured.
        budget: Bytes.

    Returns:
        The choice, and the lists of an own preset that is `like: all`: format -> modules that are not NVFP4.

    Raises:
        UserError: The smallest formats do not fit.
    """
    options: dict[str, list[Option]] = {}
    modules: dict[str, list[str]] = {}
    for score in sensitivity.groups:
        known = options.setdefault(score.group, [Option("bf16", score.bytes_bf16, 0.0)])
        known.append(Option(score.format, score.bytes, score.kl))
        modules[score.group] = score.modules
    choice = choose(options, budget, sensitivity.fixed_bytes)
    lists: dict[str, list[str]] = {}
    for group, kind in choice.formats.items():
        if kind != NVFP4:
            lists.setdefault(kind, []).extend(modules[group])
    return choice, lists


def _score(
    model: torch.nn.Module,
    groups: dict[str, list[Group]],
    kind: str,
    divergence: Callable[[torch.nn.Module], Divergence],
) -> dict[str, list[Score]]:
    """Measure groups one at a time on a calibrated model."""
    scores: dict[str, list[Score]] = {part: [] for part in groups}
    with progress_bar(f"sensitivity {kind}", sum(map(len, groups.values()))) as bar:
        for part, found in groups.items():
            for group in found:
                with only_quantized(model, group.modules):
                    seen = divergence(model)
                sizes = group.bytes("bf16"), group.bytes(kind)
                scores[part].append(Score(group.name, kind, group.modules, *sizes, seen.kl, seen.kl_se, seen.top1))
                bar.update(sum(map(len, scores.values())), f"{group.name} KL {seen.kl:.5f}")
    return scores


@contextmanager
def only_quantized(model: torch.nn.Module, modules: Sequence[str]) -> Iterator[None]:
    """Switch all quantizers off but those of some modules, for the block.

    Args:
        model: Calibrated.
        modules: The checkpoint's names.
    """
    pairs = modelopt.quantizers(model)
    with modelopt.quantizers_off(model):
        chosen = [quantizer for name in modules for quantizer in pairs[name].used().values()]
        for quantizer in chosen:
            quantizer.enable()
        try:
            yield
        finally:
            for quantizer in chosen:
                quantizer.disable()


def _union(groups: Sequence[Group], able: set[str]) -> Group:
    """All groups in one, without the modules that the format cannot hold."""
    chosen = [group for group in groups if able.issuperset(group.modules)]
    modules = [name for group in chosen for name in group.modules]
    return Group(EVERYTHING, modules, [weight for group in chosen for weight in group.weights])


def _rows(samples: Sequence[Sample], count: int, seed: int) -> list[int]:
    lengths = [len(sample.input_ids) for sample in samples]
    return choose_samples([sample.category for sample in samples], lengths, count, seed)


def _some(samples: list[Sample], count: int, seed: int) -> list[Sample]:
    return [samples[row] for row in _rows(samples, count, seed)]
