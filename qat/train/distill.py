"""Quantization-aware distillation: an NVFP4 student learns to answer as its own BF16 self.

Teacher and student are one network in memory. The persona (base with the fine-tuned adapter merged) first answers for
all rows that training will see; these answers are kept as last hidden states, so no teacher runs during training. Then
quantizers and a fresh adapter go on it, and the adapter learns to give way to rounding: what is served is Q(W_persona
+ s B A).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat.quant.modelopt import collect_state
from qat.train.adapters import Coverage, adapter_sha256, attach_adapter, save_adapter
from qat.train.base import base_sha256, load_tokenizer
from qat.train.batches import Sample, encode_file, training_order
from qat.train.compare import Divergence, Reference, compare, hidden_of_rows, make_references
from qat.train.loop import Loop, LoopResult, Plan
from qat.train.objective import hidden_states, kl_sum, output_weight
from qat.train.persona import load_persona
from qat.train.ranges import Growth, WeightRanges
from qat.train.sft import RowCounts, count_rows, fingerprint
from qat.train.student import load_quant_state, quantize_

if TYPE_CHECKING:
    from peft import PeftModel

    from qat.recipe.schema import DistillBlock, Recipe

ADAPTER_FOLDER = "adapter"
QUANT_STATE = "quant_state.safetensors"


@dataclass(frozen=True)
class DistillReport:
    """What distillation did.

    Attributes:
        preset: Precision preset.
        base_sha256: Of the base's weights.
        persona_sha256: Of the persona adapter's weights.
        adapter_sha256: Of the new adapter's weights.
        coverage: What the adapter reaches.
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
        teacher: Row -> (positions, hidden), the teacher's answer to the training rows that the order names.
        held_out: Held-out rows.
        references: The teacher's answer to them.
    """

    def __init__(self, teacher: torch.nn.Module, samples: list[Sample], held_out: list[Sample], plan: Plan) -> None:
        self.samples, self.held_out = samples, held_out
        self.teacher = hidden_of_rows(teacher, samples, (row for rows in plan.order for row in rows), plan.tokens)
        self.references: list[Reference] = make_references(teacher, held_out)


class DistillLoop(Loop):
    """Forward KL from the persona to the student."""

    def __init__(self, model: PeftModel, lessons: Lessons, block: DistillBlock, plan: Plan, out: Path) -> None:
        self._lessons = lessons
        self._temperature = block.temperature
        self._weight = output_weight(model)
        self.ranges = WeightRanges(model)
        super().__init__(model, lessons.samples, block, plan, out)

    def batch_loss(self, model: PeftModel, batch: dict[str, Any]) -> Tensor:
        """Sum of T^2 KL(teacher || student) over the targets of a batch."""
        student = hidden_states(model, batch["input_ids"], batch["targets"])
        teacher = torch.cat([self._lessons.teacher[row] for row in batch["rows"]]).to(student.device)
        return kl_sum(student, teacher, self._weight, self._temperature)

    def measure(self) -> Divergence:
        """Divergence of the student as it is now, on held-out replies."""
        self.model.eval()
        return compare(self.model, self._lessons.references, self._lessons.held_out)

    def validate(self) -> dict[str, float]:
        """KL on held-out replies, nats per token, and top-1 agreement."""
        divergence = self.measure()
        return {"kl": divergence.kl, "top1": divergence.top1}

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
        persona_adapter: Adapter of fine-tuning.
        quant_state: From the calibration; says the preset.
        train_file: Conversations, JSONL.
        validation_file: Held-out conversations, JSONL.
        out: Folder of the stage: `adapter/`, `quant_state.safetensors`, `log.jsonl`, and `checkpoints/` with the
            newest and best one.

    Returns:
        What was done. The state written holds the ranges with which the reported divergence was measured. Where no
        step came below the divergence of plain NVFP4, the adapter is the untrained one (B = 0) and `loop.best_step` is
        0.

    Raises:
        UserError: A file, the adapter or the state does not fit, or training diverges.
    """
    sha256, persona_sha256 = base_sha256(base), adapter_sha256(persona_adapter)
    state = load_quant_state(quant_state, base, sha256)
    tokenizer = load_tokenizer(recipe.base, base)
    train = encode_file(train_file, tokenizer, recipe.data.max_length)
    held_out = encode_file(validation_file, tokenizer, recipe.data.max_length)
    facts = {"base": sha256, "persona": persona_sha256, "template": tokenizer.chat_template}
    plan = _plan(recipe, state.preset, train.samples, facts, [train_file, validation_file, quant_state])
    persona = load_persona(base, persona_adapter, sha256)
    lessons = Lessons(persona, train.samples, held_out.samples, plan)
    model, coverage = attach_adapter(persona, recipe.distill_adapter, recipe.base.family, recipe.seed)
    inserted = quantize_(model, base, state)
    loop = DistillLoop(model, lessons, recipe.train.distill, plan, out)
    result, divergence = loop.run(), loop.measure()
    _require_reproduced(divergence.kl, result.best)
    save_adapter(model, out / ADAPTER_FOLDER, sha256, parent_sha256=persona_sha256, step=result.best_step)
    final = collect_state(model, inserted, kv_cache=recipe.quant.kv_cache, base_sha256=sha256, adapter=ADAPTER_FOLDER)
    final.save(out / QUANT_STATE)
    return DistillReport(
        preset=state.preset,
        base_sha256=sha256,
        persona_sha256=persona_sha256,
        adapter_sha256=adapter_sha256(out / ADAPTER_FOLDER),
        coverage=coverage,
        quantized=len(inserted.quantized),
        skipped=inserted.skipped,
        train=count_rows(train),
        validation=count_rows(held_out),
        divergence=divergence,
        growth=loop.ranges.growth(),
        loop=result,
    )


def _plan(recipe: Recipe, preset: str, samples: list[Sample], facts: dict[str, Any], files: list[Path]) -> Plan:
    block = recipe.train.distill
    lengths = [len(sample.input_ids) for sample in samples]
    settings = {
        **facts,
        "distill": block.model_dump(),
        "adapter": recipe.distill_adapter.model_dump(),
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
        metric="kl",
        seed=recipe.seed,
        fingerprint=fingerprint("distill", settings, files),
    )


def _require_reproduced(now: float, best: float) -> None:
    """The reloaded factors and ranges must be those that were measured (a GPU may differ in the last digits)."""
    if abs(now - best) > 1e-3 * abs(best) + 1e-7:
        raise RuntimeError(f"the best checkpoint gave a KL of {best} when it was written and gives {now} now")
