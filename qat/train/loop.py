"""The one training loop: transformers' Trainer over accelerate, with what this project asks of it on top.

Fine-tuning and distillation differ in two methods (`batch_loss`, `validate`). The rest is here: batches in a fixed
order, validation, the best checkpoint, early stopping, `log.jsonl`, and going on after a kill so that the final bytes
are those of an undisturbed run.

Arithmetic: the base's weights are bfloat16 and frozen, factors and optimizer float32, activations bfloat16 without
autocast, the loss float32: what is served. (Measured on 2 cores with AVX512-BF16, 4 M parameters, 8 x 256 tokens:
0.48 s a step, 0.53 s in float32.)

Several processes (`qat.train.parallel`) split every batch, so the global batch, its loss and its gradient are those of
one process up to rounding. Each validates all held-out rows; the first one's figures count, and it alone writes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from qat.data.render import IGNORED
from qat.errors import UserError
from qat.patches.guard import enabled_quantizers, watch
from qat.progress import Progress, progress_bar
from qat.storage import storage_fault, write_atomic
from qat.train import checkpoint, parallel
from qat.train.arguments import training_arguments
from qat.train.batches import Sample, collate
from qat.train.checkpoint import Checkpoint
from qat.train.diverged import HISTORY, divergence, exploded, first_fault, first_output, largest_gradient
from qat.train.objective import causal_lm
from qat.train.plan import LoopResult, Plan

if TYPE_CHECKING:
    from peft import PeftModel

    from qat.recipe.schema import DistillBlock, SftBlock

__all__ = ["Loop", "LoopResult", "Plan"]

T = TypeVar("T")

WATCHED_STEPS = (0, 3)
"""Optimizer steps of a process whose first forward and backward run under the guard: at the first one B is still zero
and A may have no gradient, and a warm-up begins with a learning rate of zero; three steps later both must be alive."""


class Loop(Trainer):
    """Trainer with a fixed order of batches and checkpoints of its own; see the module's text.

    Args:
        model: PEFT model; only its factors are trained.
        samples: Training rows.
        block: Hyperparameters.
        plan: Length and cadence.
        out: Folder of the stage: `checkpoints/` and `log.jsonl` come here; of several processes the first's counts.

    Raises:
        UserError: A batch has fewer rows than there are processes.
    """

    def __init__(
        self, model: PeftModel, samples: list[Sample], block: SftBlock | DistillBlock, plan: Plan, out: Path
    ) -> None:
        self.plan, self.samples, self.out = plan, samples, out
        self.root = out / "checkpoints"
        self.save_every = block.save_every
        self._watched: set[int] = set()
        self._wanted = enabled_quantizers(model)
        self._guard: dict[str, Any] | None = None
        self._first_step = 0
        self._clock, self._spent = time.monotonic(), 0.0
        self._bar: Progress | None = None
        self._batches: list[dict[str, Any]] = []
        arguments = training_arguments(block, plan.steps, plan.seed, self.root)
        super().__init__(model=model, args=arguments, callbacks=[_Cadence(self)])
        self.remove_callback(PrinterCallback)
        parallel.choose_layers(self.accelerator, model)
        self.rank, self.ranks = self.args.process_index, self.args.world_size
        if block.batch_size < self.ranks:
            raise UserError(
                "A batch has fewer rows than there are processes.",
                value=f"batch_size {block.batch_size}, {self.ranks} processes",
                remedy="use fewer GPUs, or larger batches in the recipe",
            )
        if plan.gradient_checkpointing:
            causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})
        # `compute_loss` divides by the targets of the whole accumulated batch itself.
        self.loss_is_scaled_for_ga = True

    # Set by Trainer, which mypy reads as Any.
    model: Any
    state: Any
    control: Any

    # What fine-tuning and distillation each define.

    def batch_loss(self, model: PeftModel, batch: dict[str, Any]) -> Tensor:
        """Sum of the loss over a batch's targets, nats, float32 scalar."""
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """Metrics of the held-out rows; one of them is `plan.metric`."""
        raise NotImplementedError

    def extra_tensors(self) -> dict[str, Tensor]:
        """What belongs to a checkpoint besides the factors."""
        return {}

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Set what `extra_tensors` gave."""

    def after_step(self) -> None:
        """Called when the factors have moved, before anything looks at the model."""

    # Trainer's hooks.

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One long pass: the order of the whole training, so that going on is skipping."""
        shares = [parallel.share(rows, self.rank, self.ranks) for rows in self.plan.order]
        return DataLoader(
            shares,  # type: ignore[arg-type]  # any indexable will do
            batch_sampler=[[number] for number in range(len(shares))],
            collate_fn=self._collate,
        )

    def _collate(self, shares: list[parallel.Share]) -> dict[str, Any]:
        (own,) = shares
        return collate(self.samples, own.rows, self.plan.tokens)._asdict() | {"counts": own.counts}

    def get_batch_samples(self, *arguments: Any) -> tuple[list[dict[str, Any]], Any]:
        """The batches of the next optimizer step, kept until the step is known to be sound."""
        batches, count = super().get_batch_samples(*arguments)
        self._batches = batches
        return batches, count

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        counts = [(batch["targets"] != IGNORED).sum() * batch["counts"] for batch in batch_samples]
        return parallel.summed(torch.stack(counts).sum().to(device))

    def compute_loss(
        self, model: PeftModel, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Mean over the targets of the accumulated batch, so that accumulation does not weigh short batches more."""
        if return_outputs:
            raise NotImplementedError("validation has a method of its own")
        if self.ranks == 1:
            total = self.batch_loss(model, inputs)
        else:
            # DDP and FSDP2 take the mean of the processes' gradients, and Trainer that of their losses.
            share = parallel.call_inside(model, self.model, lambda: self.batch_loss(self.model, inputs))
            total = share * inputs["counts"] * self.ranks
        loss: Tensor = total / num_items_in_batch
        return loss

    def inside(self, function: Callable[[], T]) -> T:
        """Call a function that runs the model; where its layers are sharded, all processes must."""
        return parallel.call_inside(self.model, self.model, function) if parallel.is_sharded(self.model) else function()

    def training_step(self, model: PeftModel, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A forward and backward; the first ones under the guard, so that every factor and quantizer takes part."""
        done = self.state.global_step - self._first_step
        due = [step for step in WATCHED_STEPS if step == done and step not in self._watched]
        # FSDP2 hands gradients over with the last of the accumulated batches.
        if not due or not self.accelerator.sync_gradients:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        self._watched |= set(due)
        with watch(self.model, quantized=self._wanted) as seen:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if parallel.is_sharded(self.model):
            parallel.count_sharded_gradients(seen, self.model)
        if inputs["counts"]:
            seen.require()
            self._guard = seen.to_json()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The norm before clipping, looked at before the optimizer moves anything."""
        norm = float(parallel.whole(super()._get_grad_norm(model, grad_norm=grad_norm)))
        self._require_sound(model, norm)
        return norm

    def _require_sound(self, model: Any, norm: float) -> None:
        past = [row["grad_norm"] for row in self.state.log_history if "grad_norm" in row]
        if not math.isfinite(norm):
            batches = map(self._prepare_inputs, self._batches)
            passes = [partial(self.compute_loss, model, batch, False, 1) for batch in batches]
            how, place = f"the gradient norm is {norm}", first_fault(self.model, passes)
        elif exploded(norm, past, self.args.max_grad_norm):
            how = f"the gradient norm rose to {norm:.3g}, from a median of {median(past[-HISTORY:]):.3g}"
            place = largest_gradient(self.model)
        else:
            return
        rows = [self.samples[row].id for batch in self._batches for row in batch["rows"]]
        raise self._diverged(self.state.global_step + 1, how, place, rows)

    def _diverged(self, step: int, how: str, place: str, rows: Sequence[str] = ()) -> UserError:
        best = f"step {self.state.best_global_step} is the best so far and is kept in {self.root}"
        kept = None if self.state.best_metric is None else best
        return divergence(f"{self.plan.label} diverged at step {step}", how, place, rows, kept)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate, remember the best, stop when patience runs out."""
        self.model.eval()
        with torch.no_grad():
            # Last digits may differ between GPUs, and all must decide alike.
            metrics = parallel.agreed(self.inside(self.validate))
        if not all(map(math.isfinite, metrics.values())):
            place = first_output(self.model, lambda: self.inside(self.validate))
            raise self._diverged(self.state.global_step, f"validation gave {json.dumps(metrics)}", place)
        self.log(dict(metrics))
        value = metrics[self.plan.metric]
        if self.state.best_metric is None or value < self.state.best_metric:
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            self.control.should_save = True
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._patience_is_over():
            self.control.should_training_stop = True
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Append one row to the state and to `log.jsonl`."""
        if "train_runtime" in logs:
            return
        if not all(map(math.isfinite, logs.values())):
            raise self._diverged(self.state.global_step, json.dumps(logs), "the loss, though the gradient is finite")
        names = {"learning_rate": "lr"}
        row = {"step": self.state.global_step, **{names.get(key, key): value for key, value in logs.items()}}
        row["seconds"] = round(self.seconds, 2)
        self.state.log_history.append(row)
        if self.rank == 0:
            self._append(row)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        if self._bar is not None:
            key = self.plan.metric if self.plan.metric in logs else "loss"
            self._bar.update(self.state.global_step, f"{key} {logs[key]:.4f}")

    def _append(self, row: dict[str, Any]) -> None:
        try:
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_fault(error, self.out / "log.jsonl") from error

    # Checkpoints.

    def _save_checkpoint(self, model: Any = None, trial: Any = None) -> None:
        content = Checkpoint(
            {name: parallel.for_the_first(parameter) for name, parameter in self._parameters().items()},
            self.extra_tensors(),
            tree_map_only(Tensor, parallel.for_the_first, self.optimizer.state_dict()),
            self.lr_scheduler.state_dict(),
            checkpoint.random_states(),
        )
        if self.rank == 0:
            state = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True)
            checkpoint.write(self.root, self.state.global_step, content, state, self.plan.fingerprint)
            checkpoint.prune(self.root, keep={self.state.global_step, int(self.state.best_global_step)})
        parallel.barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._set_tensors(checkpoint.read(Path(resume_from_checkpoint)))

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            content = checkpoint.read(Path(checkpoint_folder))
            parallel.place_optimizer_state_(content.optimizer, self.optimizer)
            self.optimizer.load_state_dict(content.optimizer)
            self.lr_scheduler.load_state_dict(content.scheduler)

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            checkpoint.restore_random(checkpoint.read(Path(checkpoint_folder)).random)
        self._part_generators()

    def _part_generators(self) -> None:
        """Give every process but the first random numbers of its own, so that dropout masks differ."""
        if self.rank:
            torch.manual_seed(self.plan.seed + self.rank + (self.state.global_step << 16))

    def _parameters(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _set_tensors(self, content: Checkpoint) -> None:
        own = self._parameters()
        if set(own) != set(content.parameters):
            raise RuntimeError(f"checkpoint of other parameters: {sorted(set(own) ^ set(content.parameters))[:3]}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(parallel.placed_like(content.parameters[name], parameter))
        self.load_extra_tensors(content.extra)

    # The run as a whole.

    @property
    def seconds(self) -> float:
        """Time spent, that of killed processes up to their last checkpoint included."""
        return self._spent + time.monotonic() - self._clock

    def run(self) -> LoopResult:
        """Train, or go on training, and leave the best factors in the model.

        Raises:
            UserError: The loss is no longer finite, or the disk is full.
            qat.patches.guard.DeadModules: A factor or quantizer took no part.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self.root = parallel.agreed(self.root)
        folder, deleted = parallel.by_the_first(lambda: checkpoint.newest(self.root, self.plan.fingerprint))
        resumed = self._take_up(folder)
        self._first_step = resumed or 0
        with progress_bar(self.plan.label, self.plan.steps) as self._bar:
            self._bar.update(resumed or 0)
            if not self._patience_is_over():
                self.train(resume_from_checkpoint=str(folder) if folder else None)
        best = int(self.state.best_global_step)
        self._set_tensors(checkpoint.read(checkpoint.folder_of(self.root, best)))
        self.model.eval()
        rows = [row for row in self.state.log_history if self.plan.metric in row]
        return LoopResult(
            steps=self.state.global_step,
            best_step=best,
            best=float(self.state.best_metric),
            first=float(rows[0][self.plan.metric]),
            stopped_early=self.state.global_step < self.plan.steps,
            resumed_from=resumed,
            deleted=deleted,
            seconds=round(self.seconds, 2),
            peak_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
            guard=self._guard,
            processes=self.ranks,
            sharded=parallel.is_sharded(self.model),
        )

    def _take_up(self, folder: Path | None) -> int | None:
        """Cut the log back to the checkpoint and count the time spent before it; returns its step."""
        log = self.out / "log.jsonl"
        if folder is None:
            log.unlink(missing_ok=True)
            return None
        state = type(self.state).load_from_json(str(folder / checkpoint.TRAINER_STATE))
        self.state = state
        write_atomic(log, "".join(json.dumps(row) + "\n" for row in state.log_history))
        self._spent = float(state.log_history[-1]["seconds"]) if state.log_history else 0.0
        self._clock = time.monotonic()
        return int(state.global_step)

    def _patience_is_over(self) -> bool:
        """From the log alone, so that a run that goes on decides as the undisturbed one did."""
        values = [row[self.plan.metric] for row in self.state.log_history if self.plan.metric in row]
        if not self.plan.patience or not values:
            return False
        return len(values) - 1 - values.index(min(values)) >= self.plan.patience

    def begin(self) -> None:
        """Validate once before the first step and keep that state: it is the best until training beats it."""
        self._part_generators()
        parallel.require_sharded(self.model, self._parameters())
        if self.state.best_metric is None:
            self.evaluate()
            self._save_checkpoint()
            self.control.should_save = False


class _Cadence(TrainerCallback):
    """When the loop logs, validates, saves and ends."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._loop.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        loop, step = self._loop, state.global_step
        loop.after_step()
        control.should_log = True
        control.should_evaluate = step % loop.plan.eval_every == 0 or step >= loop.plan.steps
        control.should_save = step % loop.save_every == 0
        control.should_training_stop = step >= loop.plan.steps
