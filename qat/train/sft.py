"""Supervised fine-tuning: LoRA on the BF16 base, loss on what the assistant wrote."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor

from qat import __version__
from qat.data.render import IGNORED
from qat.errors import UserError
from qat.quant.packed import packed_base_sha256
from qat.receipt import sha256_file
from qat.train.adapters import Coverage, attach_adapter, save_adapter, use_effective_weights_
from qat.train.base import base_sha256, load_tokenizer, training_device
from qat.train.batches import Encoded, Sample, collate, encode_file, evaluation_order, training_order
from qat.train.before import packed_by, require_fits, require_trained_share
from qat.train.full import MODEL_FOLDER, MasterWeights, save_model, train_all_
from qat.train.loop import Loop, LoopResult, Plan
from qat.train.objective import cross_entropy_sum, hidden_states, output_weight
from qat.train.persona import load_weights, persona_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qat.recipe.schema import AdapterBlock, Recipe, SftBlock


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
        base_sha256: Of the base's weights, with what is packed of them.
        adapter_sha256: Of the adapter's weights, or of the model's where all weights were trained.
        packed: Modules of the base that were kept in NVFP4.
        memory: Estimated peak in GiB by part.
        coverage: What is trained.
        train: The training rows.
        validation: The held-out rows.
        loop: Steps, validation losses (nats per supervised token), time and memory.
    """

    base_sha256: str
    adapter_sha256: str
    packed: int
    memory: dict[str, float]
    coverage: Coverage
    train: RowCounts
    validation: RowCounts
    loop: LoopResult

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return {
            "base_sha256": self.base_sha256,
            "adapter_sha256": self.adapter_sha256,
            "packed": self.packed,
            "memory": self.memory,
            "coverage": self.coverage.to_json(),
            "train": asdict(self.train),
            "validation": asdict(self.validation),
            "loop": self.loop.to_json(),
        }


class SftLoop(MasterWeights, Loop):
    """Cross entropy of the assistant's tokens."""

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        samples: list[Sample],
        held_out: list[Sample],
        block: SftBlock,
        plan: Plan,
        out: Path,
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
        out: Folder of the stage: `adapter/` (`model/` where all weights are trained), `log.jsonl`, and `checkpoints/`
            with the newest and the best one.

    Returns:
        What was done; the step with the least validation loss is kept.

    Raises:
        UserError: A file or target does not fit, memory is too small, next to nothing would be trained on, training
            diverges, or it never beats the base.
    """
    packed = packed_by(recipe, base)
    memory = require_fits(recipe, base, "sft", packed, [])
    sha256 = packed_base_sha256(base_sha256(base), packed)
    tokenizer = load_tokenizer(recipe.base, base)
    train = encode_file(train_file, tokenizer, recipe.data.max_length)
    held_out = encode_file(validation_file, tokenizer, recipe.data.max_length)
    require_trained_share(recipe, count_rows(train), train_file)
    facts = {"base": sha256, "template": tokenizer.chat_template}
    plan = _plan(recipe, train.samples, facts, [train_file, validation_file])
    model, coverage = make_tunable(recipe, load_weights(base, packed))
    result = SftLoop(model, train.samples, held_out.samples, recipe.train.sft, plan, out).run()
    if result.best_step == 0:
        raise UserError(
            "Fine-tuning never came below the base's validation loss.",
            where=str(out / "log.jsonl"),
            value=f"{result.first:.4f} before, nothing lower in {result.steps} steps",
            remedy="lower train.sft.learning_rate, or look at the data",
        )
    if isinstance(model, PeftModel):
        trained = out / "adapter"
        save_adapter(model, trained, sha256, step=result.best_step, **({"packed": packed} if packed else {}))
    else:
        trained = out / MODEL_FOLDER
        save_model(model, base, trained, base_sha256=sha256, step=result.best_step)
    return SftReport(
        base_sha256=sha256,
        adapter_sha256=persona_sha256(trained),
        packed=len(packed),
        memory=memory,
        coverage=coverage,
        train=count_rows(train),
        validation=count_rows(held_out),
        loop=result,
    )


def make_trainable(
    recipe: Recipe, model: PreTrainedModel, adapter: AdapterBlock, *, ends: bool
) -> tuple[PeftModel | PreTrainedModel, Coverage]:
    """Put an adapter on a model, or let all its weights be trained, as the recipe says.

    Args:
        recipe: `train.trains`, family, seed.
        model: Frozen.
        adapter: Of this stage.
        ends: Whether embeddings and output layer may be trained.
    """
    if recipe.train.trains == "all":
        return model, train_all_(model, ends=ends)
    return attach_adapter(model, adapter, recipe.base.family, recipe.seed)


def make_tunable(recipe: Recipe, model: PreTrainedModel) -> tuple[PeftModel | PreTrainedModel, Coverage]:
    """Make a base trainable as fine-tuning trains it: with effective weights, and on a GPU with fused experts.

    Args:
        recipe: Adapter, what is trained, family, seed.
        model: Frozen, without quantizers.
    """
    tuned, coverage = make_trainable(recipe, model, recipe.train.adapter, ends=True)
    if isinstance(tuned, PeftModel) and not recipe.train.adapter.dropout:
        use_effective_weights_(tuned)
    if training_device().type == "cuda":
        from qat.quant.lora import use_fast_experts_

        use_fast_experts_(tuned)
    return tuned, coverage


def _plan(recipe: Recipe, samples: list[Sample], facts: dict[str, Any], files: list[Path]) -> Plan:
    block = recipe.train.sft
    lengths = [len(sample.input_ids) for sample in samples]
    order = training_order(lengths, block.batch_size, recipe.seed, epochs=block.epochs)
    steps = math.ceil(len(order) / block.gradient_accumulation)
    settings = {
        **facts,
        "sft": block.model_dump(),
        "adapter": recipe.train.adapter.model_dump(),
        "trains": recipe.train.trains,
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
        gradient_checkpointing=recipe.train.gradient_checkpointing,
    )
