"""The analytic estimate of a recipe on a GPU: hours and memory of each stage, and disk.

Seconds of a batch come from `qat.plan.timing`, peak memory from `qat.train.memory` (which the training itself asks
before it loads anything), sizes on disk from the formats that the presets give to each module.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.plan.gpus import Gpu
from qat.plan.rows import Rows, estimate_rows
from qat.plan.shape import BaseShape, find_shape
from qat.plan.stages import ADAPTED, PLAIN, STUDENT, Pass, Shape, Stage, training_stages
from qat.plan.timing import OPTIMIZER, Factors, measured_gpus, seconds, shipped_error, shipped_factors
from qat.plan.work import Network, Step, read_network
from qat.quant.presets import preset_of
from qat.train.memory import RESERVE, Estimate, Need, estimate, what_fits

if TYPE_CHECKING:
    from qat.recipe.schema import AdapterBlock, Recipe
    from qat.train.shapes import Weight

DISK_READ, DISK_WRITE = 2.4e9, 1.4e9
"""Bytes a second of one GPU box's disk, measured; a stage reads the base twice: to hash it, and to load it."""
_FACTOR_BYTES, CHECKPOINT_BYTES = 4.0, 12.0
_KEPT_CHECKPOINTS = 3
"""The newest, the best, and one being written."""
_STORED = {"nvfp4": 0.5 + 1 / 16, "w4a16": 0.5 + 1 / 16, "fp8": 1.0}
_BF16 = 2.0


class StageEstimate(NamedTuple):
    """One stage.

    Attributes:
        name: As in the run's receipt.
        seconds: In all.
        parts: Seconds by what they are spent on.
        peak: GPU memory of its largest step, by part; None where none is used.
        would_fit: Where that is more than the GPU has: smaller settings that fit, in words.
        fits: It is not.
    """

    name: str
    seconds: float
    parts: dict[str, float]
    peak: Estimate | None
    would_fit: list[str]
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """Seconds rounded, memory in GiB."""
        return {
            "stage": self.name,
            "seconds": round(self.seconds, 1),
            "parts": {name: round(value, 1) for name, value in self.parts.items()},
            "peak_gib": None if self.peak is None else self.peak.to_json(),
            "fits": self.fits,
            "would_fit": self.would_fit,
        }


class PlanReport(NamedTuple):
    """What a recipe takes on a GPU.

    Attributes:
        recipe: Its name.
        gpu: The GPU.
        parameters: Of the base.
        shape: Where its sizes come from.
        rows: Where the lengths come from.
        stages: The training's.
        disk: Bytes by what they are for.
        basis: What the seconds rest on.
        missing: What is not in them, and why.
    """

    recipe: str
    gpu: Gpu
    parameters: int
    shape: str
    rows: str
    stages: list[StageEstimate]
    disk: dict[str, float]
    basis: str
    missing: list[str]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Every stage fits into the GPU's memory."""
        return all(stage.fits for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return {
            "recipe": self.recipe,
            "gpu": {"name": self.gpu.name, "title": self.gpu.title, "source": self.gpu.source},
            "parameters": self.parameters,
            "shape": self.shape,
            "rows": self.rows,
            "stages": [stage.to_json() for stage in self.stages],
            "seconds": round(self.seconds, 1),
            "fits": self.fits,
            "disk_gb": {name: round(value / 1e9, 2) for name, value in self.disk.items()},
            "basis": self.basis,
            "not_estimated": self.missing,
        }


def plan(recipe: Recipe, *gpus: Gpu) -> list[PlanReport]:
    """Estimate a recipe on some GPUs.

    Args:
        recipe: The recipe; of its base only the sizes are needed.
        gpus: What it would run on.

    Returns:
        One report for each.

    Raises:
        UserError: The base's sizes are not known here, its model type is not, or the data file is unreadable.
    """
    shape = find_shape(recipe.base)
    rows = estimate_rows(recipe, shape.folder)
    return [_report(recipe, shape, rows, gpu) for gpu in gpus]


def _report(recipe: Recipe, shape: BaseShape, rows: Rows, gpu: Gpu) -> PlanReport:
    known = _Known(recipe, shape, gpu)
    stages = [known.stage(stage) for stage in training_stages(recipe, rows)]
    return PlanReport(
        recipe=recipe.name,
        gpu=gpu,
        parameters=known.network.parameters,
        shape=shape.origin,
        rows=rows.how,
        stages=[*stages, *known.exports()],
        disk=known.disk(),
        basis=basis(gpu),
        missing=_missing(recipe),
    )


def _missing(recipe: Recipe) -> list[str]:
    found = ["the behaviour suite: no serving speed was measured"]
    if recipe.train.distill.replies is not None:
        found.append("the persona's own replies (train.distill.replies)")
    return found


def basis(gpu: Gpu) -> str:
    """What an estimate on this GPU rests on, in words."""
    counts = measured_gpus()
    steps = f"{sum(counts.values())} steps measured on {', '.join(counts)}"
    error = f"each within {100 * shipped_error():.0f} % of what the others say of it"
    if gpu.name in counts:
        return f"{steps}, {error}"
    return f"not measured: scaled by bandwidth and FLOPS from {steps} ({error})"


class _Known:
    """A recipe's base on a GPU, with what the stages share."""

    def __init__(self, recipe: Recipe, shape: BaseShape, gpu: Gpu) -> None:
        self.recipe, self.gpu, self.config = recipe, gpu, shape.text
        self.network: Network = read_network(self.config)
        self._factors: Factors = shipped_factors()
        self._price, self.formats = cache(self._seconds), cache(self._formats)
        self.base_bytes = _BF16 * self.network.parameters

    def _formats(self, preset: str) -> dict[str, str]:
        """Module -> format, under one of the recipe's presets."""
        return preset_of(preset, self.recipe.quant.presets, self.config).formats(self.config)

    def stage(self, stage: Stage) -> StageEstimate:
        """Price one stage."""
        parts: dict[str, float] = {}
        for part in stage.passes:
            label = f"{part.kind} {part.network}"
            parts[label] = parts.get(label, 0.0) + self._pass(part, stage.preset)
        parts["load"] = stage.loads * 2 * self.base_bytes / DISK_READ
        if stage.saves:
            adapter = self.recipe.train.adapter if stage.name == "sft" else self.recipe.distill_adapter
            parts["save"] = stage.saves * CHECKPOINT_BYTES * self.trainable(adapter) / DISK_WRITE
        need = self.need(stage)
        peak = estimate(self.config, need)
        fits = peak.total <= self.gpu.memory * (1 - RESERVE)
        options = [] if fits else what_fits(self.config, need, self.gpu.memory, self._packable(stage))
        return StageEstimate(stage.name, sum(parts.values()), parts, peak, options, fits)

    def _pass(self, part: Pass, preset: str | None) -> float:
        once = sum(self._price(part.kind == "train", part.network, preset, batch) for batch in part.batches)
        adapter = self.recipe.train.adapter if part.network == ADAPTED else self.recipe.distill_adapter
        stepping = part.steps * OPTIMIZER * self.trainable(adapter) / self.gpu.bandwidth
        return part.repeats * once + stepping

    def _seconds(self, backward: bool, network: str, preset: str | None, batch: Shape) -> float:
        presets = [preset] if preset else list(self.recipe.presets)
        adapter = self.recipe.train.adapter if network == ADAPTED else self.recipe.distill_adapter
        adapted = set() if network == PLAIN else {weight.name for weight in self._trained(adapter)}
        rounded = set(self.formats(presets[0])) if network == STUDENT else set()
        recomputed = self.recipe.train.gradient_checkpointing
        # Where all weights are trained there is no adapter, and their whole gradients are taken.
        route = "dense" if self.recipe.train.trains == "all" else "cheapest" if backward and not rounded else "formed"
        logits = "divergence" if rounded else "pieces"
        step = Step(batch.tokens, batch.length, batch.targets, recomputed, adapted, route, rounded, backward, logits)
        return seconds(self.network.work(step), self.gpu, self._factors)

    def need(self, stage: Stage) -> Need:
        """What a stage asks of memory; for trainings the very need that they look at before they load."""
        memory, packed = self.recipe.train.memory, self.packed()
        trained = next((part for part in stage.passes if part.kind == "train"), None)
        if trained is None:  # nothing is kept for a backward: as with checkpointing, and without factors
            batch = max((batch for part in stage.passes for batch in part.batches), key=lambda batch: batch.tokens)
            return Need(memory, packed, batch_size=batch.rows, length=batch.length, checkpointing=True)
        student = trained.network == STUDENT
        adapter = self.recipe.distill_adapter if student else self.recipe.train.adapter
        block = self.recipe.train.distill if student else self.recipe.train.sft
        return Need(
            memory,
            packed,
            trains=self.recipe.train.trains,
            rank=adapter.rank,
            targets=adapter.targets,
            batch_size=block.batch_size,
            length=self.recipe.data.max_length,
            checkpointing=self.recipe.train.gradient_checkpointing,
            quantized=list(self.formats(str(stage.preset))) if student else (),
            teacher=student,
            accumulates=block.gradient_accumulation > 1,
        )

    def _packable(self, stage: Stage) -> Sequence[str]:
        presets = [stage.preset] if stage.preset else list(self.recipe.presets)
        return list(self.formats(presets[0])) if presets else []

    def _trained(self, adapter: AdapterBlock) -> list[Weight]:
        """The weights whose effective value moves in training."""
        if self.recipe.train.trains == "all":
            return list(self.network.weights)
        return self.network.named(adapter.targets)

    def trainable(self, adapter: AdapterBlock) -> int:
        """Trainable numbers."""
        if self.recipe.train.trains == "all":
            return self.network.parameters
        return sum(weight.factors(adapter.rank) for weight in self.network.named(adapter.targets))

    def packed(self) -> list[str]:
        """The modules that the recipe keeps in NVFP4."""
        if self.recipe.train.memory == "bf16":
            return []
        from qat.quant.packed import packed_modules

        presets = [preset_of(name, self.recipe.quant.presets, self.config) for name in self.recipe.presets]
        return packed_modules(presets, self.config)

    def exports(self) -> list[StageEstimate]:
        """Writing each arm and reading it back, at the disk's speed."""
        found = []
        for arm in self.recipe.arms:
            if arm.kind != "base":
                size = self.arm_bytes(arm.preset)
                parts = {"read": (2 * self.base_bytes + size) / DISK_READ, "write": size / DISK_WRITE}
                found.append(StageEstimate(f"export/{arm.name}", sum(parts.values()), parts, None, [], True))
        return found

    def arm_bytes(self, preset: str | None) -> float:
        """Size of an exported checkpoint."""
        formats = {} if preset is None else self.formats(preset)
        return sum(weight.numbers * _STORED.get(formats.get(weight.name, ""), _BF16) for weight in self.network.weights)

    def disk(self) -> dict[str, float]:
        """Bytes on disk by what they are for."""
        sft, distilled = self.trainable(self.recipe.train.adapter), self.trainable(self.recipe.distill_adapter)
        each = _FACTOR_BYTES + _KEPT_CHECKPOINTS * CHECKPOINT_BYTES
        found = {"base": self.base_bytes, "sft": sft * each}
        found |= {f"distill/{preset}": distilled * each for preset in self.recipe.distilled_presets}
        found |= {f"export/{arm.name}": self.arm_bytes(arm.preset) for arm in self.recipe.arms if arm.kind != "base"}
        return {**found, "total": sum(found.values())}
