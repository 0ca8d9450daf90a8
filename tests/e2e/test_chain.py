"""The chain on the embedded tiny base: real training, real ModelOpt quantizers, real vLLM, a real verdict.

Smaller than `annie_tiny` (fewer conversations and steps) to fit the fast tests; what it holds does not depend on size.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qat.errors import UserError
from qat.serve.engine import engine_python

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = (
    "data.count=60", "train.sft.save_every=3", "train.sft.epochs=1", "train.distill.max_steps=6",
    "train.distill.save_every=2", "train.distill.eval_every=3", "train.distill.prompts.count=60",
    "quant.calibration.samples=16",
)  # fmt: skip
ARMS = ("bf16", "nvfp4_all_ptq", "nvfp4_all_qad")


def qat(*arguments: str, runs: Path) -> list[str]:
    return [sys.executable, "-m", "qat", *arguments, "--runs-dir", str(runs)]


def settings() -> list[str]:
    return [part for item in SMALL for part in ("--set", item)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def call(*arguments: str, runs: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        qat(*arguments, runs=runs), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=900
    )


def train_and_export(runs: Path) -> None:
    """The run's parts up to its exports, each its own command."""
    for arguments in (
        ("train", "--recipe", "annie_tiny", *settings()),
        ("export", "--format", "nvfp4"),
        ("export", "--format", "bf16"),
    ):
        done = call(*arguments, runs=runs)
        assert done.returncode == 0, done.stderr[-2000:]


def hashes(run: Path, arm: str) -> dict[str, str]:
    """SHA-256 of every file of an export but its report, which holds times."""
    files = sorted(p for p in (run / "export" / arm).iterdir() if p.name != "export.json")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def engine() -> None:
    try:
        engine_python()
    except UserError as fault:
        if os.environ.get("CI"):  # there, a missing environment is a missing step of the setup
            raise
        pytest.skip(f"no vLLM environment: {fault}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, engine: None) -> tuple[Path, int]:
    """One undisturbed `qat run`: its folder and exit code."""
    runs = tmp_path_factory.mktemp("runs")
    done = call("run", "--recipe", "annie_tiny", *settings(), runs=runs)
    assert done.returncode in (0, 1, 3), done.stderr[-3000:]
    return runs / "annie_tiny", done.returncode


@pytest.mark.engine
def test_one_command_leads_to_a_verdict(whole: tuple[Path, int]) -> None:
    run, code = whole
    verdict = json.loads((run / "verdict.json").read_text())
    assert {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}[verdict["verdict"]] == code
    assert set(verdict["arms"]) == {"base", *ARMS}
    assert all(arm["overall"]["n"] == 120 for arm in verdict["arms"].values())
    assert verdict["arms"]["base"]["overall"]["rate"] <= 0.25
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.engine
def test_what_was_trained_is_what_was_exported(whole: tuple[Path, int]) -> None:
    run, _ = whole
    for arm in ARMS:
        report = json.loads((run / "export" / arm / "export.json").read_text())
        assert report["verification"]["differing_bytes"] == 0 and report["verification"]["faults"] == []
        assert bool(report["packed"]) == (arm != "bf16")
        assert len(report["adapters"]) == (2 if arm == "nvfp4_all_qad" else 1)


@pytest.mark.engine
def test_a_second_call_has_nothing_to_do(whole: tuple[Path, int]) -> None:
    run, code = whole
    begun = time.monotonic()
    again = call("run", "--recipe", "annie_tiny", *settings(), runs=run.parent)
    assert again.returncode == code and time.monotonic() - begun < 20


@pytest.mark.slow
@pytest.mark.engine
def test_the_parts_give_the_same_arms_as_the_whole(whole: tuple[Path, int], tmp_path: Path) -> None:
    run, code = whole
    train_and_export(tmp_path)
    for arm in ARMS:
        assert hashes(tmp_path / "annie_tiny", arm) == hashes(run, arm)
    assert call("test", runs=tmp_path).returncode == code


def kill_when(process: subprocess.Popen[bytes], reached: Path, pattern: str) -> None:
    """SIGKILL the process as soon as something of that name exists."""
    deadline = time.monotonic() + 300
    while not any(reached.glob(pattern)):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.engine
def test_a_killed_run_ends_with_the_same_bytes(whole: tuple[Path, int], tmp_path: Path) -> None:
    """SIGKILL during fine-tuning, distillation and export; the next call goes on."""
    run, _ = whole
    mine = tmp_path / "annie_tiny"
    command = qat("run", "--recipe", "annie_tiny", *settings(), runs=tmp_path)
    for folder, pattern in (
        ("sft/checkpoints", "*/COMPLETE"),
        ("distill/all/checkpoints", "*/COMPLETE"),
        ("export", ".nvfp4_all_qad.partial*"),
    ):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=environment(), cwd=ROOT, **quiet)
        kill_when(process, mine / folder, pattern)
    train_and_export(tmp_path)
    for arm in ARMS:
        assert hashes(mine, arm) == hashes(run, arm)
    # Six steps need not beat plain NVFP4, and then the adapter handed over is the untrained one: the last step's
    # factors, moments and ranges are what a kill could have changed.
    for last in ("sft/checkpoints/checkpoint-7", "distill/all/checkpoints/checkpoint-6"):
        tensors = f"{last}/tensors.safetensors"
        assert (mine / tensors).read_bytes() == (run / tensors).read_bytes()
