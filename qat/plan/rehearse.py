"""The rehearsal: a few steps of every stage on the true shape, timed, and what the whole recipe takes by them.

The base has random weights; rows have the real data's lengths and random tokens. What runs on them is what trains:
the loops with their guard, optimizer and losses, the adapters, the quantizers and their calibration. Of each stage the
longest, a middle and the shortest batch are timed, and a line through them (a fixed time a step, and a time a token)
prices all batches of the recipe. What no step shows, reading the base and writing checkpoints, is added at a disk's
measured speed, as in the estimate (`qat.plan.estimate`).
"""

from __future__ import annotations

import gc
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.calibration.run import set_ranges
from qat.data.render import IGNORED
from qat.plan.estimate import CHECKPOINT_BYTES, DISK_READ, DISK_WRITE
from qat.plan.measure import Rate, clock_of, device_name, line, peak, reset_peak, timed
from qat.plan.random_base import random_base
from qat.plan.rows import Row, Rows, estimate_rows
from qat.plan.shape import find_shape
from qat.plan.stages import STUDENT, Pass, Stage, training_stages
from qat.quant.modelopt import collect_state, insert_quantizers
from qat.quant.presets import preset_of
from qat.quant.state import QuantState
from qat.storage import write_json
from qat.train.batches import Sample, evaluation_order
from qat.train.before import packed_by, require_fits
from qat.train.compare import hidden_of_rows
from qat.train.distill import DistillLoop, Lessons
from qat.train.loop import Loop, Plan
from qat.train.sft import SftLoop, make_trainable, make_tunable
from qat.train.shapes import MODEL_TYPES
from qat.train.student import quantize_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qat.recipe.schema import DistillBlock, Recipe, SftBlock

_WARM, _ROUNDS = 4, 2
"""Steps that are not timed (the guard watches the first and the fourth), and how often each batch is timed after."""
_HELD_OUT = 8
"""Rows that are validated on: one evaluation batch."""


class RehearsedStage(NamedTuple):
    """One stage of the recipe.

    Attributes:
        name: As in the run's receipt.
        seconds: Projected.
        parts: Seconds by what they are spent on.
        rates: What was measured.
        peak_gib: Peak memory once the network stood: the GPU's, or on a CPU this process's (which never falls). None
            where nothing ran, because the stages before have measured all that this one does.
        took: Seconds that measuring it took, building the network included.
    """

    name: str
    seconds: float
    parts: dict[str, float]
    rates: dict[str, Rate]
    peak_gib: float | None
    took: float

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return {
            "stage": self.name,
            "seconds": round(self.seconds, 1),
            "parts": {name: round(value, 1) for name, value in self.parts.items()},
            "rates": {
                name: {"fixed_s": round(rate.fixed, 4), "per_1000_tokens_s": round(1000 * rate.per_token, 4)}
                for name, rate in self.rates.items()
            },
            "peak_gib": None if self.peak_gib is None else round(self.peak_gib, 2),
            "took": round(self.took, 1),
        }


class Rehearsal(NamedTuple):
    """What was measured and projected.

    Attributes:
        recipe: Its name.
        device: What it ran on.
        shape: Where the base's sizes come from.
        rows: Where the lengths come from.
        stages: Of the training.
        took: Seconds of the rehearsal itself.
    """

    recipe: str
    device: str
    shape: str
    rows: str
    stages: list[RehearsedStage]
    took: float

    @property
    def seconds(self) -> float:
        """Projected for the whole training."""
        return sum(stage.seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return {
            "recipe": self.recipe,
            "device": self.device,
            "shape": self.shape,
            "rows": self.rows,
            "stages": [stage.to_json() for stage in self.stages],
            "seconds": round(self.seconds, 1),
            "took": round(self.took, 1),
            "how": "a line through the longest, a middle and the shortest batch of each stage, times all its batches; "
            "base and checkpoints at a disk's measured speed; export and behaviour suite not included",
        }


def rehearse(recipe: Recipe, told: Callable[[RehearsedStage], None] = lambda _: None) -> Rehearsal:
    """Run a few steps of every training stage on random weights, and project the whole recipe.

    Args:
        recipe: The recipe; of its base only the sizes are needed.
        told: Called with each stage as soon as it is measured.

    Raises:
        UserError: The sizes are not known here, or a stage does not fit into memory (with what would).
    """
    start = time.monotonic()
    shape = find_shape(recipe.base)
    rows = estimate_rows(recipe, shape.folder)
    stages = training_stages(recipe, rows)
    with tempfile.TemporaryDirectory(prefix="qat-rehearsal-") as scratch:
        stand_in = Path(scratch) / "base"
        # Code that a config names is never run, and nothing is looked for beside it.
        write_json(stand_in / "config.json", {key: value for key, value in shape.text.items() if key != "auto_map"})
        stage = _Rehearser(recipe, shape.text, rows, stand_in, Path(scratch))
        done = []
        for one in stages:
            done.append(stage.run(one))
            told(done[-1])
    return Rehearsal(recipe.name, device_name(), shape.origin, rows.how, done, time.monotonic() - start)


class _Rehearser:
    """Runs one stage after the other; each builds the network anew, as each loads it in a run."""

    def __init__(self, recipe: Recipe, config: dict[str, Any], rows: Rows, base: Path, scratch: Path) -> None:
        self._recipe, self._config, self._rows = recipe, config, rows
        self._base, self._scratch = base, scratch
        self._packed = packed_by(recipe, base)
        self._states: dict[str, QuantState] = {}
        self._known: dict[tuple[str, str], Rate] = {}
        self._trainable = 0
        self._base_bytes = 0.0
        if config.get("model_type") in MODEL_TYPES:  # before anything is built
            require_fits(recipe, base, "sft", self._packed, [])
            for preset in recipe.distilled_presets:
                require_fits(recipe, base, "distill", self._packed, list(self._formats(preset)))

    def run(self, stage: Stage) -> RehearsedStage:
        """Measure what a stage does that is not known yet, and project it."""
        start, ran = time.monotonic(), True
        reset_peak()
        if stage.name == "sft":
            self._fine_tune(stage)
        elif stage.name.startswith("calibrate/"):
            self._calibrate(str(stage.preset))
        elif stage.name.startswith("distill/"):
            self._distill(stage)
        elif ("score", STUDENT) not in self._known:  # plain NVFP4 arms alone: nothing was distilled
            self._score_student(stage)
        else:
            ran = False
        highest = peak() if ran else None
        gc.collect()
        shutil.rmtree(self._scratch / "stage", ignore_errors=True)
        rates: dict[str, Rate] = {}
        parts: dict[str, float] = {}
        for part in stage.passes:
            rate = self._known[self._key(part, stage)]
            label = f"{part.kind} {part.network}"
            rates[label] = rate
            times = part.repeats * (part.steps or len(part.batches))
            parts[label] = parts.get(label, 0.0) + rate.seconds(times, part.tokens)
        parts["load"] = stage.loads * 2 * self._base_bytes / DISK_READ
        if stage.saves:
            parts["save"] = stage.saves * CHECKPOINT_BYTES * self._trainable / DISK_WRITE
        return RehearsedStage(stage.name, sum(parts.values()), parts, rates, highest, time.monotonic() - start)

    def _key(self, part: Pass, stage: Stage) -> tuple[str, str]:
        """Calibrating reads with collectors on, the teacher without."""
        return (stage.name if stage.name.startswith("calibrate/") else part.kind, part.network)

    # The stages.

    def _fine_tune(self, stage: Stage) -> None:
        block = self._recipe.train.sft
        samples, held_out = self._samples(self._rows.train), self._samples(_middle(self._rows.validation))
        model, _ = make_tunable(self._recipe, self._build())
        order, tokens = _chosen([row.tokens for row in self._rows.train], block)
        plan = self._plan("rehearsing sft", order, "replies", block, "eval_loss")
        loop = SftLoop(model, samples, held_out, block, plan, self._scratch / "stage")
        self._train(loop, stage, tokens, held_out)

    def _calibrate(self, preset: str) -> None:
        block = self._recipe.quant.calibration
        model = self._build()
        inserted = insert_quantizers(model, preset_of(preset, self._recipe.quant.presets, self._config), self._config)
        chosen = _middle(self._rows.train)
        samples, points = self._samples(chosen), []
        set_ranges(model, block, samples, [0], preset)  # a GPU's kernels are compiled in the first pass
        for some in ([0], list(range(len(samples)))):
            taken = timed(partial(set_ranges, model, block, samples, some, preset))
            points.append((sum(chosen[row].tokens for row in some), taken))
        rate = line(points)
        # The fixed part is the search of the weights' ranges, once a stage; rows are read one after the other.
        wanted = min(block.samples, len(self._rows.train))
        self._known[f"calibrate/{preset}", "plain"] = Rate(rate.fixed / wanted, rate.per_token)
        kv_cache = self._recipe.quant.kv_cache
        self._states[preset] = collect_state(model, inserted, kv_cache=kv_cache, base_sha256="rehearsal")

    def _distill(self, stage: Stage) -> None:
        block = self._recipe.train.distill
        persona = self._build()
        samples, held_out = self._samples(self._rows.lessons), self._samples(_middle(self._rows.lessons_validation))
        order, tokens = _chosen([row.tokens for row in self._rows.lessons], block)
        plan = self._plan(f"rehearsing {stage.name}", order, block.tokens, block, "kl")
        spill = self._scratch / "stage" / "teacher.bin"
        lessons = Lessons(persona, samples, held_out, plan, answered=block.ce_weight < 1, spill=spill)
        self._known["read", "plain"] = _read_rate(persona, samples, block.tokens)
        student, _ = make_trainable(self._recipe, persona, self._recipe.distill_adapter, ends=False)
        quantize_(student, self._base, self._states[str(stage.preset)])
        loop = DistillLoop(student, lessons, block, plan, self._scratch / "stage")
        self._train(loop, stage, tokens, held_out)

    def _score_student(self, stage: Stage) -> None:
        model = self._build()
        self._known["read", "plain"] = _read_rate(model, self._samples(self._rows.held_out), "replies")
        quantize_(model, self._base, self._states[self._recipe.presets[0]])
        held_out = self._samples(_middle(self._rows.held_out))
        self._known["score", STUDENT] = _read_rate(model, held_out, "replies")

    # What they share.

    def _build(self) -> PreTrainedModel:
        gc.collect()
        model = random_base(self._base, self._packed, self._recipe.seed)
        self._base_bytes = float(sum(2 * parameter.numel() for parameter in model.parameters()))
        reset_peak()  # packing it took more than its steps will
        return model

    def _train(self, loop: Loop, stage: Stage, tokens: Sequence[int], held_out: list[Sample]) -> None:
        """Run a loop over the chosen batches and keep the rates of its steps and validation."""
        clock = clock_of(loop)
        self._trainable = sum(parameter.numel() for parameter in loop.model.parameters() if parameter.requires_grad)
        loop.run()
        points = list(zip(tokens, clock.steps, strict=True))[_WARM:]
        trained = next(part for part in stage.passes if part.kind == "train")
        self._known["train", trained.network] = line(points)
        validated = min(timed(lambda: loop.inside(loop.validate)) for _ in range(_ROUNDS))
        width = max(len(sample.input_ids) for sample in held_out) * len(held_out)
        self._known["score", trained.network] = Rate(0.0, validated / width)

    def _plan(
        self, label: str, order: list[list[int]], tokens: str, block: SftBlock | DistillBlock, metric: str
    ) -> Plan:
        steps = len(order) // block.gradient_accumulation
        return Plan(
            label=label,
            order=order,
            tokens=tokens,
            steps=steps,
            eval_every=steps,
            patience=0,
            metric=metric,
            seed=self._recipe.seed,
            fingerprint=label,
            gradient_checkpointing=self._recipe.train.gradient_checkpointing,
        )

    def _formats(self, preset: str) -> dict[str, str]:
        return preset_of(preset, self._recipe.quant.presets, self._config).formats(self._config)

    def _samples(self, rows: Sequence[Row]) -> list[Sample]:
        """Random tokens in the rows' lengths, the replies at their ends."""
        vocabulary, draw = int(self._config["vocab_size"]), random.Random(self._recipe.seed)
        found = []
        for number, row in enumerate(rows):
            ids = [draw.randrange(vocabulary) for _ in range(row.tokens)]
            replies = max(1, min(row.replies, row.tokens - 1))
            labels = [IGNORED] * (row.tokens - replies) + ids[row.tokens - replies :]
            found.append(Sample(str(number), "rehearsal", ids, labels))
        return found


def _chosen(lengths: Sequence[int], block: SftBlock | DistillBlock) -> tuple[list[list[int]], list[int]]:
    """Batches of the longest, the middle and the shortest rows, and the tokens of each optimizer step.

    The first steps warm up, the longest first: what does not fit fails at once. A step repeats its batch for every
    accumulated one.
    """
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    size = min(block.batch_size, len(rows))
    middle = (len(rows) - size) // 2
    longest, middling, shortest = rows[:size], rows[middle : middle + size], rows[len(rows) - size :]
    steps = [longest, middling, shortest, middling] + [longest, middling, shortest] * _ROUNDS
    order = [batch for batch in steps for _ in range(block.gradient_accumulation)]
    widths = [max(lengths[row] for row in batch) * len(batch) * block.gradient_accumulation for batch in steps]
    return order, widths


def _middle(rows: Sequence[Row]) -> list[Row]:
    """As many rows of middling length as one evaluation batch has."""
    ordered = sorted(rows)
    start = max(0, (len(ordered) - _HELD_OUT) // 2)
    return ordered[start : start + _HELD_OUT]


def _read_rate(model: PreTrainedModel, samples: list[Sample], tokens: str) -> Rate:
    """Of a forward without gradient, up to the output layer."""
    first = evaluation_order([len(sample.input_ids) for sample in samples])
    rows = first[len(first) // 2]
    width = max(len(samples[row].input_ids) for row in rows) * len(rows)
    taken = [timed(lambda: hidden_of_rows(model, samples, rows, tokens)) for _ in range(1 + _ROUNDS)]
    return Rate(0.0, min(taken[1:]) / width)
