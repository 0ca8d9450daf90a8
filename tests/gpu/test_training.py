"""The trainer on a GPU: fine-tuning and distillation of a tiny Nemotron-H, with this package's kernels and the scan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from qat.calibration import calibrate
from qat.recipe.schema import Recipe
from qat.train.distill import distill
from qat.train.sft import SftLoop, SftReport, train_sft
from tests.unit.train import world

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("scan")]


class Files(NamedTuple):
    """A tiny checkpoint and conversations for it."""

    base: Path
    train: Path
    validation: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("files")
    return Files(
        world.save_base(root / "base"),
        world.save_conversations(root / "train.jsonl", 24, seed=1),
        world.save_conversations(root / "validation.jsonl", 10, seed=2),
    )


def _recipe(files: Files, **modes: Any) -> Recipe:
    recipe = world.recipe(files.base, distill={"max_steps": 24, "learning_rate": 0.002, "eval_every": 8})
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=modes)})


def _fine_tune(recipe: Recipe, files: Files, out: Path) -> SftReport:
    return train_sft(recipe, files.base, files.train, files.validation, out)


def _curve(out: Path) -> dict[int, float]:
    """Step -> training loss."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("memory", ["bf16", "nvfp4"])
def test_fine_tuning_lowers_the_loss_and_everything_is_alive(
    files: Files, tmp_path: Path, memory: str, checkpointing: bool
) -> None:
    torch.cuda.reset_peak_memory_stats()
    recipe = _recipe(files, memory=memory, gradient_checkpointing=checkpointing)
    report = _fine_tune(recipe, files, tmp_path)
    assert torch.cuda.max_memory_allocated() > 0
    assert 0 < report.loop.best < report.loop.first - 0.1
    guard = report.loop.guard
    assert guard is not None and guard["dead"] == {}
    assert guard["trained_parameters"] == 2 * sum(report.coverage.matched.values())
    assert report.packed == (14 if memory == "nvfp4" else 0)


@pytest.mark.parametrize("memory", ["bf16", "nvfp4"])
def test_distillation_lowers_the_divergence_and_everything_is_alive(files: Files, tmp_path: Path, memory: str) -> None:
    recipe = _recipe(files, memory=memory)
    _fine_tune(recipe, files, tmp_path / "sft")
    persona, state = tmp_path / "sft" / "adapter", tmp_path / "calibration" / "quant_state.safetensors"
    calibrate(recipe, "all", files.base, persona, files.train, tmp_path / "calibration")
    report = distill(recipe, files.base, persona, state, files.train, files.validation, tmp_path / "distill")
    assert 0 < report.loop.best < report.loop.first
    guard = report.loop.guard
    assert guard is not None and guard["dead"] == {}
    assert guard["quantizers_ran"] == 2 * report.quantized == 28
    assert guard["trained_parameters"] == 2 * sum(report.coverage.matched.values())


def test_a_stopped_run_goes_on_along_the_same_curve(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after step 5, gone on from the checkpoint of step 3.

    Step 4 sees the same weights and the same rows as before the stop. What follows may differ where a kernel sums in
    no fixed order; a figure of the undisturbed run is met within the noise that another run of the same recipe has.
    """
    recipe, out = _recipe(files), tmp_path / "stopped"
    whole = _fine_tune(recipe, files, tmp_path / "whole")
    after_step = SftLoop.after_step

    def stop(self: Any) -> None:
        after_step(self)
        if self.state.global_step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SftLoop, "after_step", stop)
        with pytest.raises(KeyboardInterrupt):
            _fine_tune(recipe, files, out)
    before = _curve(out)
    report = _fine_tune(recipe, files, out)
    assert report.loop.resumed_from == 3 and list(before) == [1, 2, 3, 4, 5]
    curve, undisturbed = _curve(out), _curve(tmp_path / "whole")
    print("equal to the undisturbed run:", [step for step in curve if curve[step] == undisturbed[step]])
    assert curve[4] == pytest.approx(before[4], rel=1e-5)
    assert curve[5] == pytest.approx(before[5], rel=1e-2)
    assert curve == pytest.approx(undisturbed, rel=5e-2)
    assert report.loop.best == pytest.approx(whole.loop.best, rel=5e-2)
