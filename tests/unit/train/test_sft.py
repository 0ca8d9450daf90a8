from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qat.errors import UserError
from qat.train.base import base_sha256, load_tokenizer
from qat.train.batches import encode_file
from qat.train.persona import load_persona
from qat.train.sft import SftLoop, train_sft, validation_loss
from tests.unit.train import world
from tests.unit.train.conftest import Small

_CHILD = """
import sys, torch
torch.set_num_threads(2)
from pathlib import Path
from tests.unit.train import world
from qat.train.sft import train_sft
base, train, validation, out = map(Path, sys.argv[1:])
train_sft(world.recipe(base), base, train, validation, out)
"""


def test_fine_tuning_lowers_the_loss_of_the_merged_persona(small: Small, tmp_path: Path) -> None:
    """The validation loss that chose the checkpoint is that of the merged persona, to the bit."""
    recipe = world.recipe(small.base)
    report = train_sft(recipe, small.base, small.train, small.validation, tmp_path)
    assert 0 < report.loop.best < report.loop.first - 0.1
    held_out = encode_file(small.validation, load_tokenizer(recipe.base, small.base), 64).samples
    persona = load_persona(small.base, tmp_path / "adapter", base_sha256(small.base))
    assert validation_loss(persona, held_out) == report.loop.best
    assert report.train.conversations == 24 and report.loop.steps == 12
    json.dumps(report.to_json(), allow_nan=False)


def test_validation_loss_by_the_slow_way(small: Small) -> None:
    """Row by row with the model's own labels argument."""
    from qat.train.base import load_base

    model = load_base(small.base)
    held_out = encode_file(small.validation, load_tokenizer(world.recipe(small.base).base, small.base), 64).samples
    total, count = 0.0, 0
    for sample in held_out:
        ids, labels = torch.tensor([sample.input_ids, sample.labels], device=model.device).unsqueeze(1)
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=labels).loss)
        supervised = int((labels[:, 1:] != -100).sum())
        total, count = total + loss * supervised, count + supervised
    assert validation_loss(model, held_out) == pytest.approx(total / count, rel=2e-3)


def test_training_that_never_helps_is_an_error(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SftLoop, "validate", lambda self: {"eval_loss": 2.0 + self.state.global_step})
    with pytest.raises(UserError, match="never came below"):
        train_sft(world.recipe(small.base, sft={"epochs": 1}), small.base, small.train, small.validation, tmp_path)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [2, 7])
def test_a_killed_run_ends_with_the_undisturbed_bytes(small: Small, tmp_path: Path, kill_at: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", _CHILD, str(small.base), str(small.train), str(small.validation), str(out)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait(timeout=120) == 0
    child = start(tmp_path / "killed")
    log = tmp_path / "killed" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and f'"step": {kill_at}, "loss"' in log.read_text(encoding="utf-8")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "adapter").exists()
    assert start(tmp_path / "killed").wait(timeout=120) == 0
    weights = [tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("whole", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    rows = [
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("whole", "killed")
    ]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
