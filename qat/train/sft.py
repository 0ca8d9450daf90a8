"""Supervised fine-tuning: LoRA on the BF16 base, loss on what the assistant wrote."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat import __version__
from qat.data.render import IGNORED
from qat.errors import UserError
from qat.receipt import sha256_file
from qat.train.adapters import (
    Coverage,
    adapter_sha256,
    attach_adapter,
    save_adapter,
    use_effective_weights_,
)
from qat.train.base import base_sha256, load_base, load_tokenizer
from qat.train.batches import Encoded, Sample, collate, encode_file, evaluation_order, training_order
from qat.train.loop import Loop, LoopResult, Plan
from qat.train.objective import cross_entropy_sum, hidden_states, output_weight

if TYPE_CHECKING:
    from peft import PeftModel

    from qat.recipe.schema import Recipe, SftBlock


@dataclass(frozen=True)
class RowCounts:
    """Size of a data set as it is trained on.

    Attributes:
        conversations: Rows.
        tokens: All tokens.
        supervised: Tokens with a loss.
        truncated: Rows cut at the recipe's length.
        dropped: Tokens lost by that.
    """

    conversations: int
    tokens: int
    supervised: int
    truncated: int
    dropped: int


@dataclass(frozen=True)
class SftReport:
    """What fine-tuning did.

    Attributes:
        base_sha256: Of the base's weights.
        adapter_sha256: Of the adapter's weights.
        coverage: What the adapter reaches.
        train: The training rows.
        validation: The held-out rows.
        loop: Steps, validation losses (nats per supervised token), time and memory.
    """

    base_sha256: str
    adapter_sha256: str
    coverage: Coverage
    train: RowCounts
    validation: RowCounts
    loop: LoopResult

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return {
            "base_sha256": self.base_sha256,
            "adapter_sha256": self.adapter_sha256,
            "coverage": self.coverage.to_json(),
            "train": asdict(self.train),
            "validation": asdict(self.validation),
            "loop": self.loop.to_json(),
        }


class SftLoop(Loop):
    """Cross entropy of the assistant's tokens."""

    def __init__(
        self, model: PeftModel, samples: list[Sample], held_out: list[Sample], block: SftBlock, plan: Plan, out: Path
    ) -> None:
        self._held_out = held_out
        self._weight = output_weight(model)
        super().__init__(model, samples, block, plan, out)

    def batch_loss(self, model: PeftModel, batch: dict[str, Any]) -> Tensor:
        """Sum of -log p over the supervised tokens of a batch."""
        return _loss_sum(model, batch["input_ids"], batch["targets"], self._weight)

    def validate(self) -> dict[str, float]:
        """Mean -log p of the held-out supervised tokens, nats."""
        return {"eval_loss": validation_loss(self.model, self._held_out)}


def _loss_sum(model: torch.nn.Module, input_ids: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    return cross_entropy_sum(hidden_states(model, input_ids, targets), weight, targets[targets != IGNORED])


@torch.no_grad()
def validation_loss(model: torch.nn.Module, samples: list[Sample]) -> float:
    """Mean -log p of the supervised tokens.

    Args:
        model: In `eval` mode.
        samples: Held-out rows.

    Returns:
        Nats per token.
    """
    weight = output_weight(model)
    total, count = 0.0, 0
    for rows in evaluation_order([len(sample.input_ids) for sample in samples]):
        batch = collate(samples, rows, "replies")
        targets = batch.targets.to(weight.device)
        total += float(_loss_sum(model, batch.input_ids.to(weight.device), targets, weight))
        count += int((targets != IGNORED).sum())
    return total / count


def count_rows(encoded: Encoded) -> RowCounts:
    """Count rows and tokens of an encoded file."""
    return RowCounts(
        conversations=len(encoded.samples),
        tokens=sum(len(sample.input_ids) for sample in encoded.samples),
        supervised=sum(label != IGNORED for sample in encoded.samples for label in sample.labels[1:]),
        truncated=encoded.truncated,
        dropped=encoded.dropped_tokens,
    )


def fingerprint(stage: str, facts: dict[str, Any], files: list[Path]) -> str:
    """SHA-256 of everything that a training's result follows from: settings, files, this version."""
    text = json.dumps([stage, __version__, facts, [sha256_file(file) for file in files]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def train_sft(recipe: Recipe, base: Path, train_file: Path, validation_file: Path, out: Path) -> SftReport:
    """Fine-tune the persona, or go on after a kill.

    Args:
        recipe: Base, adapter, hyperparameters, seed.
        base: Folder of the base checkpoint.
        train_file: Conversations, JSONL.
        validation_file: Held-out conversations, JSONL.
        out: Folder of the stage: `adapter/`, `log.jsonl`, and `checkpoints/` with the newest and the best one.

    Returns:
        What was done; the adapter of the step with the least validation loss is in `out/adapter`.

    Raises:
        UserError: A file or target does not fit, training diverges, or it never beats the base.
    """
    block = recipe.train.sft
    sha256 = base_sha256(base)
    tokenizer = load_tokenizer(recipe.base, base)
    train = encode_file(train_file, tokenizer, recipe.data.max_length)
    held_out = encode_file(validation_file, tokenizer, recipe.data.max_length)
    facts = {"base": sha256, "template": tokenizer.chat_template}
    plan = _plan(recipe, train.samples, facts, [train_file, validation_file])
    model, coverage = attach_adapter(load_base(base), recipe.train.adapter, recipe.base.family, recipe.seed)
    if not recipe.train.adapter.dropout:
        use_effective_weights_(model)
    result = SftLoop(model, train.samples, held_out.samples, block, plan, out).run()
    if result.best_step == 0:
        raise UserError(
            "Fine-tuning never came below the base's validation loss.",
            where=str(out / "log.jsonl"),
            value=f"{result.first:.4f} before, nothing lower in {result.steps} steps",
            remedy="lower train.sft.learning_rate, or look at the data",
        )
    save_adapter(model, out / "adapter", sha256, step=result.best_step)
    return SftReport(sha256, adapter_sha256(out / "adapter"), coverage, count_rows(train), count_rows(held_out), result)


def _plan(recipe: Recipe, samples: list[Sample], facts: dict[str, Any], files: list[Path]) -> Plan:
    block = recipe.train.sft
    lengths = [len(sample.input_ids) for sample in samples]
    order = training_order(lengths, block.batch_size, recipe.seed, epochs=block.epochs)
    steps = math.ceil(len(order) / block.gradient_accumulation)
    settings = {
        **facts,
        "sft": block.model_dump(),
        "adapter": recipe.train.adapter.model_dump(),
        "family": recipe.base.family,
        "max_length": recipe.data.max_length,
        "seed": recipe.seed,
    }
    return Plan(
        label="fine-tuning",
        order=order,
        tokens="replies",
        steps=steps,
        eval_every=max(1, steps // (block.epochs * block.evals_per_epoch)),
        patience=block.early_stopping_patience,
        metric="eval_loss",
        seed=recipe.seed,
        fingerprint=fingerprint("sft", settings, files),
    )
