from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.data.render import IGNORED
from qat.errors import UserError
from qat.recipe.schema import AdapterBlock, SftBlock
from qat.train import checkpoint
from qat.train.adapters import attach_adapter
from qat.train.batches import Sample, training_order
from qat.train.loop import Loop, Plan
from qat.train.objective import cross_entropy_sum, hidden_states, output_weight
from tests.tiny_models import nemotron_h_tiny

ADAPTER = AdapterBlock(rank=2, alpha=4.0, targets=("attention",))


def _samples(count: int = 12) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(count):
        ids = torch.randint(0, 512, (6 + number,), generator=generator).tolist()
        samples.append(Sample(str(number), "c", ids, [IGNORED] * (3 + number % 3) + ids[3 + number % 3 :]))
    return samples


class _Scripted(Loop):
    """A loop whose validation follows a script, so that best step and patience can be told by hand."""

    script: tuple[float, ...] = ()

    def batch_loss(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        targets = batch["targets"]
        return cross_entropy_sum(
            hidden_states(model, batch["input_ids"], targets), output_weight(model), targets[targets != IGNORED]
        )

    def validate(self) -> dict[str, float]:
        done = sum("eval_loss" in row for row in self.state.log_history)
        return {"eval_loss": self.script[done]}


def _loop(
    out: Path,
    script: tuple[float, ...],
    *,
    steps: int = 6,
    patience: int = 0,
    fingerprint: str = "f",
    checkpointing: bool = False,
    **block: Any,
) -> _Scripted:
    settings = SftBlock(**({"batch_size": 2, "learning_rate": 0.01, "save_every": 100} | block))
    samples = _samples()
    order = training_order(
        [len(s.input_ids) for s in samples], settings.batch_size, 1, count=steps * settings.gradient_accumulation
    )
    plan = Plan("test", order, "replies", steps, 2, patience, "eval_loss", 5, fingerprint, checkpointing)
    model, _ = attach_adapter(nemotron_h_tiny(), ADAPTER, "nemotron_h", 5)
    loop = _Scripted(model, samples, settings, plan, out)
    loop.script = script
    return loop


def _rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def _factors(loop: Loop) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in loop.model.parameters() if p.requires_grad])


def test_log_and_best_checkpoint(tmp_path: Path) -> None:
    loop = _loop(tmp_path, (3.0, 1.0, 2.0, 1.5))
    kept: dict[int, torch.Tensor] = {}
    write = checkpoint.write
    try:

        def remember(root: Path, step: int, *rest: Any) -> None:
            kept[step] = _factors(loop)
            write(root, step, *rest)

        checkpoint.write = remember  # type: ignore[assignment]
        result = loop.run()
    finally:
        checkpoint.write = write
    assert (result.steps, result.best_step, result.best, result.first) == (6, 2, 1.0, 3.0)
    assert not result.stopped_early and result.resumed_from is None
    rows = _rows(tmp_path)
    assert [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row] == [
        (0, 3.0),
        (2, 1.0),
        (4, 2.0),
        (6, 1.5),
    ]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert all({"lr", "grad_norm", "seconds"} <= set(row) for row in rows if "loss" in row)
    assert torch.equal(_factors(loop), kept[2])
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-2"]


def test_cosine_with_warm_up(tmp_path: Path) -> None:
    """lr(k) = peak k/w during warm-up, then peak (1 + cos(pi (k - w)/(n - w))) / 2, k steps already done."""
    _loop(tmp_path, (1.0,) * 8, steps=10, warmup_ratio=0.2, learning_rate=0.01).run()
    rates = [row["lr"] for row in _rows(tmp_path) if "lr" in row]
    cosine = [0.005 * (1 + float(torch.cos(torch.tensor(torch.pi * k / 8)))) for k in range(8)]
    assert rates == pytest.approx([0.0, 0.005, *cosine], abs=1e-6)


def test_patience(tmp_path: Path) -> None:
    result = _loop(tmp_path, (3.0, 1.0, 2.0, 2.0, 0.5), steps=12, patience=2).run()
    assert result.stopped_early and result.steps == 6 and result.best_step == 2


def test_going_on_after_patience_ran_out_does_not_train(tmp_path: Path) -> None:
    _loop(tmp_path, (3.0, 1.0, 2.0, 2.0), steps=12, patience=2, save_every=2).run()
    again = _loop(tmp_path, (), steps=12, patience=2, save_every=2).run()
    assert again.resumed_from == 6 and again.steps == 6 and again.best_step == 2 and again.stopped_early


def test_accumulated_loss_is_the_mean_over_all_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss whose value is known by hand, the sum of the target ids: a mean of means would weigh batches alike."""

    def batch_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        total = sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad)
        targets = batch["targets"]
        return targets[targets != IGNORED].sum() * (1 + total - total.detach())

    loop = _loop(tmp_path, (1.0,) * 3, steps=1, gradient_accumulation=3)
    monkeypatch.setattr(loop, "batch_loss", batch_loss)
    counted = [
        [label for row in rows for label in loop.samples[row].labels[1:] if label != IGNORED]
        for rows in loop.plan.order
    ]
    loop.run()
    (logged,) = [row["loss"] for row in _rows(tmp_path) if "loss" in row]
    everything = [label for labels in counted for label in labels]
    assert logged == pytest.approx(sum(everything) / len(everything), rel=1e-6)
    assert len({len(labels) for labels in counted}) > 1


def test_resuming_gives_the_undisturbed_factors(tmp_path: Path) -> None:
    """In one process: stop after step 4 by an exception, go on from checkpoint 3; killing a process is tested apart."""
    script = (4.0, 3.0, 2.0, 1.0)
    whole = _loop(tmp_path / "whole", script, save_every=3)
    whole.run()
    broken = _loop(tmp_path / "broken", script, save_every=3)

    def stop() -> None:
        if broken.state.global_step == 5:
            raise KeyboardInterrupt

    broken.after_step = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    torch.manual_seed(99)
    again = _loop(tmp_path / "broken", script, save_every=3)
    result = again.run()
    assert result.resumed_from == 4  # best so far: saved at the validation of step 4
    assert torch.equal(_factors(again), _factors(whole))
    strip = lambda rows: [{key: value for key, value in row.items() if key != "seconds"} for row in rows]  # noqa: E731
    assert strip(_rows(tmp_path / "broken")) == strip(_rows(tmp_path / "whole"))


def test_half_written_and_foreign_checkpoints_are_deleted(tmp_path: Path) -> None:
    _loop(tmp_path, (3.0, 2.0, 1.0, 0.5), fingerprint="other").run()
    half = tmp_path / "checkpoints" / "checkpoint-999"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    result = _loop(tmp_path, (3.0, 2.0, 1.0, 0.5)).run()
    assert result.resumed_from is None
    assert sorted(result.deleted) == ["checkpoint-6: of another training", "checkpoint-999: half-written"]
    assert not half.exists()


def test_divergence_of_the_loss_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = _loop(tmp_path, (1.0,) * 9)
    sound = loop.batch_loss
    monkeypatch.setattr(loop, "batch_loss", lambda model, batch: sound(model, batch) * float("nan"))
    with pytest.raises(UserError, match="diverged at step 1: the gradient norm is nan") as caught:
        loop.run()
    assert caught.value.where == "the loss is not finite, though every layer's output is"


def test_the_layer_that_broke_is_named_and_nothing_moved(tmp_path: Path) -> None:
    """A layer gives infinities from the fourth step on: the message names it, and the factors are those of step 3."""
    loop = _loop(tmp_path, (3.0, 2.0, 1.0, 0.5), save_every=1)
    layer = loop.model.get_base_model().get_submodule("model.layers.2.mixer.k_proj")
    before: list[torch.Tensor] = []

    def wreck(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor | None:
        if loop.state.global_step < 3 or not module.training:
            return None
        before[:] = before or [_factors(loop)]
        return output + float("inf")

    layer.register_forward_hook(wreck)
    with pytest.raises(UserError, match="diverged at step 4") as caught:
        loop.run()
    assert "the output of model.layers.2.mixer.k_proj is the first" in caught.value.where
    assert all(loop.samples[row].id in str(caught.value.value) for row in loop.plan.order[3])
    assert "step 2 is the best so far and is kept" in caught.value.remedy
    assert torch.equal(before[0], _factors(loop))
    kept = checkpoint.read(loop.root / "checkpoint-3").parameters
    assert len(kept) > 4 and all(torch.equal(loop.model.get_parameter(name).cpu(), kept[name]) for name in kept)


def test_an_explosion_of_the_gradient_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = _loop(tmp_path, (1.0,) * 9, steps=9)
    sound = loop.batch_loss
    monkeypatch.setattr(
        loop, "batch_loss", lambda model, batch: sound(model, batch) * (1e8 if loop.state.global_step == 6 else 1.0)
    )
    with pytest.raises(
        UserError, match=r"diverged at step 7: the gradient norm rose to \S+, from a median of"
    ) as caught:
        loop.run()
    assert "is the largest" in caught.value.where and _rows(tmp_path)[-1]["step"] == 6


def test_gradient_checkpointing_gives_the_same_factors(tmp_path: Path) -> None:
    factors, calls = [], []
    for number, checkpointing in enumerate((False, True)):
        loop = _loop(tmp_path / str(number), (3.0, 2.0, 1.0), steps=4, checkpointing=checkpointing)
        calls.append(0)

        def count(module: Any, arguments: Any, output: Any, number: int = number) -> None:
            calls[number] += module.training

        loop.model.get_base_model().get_submodule("model.layers.2.mixer.q_proj").register_forward_hook(count)
        loop.run()
        factors.append(_factors(loop))
    assert torch.equal(factors[0], factors[1])
    assert calls[1] == 2 * calls[0] > 0


def test_factors_and_optimizer_are_float32(tmp_path: Path) -> None:
    loop = _loop(tmp_path, (3.0, 2.0), steps=2)
    loop.run()
    content = checkpoint.read(loop.root / "checkpoint-2")
    tensors = [*content.parameters.values()]
    tensors += [value for slot in content.optimizer["state"].values() for value in slot.values()]
    assert len(tensors) == 4 * len(content.parameters)  # factor, two moments, the count of steps
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_a_factor_without_gradient_is_an_error(tmp_path: Path) -> None:
    from qat.patches.guard import DeadModules

    loop = _loop(tmp_path, (1.0,) * 9)
    loop.model.get_parameter("base_model.model.model.layers.2.mixer.q_proj.lora_B.default.weight").register_hook(
        torch.zeros_like
    )
    with pytest.raises(DeadModules, match="q_proj"):
        loop.run()


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 2)}},
        "param_groups": [{"lr": 0.1 + 1e-17, "betas": (0.9, 0.999), "params": [0], "foreach": None}],
    }
    written = checkpoint.Checkpoint(
        {"a": torch.randn(3)}, {"x": torch.ones(())}, optimizer, {"last_epoch": 3}, checkpoint.random_states()
    )
    checkpoint.write(tmp_path, 3, written, "{}", "f")
    read = checkpoint.read(tmp_path / "checkpoint-3")
    assert torch.equal(read.parameters["a"], written.parameters["a"]) and torch.equal(
        read.extra["x"], written.extra["x"]
    )
    assert torch.equal(read.optimizer["state"][0]["exp_avg"], optimizer["state"][0]["exp_avg"])
    assert read.optimizer["param_groups"][0]["lr"] == 0.1 + 1e-17 and read.scheduler == {"last_epoch": 3}
    drawn = torch.rand(3)
    checkpoint.restore_random(read.random)
    assert torch.equal(torch.rand(3), drawn)
    names = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert names == {"COMPLETE", "state.json", "tensors.safetensors", "trainer_state.json"}


def test_the_marker_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    write_atomic = checkpoint.write_atomic
    monkeypatch.setattr(
        checkpoint, "write_atomic", lambda path, content: (order.append(path.name), write_atomic(path, content))
    )
    monkeypatch.setattr(
        checkpoint, "write_json", lambda path, value: (order.append(path.name), write_atomic(path, json.dumps(value)))
    )
    checkpoint.write(tmp_path, 1, checkpoint.Checkpoint({}, {}, {}, {}, checkpoint.random_states()), "{}", "f")
    assert order[-1] == checkpoint.MARKER and len(order) == 4


@pytest.mark.parametrize("step", [0, 2])
def test_a_validation_that_is_not_finite_names_the_layer(tmp_path: Path, step: int) -> None:
    """Only held-out rows break it: the training's own gradients stay sound, so nothing else would notice."""
    loop = _loop(tmp_path, (3.0,))
    broken = loop.model.get_base_model().get_submodule("model.layers.2.mixer.o_proj")
    broken.register_forward_hook(
        lambda module, _, output: (
            output * float("nan") if not module.training and loop.state.global_step == step else None
        )
    )

    def validate() -> dict[str, float]:
        ids = torch.tensor([loop.samples[0].input_ids], device=loop.args.device)
        return {"eval_loss": float(hidden_states(loop.model, ids, ids).float().mean())}

    loop.validate = validate  # type: ignore[method-assign]
    with pytest.raises(UserError, match=rf"diverged at step {step}: validation gave .*NaN") as caught:
        loop.run()
    assert caught.value.where == "the output of model.layers.2.mixer.o_proj is the first that is not finite"
    said = "nothing has been trained yet" if step == 0 else "step 0 is the best so far and is kept"
    assert said in caught.value.remedy
