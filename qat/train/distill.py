"""Quantization-aware distillation: an NVFP4 student learns to answer as its own BF16 self.

Teacher and student are one network in memory. The persona (base with the fine-tuned adapter merged) first answers for
all rows that training will see; these answers are kept as last hidden states, so no teacher runs during training. Then
quantizers and a fresh adapter go on it, and the adapter learns to give way to rounding: what is served is Q(W_persona
+ s B A). Where the recipe trains all weights there is no adapter, and what is served is Q(W).

With `ce_weight` the conversations' own words count beside the teacher's probabilities, or, at 1, instead of them: that
is plain quantization-aware training, and its steps are chosen by the cross entropy too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from qat.data.render import IGNORED
from qat.quant.modelopt import collect_state
from qat.train.adapters import Coverage, save_adapter
from qat.train.base import base_sha256, load_tokenizer
from qat.train.batches import Sample, encode_file, training_order
from qat.train.before import require_fits, require_trained_share
from qat.train.compare import Divergence, Reference, compare, hidden_of_rows, make_references
from qat.train.full import MODEL_FOLDER, MasterWeights, save_model
from qat.train.loop import Loop, LoopResult, Plan
from qat.train.objective import cross_entropy_sum, hidden_states, kl_sum, mixed_sum, output_weight
from qat.train.parallel import agreed, own_rows
from qat.train.persona import load_persona, packed_below, persona_sha256, standing_on
from qat.train.ranges import Growth, WeightRanges
from qat.train.replies import persona_replies
from qat.train.sft import RowCounts, count_rows, fingerprint, make_trainable, validation_loss
from qat.train.student import load_quant_state, quantize_

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qat.recipe.schema import DistillBlock, Recipe

ADAPTER_FOLDER = "adapter"
QUANT_STATE = "quant_state.safetensors"
SPILL = "teacher.bin"
"""The teacher's answers, where memory is no place for them."""


@dataclass(frozen=True)
class DistillReport:
    """What distillation did.

    Attributes:
        preset: Precision preset.
        base_sha256: Of the weights below the new adapter, with what is packed of them (`persona.standing_on`).
        persona_sha256: Of the persona adapter's weights, or the persona's where all weights were trained.
        adapter_sha256: Of the new adapter's weights, or the student's where all weights were trained.
        packed: Modules of the base that were kept in NVFP4.
        memory: Estimated peak in GiB by part.
        replies: Training rows whose reply the persona wrote.
        coverage: What is trained.
        quantized: Modules with quantizers.
        skipped: Linears and fused experts left in BF16.
        train: The training rows.
        validation: The held-out rows.
        divergence: Of the student that is handed over, on held-out replies.
        growth: How far weight ranges have grown past the calibrated ones.
        loop: Steps, validation KL before and at best, time and memory.
    """

    preset: str
    base_sha256: str
    persona_sha256: str
    adapter_sha256: str
    packed: int
    memory: dict[str, float]
    replies: int
    coverage: Coverage
    quantized: int
    skipped: list[str]
    train: RowCounts
    validation: RowCounts
    divergence: Divergence
    growth: Growth
    loop: LoopResult

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return {
            "preset": self.preset,
            "base_sha256": self.base_sha256,
            "persona_sha256": self.persona_sha256,
            "adapter_sha256": self.adapter_sha256,
            "packed": self.packed,
            "memory": self.memory,
            "replies": self.replies,
            "coverage": self.coverage.to_json(),
            "quantized": self.quantized,
            "skipped": self.skipped,
            "train": asdict(self.train),
            "validation": asdict(self.validation),
            "divergence": self.divergence.to_json(),
            "growth": self.growth._asdict(),
            "loop": self.loop.to_json(),
        }


class Lessons:
    """What the student learns from and is measured on.

    Attributes:
        samples: Training rows.
        teacher: Row -> (positions, hidden), the teacher's answer to the training rows that the order names for this
            process; empty where no loss asks for it.
        held_out: Held-out rows.
        references: The teacher's answer to them.
    """

    def __init__(
        self,
        teacher: torch.nn.Module,
        samples: list[Sample],
        held_out: list[Sample],
        plan: Plan,
        *,
        answered: bool = True,
        spill: Path | None = None,
    ) -> None:
        self.samples, self.held_out = samples, held_out
        self.teacher: dict[int, Tensor] = {}
        if answered:
            own = (row for rows in own_rows(plan.order) for row in rows)
            self.teacher = hidden_of_rows(teacher, samples, own, plan.tokens, spill)
        self.references: list[Reference] = make_references(teacher, held_out)


class DistillLoop(MasterWeights, Loop):
    """Forward KL from the persona to the student, cross entropy, or both."""

    def __init__(
        self, model: PeftModel | PreTrainedModel, lessons: Lessons, block: DistillBlock, plan: Plan, out: Path
    ) -> None:
        self._lessons = lessons
        self._temperature, self._ce_weight = block.temperature, block.ce_weight
        self._weight = output_weight(model)
        self.ranges = WeightRanges(model)
        super().__init__(model, lessons.samples, block, plan, out)

    def batch_loss(self, model: PeftModel, batch: dict[str, Any]) -> Tensor:
        """Sum of (1 - c) T^2 KL(teacher || student) + c cross entropy over the targets of a batch."""
        student = hidden_states(model, batch["input_ids"], batch["targets"])
        targets = batch["targets"][batch["targets"] != IGNORED]
        if self._ce_weight == 1:
            return cross_entropy_sum(student, self._weight, targets)
        teacher = torch.cat([self._lessons.teacher[row] for row in batch["rows"]]).to(student.device)
        if self._ce_weight == 0:
            return kl_sum(student, teacher, self._weight, self._temperature)
        return mixed_sum(student, teacher, self._weight, targets, self._temperature, self._ce_weight)

    def measure(self) -> Divergence:
        """Divergence of the student as it is now, on held-out replies."""
        self.model.eval()
        return compare(self.model, self._lessons.references, self._lessons.held_out)

    def validate(self) -> dict[str, float]:
        """KL on held-out replies, nats per token, and top-1 agreement; the cross entropy where it is trained on."""
        divergence = self.measure()
        metrics = {"kl": divergence.kl, "top1": divergence.top1}
        if self._ce_weight:
            metrics["cross_entropy"] = validation_loss(self.model, self._lessons.held_out)
        return metrics

    def after_step(self) -> None:
        """Let the weight ranges follow."""
        self.ranges.grow_()

    def extra_tensors(self) -> dict[str, Tensor]:
        """The weight ranges."""
        return self.ranges.tensors()

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Set the weight ranges."""
        self.ranges.load_(tensors)


def distill(
    recipe: Recipe,
    base: Path,
    persona_adapter: Path,
    quant_state: Path,
    train_file: Path,
    validation_file: Path,
    out: Path,
) -> DistillReport:
    """Distil the persona into its NVFP4 self, or go on after a kill.

    Args:
        recipe: Adapter, hyperparameters, seed.
        base: Folder of the base checkpoint.
        persona_adapter: Adapter of fine-tuning, or the model where all weights were trained.
        quant_state: From the calibration; says the preset.
        train_file: Conversations, JSONL.
        validation_file: Held-out conversations, JSONL.
        out: Folder of the stage: `adapter/` (`model/` where all weights are trained), `quant_state.safetensors`,
            `log.jsonl`, and `checkpoints/` with the newest and best one.

    Returns:
        What was done. The state written holds the ranges with which the reported divergence was measured. Where no
        step came below the divergence of plain NVFP4, the adapter is the untrained one (B = 0) and `loop.best_step` is
        0.

    Raises:
        UserError: A file, the adapter or the state does not fit, memory or disk is too small, or training diverges.
    """
    sha256, parent = standing_on(base, persona_adapter), persona_sha256(persona_adapter)
    state = load_quant_state(quant_state, base, sha256)
    packed = packed_below(persona_adapter)
    memory = require_fits(recipe, base, "distill", packed, list(state.modules))
    files = [train_file, validation_file, quant_state]
    facts = {"base": sha256, "persona": parent}
    ready = _prepare(recipe, base, persona_adapter, facts, files, state.preset, out)
    model, coverage = make_trainable(recipe, ready.persona, recipe.distill_adapter, ends=False)
    inserted = quantize_(model, base, state)
    loop = DistillLoop(model, ready.lessons, recipe.train.distill, ready.plan, out)
    result, divergence = loop.run(), loop.inside(loop.measure)
    metric = ready.plan.metric
    _require_reproduced(divergence.kl if metric == "kl" else loop.inside(loop.validate)[metric], result.best)
    (out / SPILL).unlink(missing_ok=True)
    trained, standing = _save(model, persona_adapter, out, sha256, parent, packed, result.best_step)
    adapter = ADAPTER_FOLDER if isinstance(model, PeftModel) else None
    final = collect_state(model, inserted, kv_cache=recipe.quant.kv_cache, base_sha256=standing, adapter=adapter)
    final.save(out / QUANT_STATE)
    return DistillReport(
        preset=state.preset,
        base_sha256=sha256,
        persona_sha256=parent,
        adapter_sha256=persona_sha256(trained),
        packed=len(packed),
        memory=memory,
        replies=ready.replies,
        coverage=coverage,
        quantized=len(inserted.quantized),
        skipped=inserted.skipped,
        train=ready.train,
        validation=ready.validation,
        divergence=divergence,
        growth=loop.ranges.growth(),
        loop=result,
    )


class _Ready(NamedTuple):
    """What training begins with: the teacher, which becomes the student, has answered."""

    persona: PreTrainedModel
    plan: Plan
    lessons: Lessons
    replies: int
    train: RowCounts
    validation: RowCounts


def _prepare(
    recipe: Recipe, base: Path, persona: Path, facts: dict[str, str], files: list[Path], preset: str, out: Path
) -> _Ready:
    """Load rows and teacher, let it write its own replies and answer all rows.

    Args:
        recipe: What to train.
        base: Folder of the base checkpoint.
        persona: What fine-tuning left.
        facts: Digests of what the persona stands on (`base`) and of the persona itself.
        files: Training rows, held-out rows, and what else the training follows from.
        preset: Name of the precision preset.
        out: Folder of the stage.
    """
    block = recipe.train.distill
    tokenizer = load_tokenizer(recipe.base, base)
    train = encode_file(files[0], tokenizer, recipe.data.max_length)
    held_out = encode_file(files[1], tokenizer, recipe.data.max_length)
    if block.tokens == "replies":
        require_trained_share(recipe, count_rows(train), files[0])
    facts = {**facts, "template": tokenizer.chat_template}
    teacher = load_persona(base, persona, facts["base"])
    written = _replies(recipe, teacher, train.samples, tokenizer, facts, files[0], out)
    train = train._replace(samples=[*train.samples, *written])
    own = [] if block.replies is None or block.replies.file is None else [Path(block.replies.file)]
    plan = _plan(recipe, preset, train.samples, facts, [*files, *own])
    lessons = Lessons(teacher, train.samples, held_out.samples, plan, answered=block.ce_weight < 1, spill=out / SPILL)
    return _Ready(teacher, plan, lessons, len(written), count_rows(train), count_rows(held_out))


def _replies(
    recipe: Recipe,
    persona: PreTrainedModel,
    samples: list[Sample],
    tokenizer: PreTrainedTokenizerBase,
    facts: dict[str, Any],
    train_file: Path,
    out: Path,
) -> list[Sample]:
    """The rows that the persona writes itself; the first process's, where there are several."""
    block = recipe.train.distill.replies
    if block is None:
        return []
    settings = {**facts, "replies": block.model_dump(), "max_length": recipe.data.max_length, "seed": recipe.seed}
    written = persona_replies(
        persona,
        samples,
        block,
        max_length=recipe.data.max_length,
        seed=recipe.seed,
        tokenizer=tokenizer,
        keep=out / "replies.jsonl",
        fingerprint=fingerprint("replies", settings, [train_file]),
    )
    return agreed(written)


def _save(
    model: PeftModel | PreTrainedModel,
    persona: Path,
    out: Path,
    sha256: str,
    parent: str,
    packed: list[str],
    step: int,
) -> tuple[Path, str]:
    """Write what was trained; gives its folder, and what the quantizer state stands on."""
    if isinstance(model, PeftModel):
        origin = {"packed": packed} if packed else {}
        save_adapter(model, out / ADAPTER_FOLDER, sha256, parent_sha256=parent, step=step, **origin)
        return out / ADAPTER_FOLDER, sha256
    save_model(model, persona, out / MODEL_FOLDER, base_sha256=sha256, step=step)
    return out / MODEL_FOLDER, base_sha256(out / MODEL_FOLDER)


def _plan(recipe: Recipe, preset: str, samples: list[Sample], facts: dict[str, Any], files: list[Path]) -> Plan:
    block = recipe.train.distill
    lengths = [len(sample.input_ids) for sample in samples]
    settings = {
        **facts,
        "distill": block.model_dump(),
        "adapter": recipe.distill_adapter.model_dump(),
        "trains": recipe.train.trains,
        "family": recipe.base.family,
        "max_length": recipe.data.max_length,
        "seed": recipe.seed,
    }
    count = block.max_steps * block.gradient_accumulation
    return Plan(
        label=f"distilling {preset}",
        order=training_order(lengths, block.batch_size, recipe.seed, count=count),
        tokens=block.tokens,
        steps=block.max_steps,
        eval_every=block.eval_every,
        patience=0,
        metric="cross_entropy" if block.ce_weight == 1 else "kl",
        seed=recipe.seed,
        fingerprint=fingerprint("distill", settings, files),
        gradient_checkpointing=recipe.train.gradient_checkpointing,
    )


def _require_reproduced(now: float, best: float) -> None:
    """The reloaded factors and ranges must be those that were measured (a GPU may differ in the last digits)."""
    if abs(now - best) > 1e-3 * abs(best) + 1e-7:
        raise RuntimeError(f"the best checkpoint gave {best} when it was written and gives {now} now")
