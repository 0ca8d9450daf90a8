"""Two processes against one, on CPUs over gloo, in both ways: the whole base in each, or a part of every layer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from qat.calibration import calibrate
from qat.quant.state import QuantState
from qat.recipe.schema import Recipe
from qat.train import launch
from qat.train.launch import ONE, Processes, run_stage
from tests.unit.train import world
from tests.unit.train.conftest import Small

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


class Way(NamedTuple):
    """How two processes keep the base."""

    flags: tuple[str, ...]
    program: str

    @property
    def two(self) -> Processes:
        return Processes(2, self.flags)


WAYS = {
    "replicate": Way(("--multi_gpu",), launch.PROGRAM),
    "shard": Way(("--use_fsdp",), "tests.unit.train.sharded_process"),
}


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    chosen = WAYS[request.param]
    monkeypatch.setattr(launch, "PROGRAM", chosen.program)
    return chosen


def _recipe(small: Small) -> Recipe:
    """Batches of 23 and of one row, so that a process has nothing of its own to do in every other one."""
    return world.recipe(
        small.base,
        sft={"batch_size": 23, "gradient_accumulation": 2, "learning_rate": 0.01, "save_every": 1, "epochs": 4},
        distill={"batch_size": 5, "max_steps": 4, "learning_rate": 0.0003, "eval_every": 2, "save_every": 1},
    )


def _curve(folder: Path) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {key: [row[key] for row in rows if key in row] for key in ("step", "loss", "grad_norm", "eval_loss", "kl")}


def _same(found: Path, expected: Path) -> None:
    """The same rows, and figures within what another order of summation in bfloat16 makes of them.

    The first step has a learning rate of zero, so two steps see the same weights and agree closely. Then Adam, whose
    first step is the gradient's sign, makes something of the rounding of gradients near zero.
    """
    one, two = _curve(expected), _curve(found)
    assert one["step"] == two["step"] and len(one["loss"]) > 3
    assert two["loss"][:2] == pytest.approx(one["loss"][:2], rel=1e-3)
    assert two["grad_norm"][:2] == pytest.approx(one["grad_norm"][:2], rel=1e-3)
    assert two["loss"] == pytest.approx(one["loss"], rel=0.03)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.1)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=0.01)
    assert two["kl"] == pytest.approx(one["kl"], rel=0.1)


@pytest.fixture(scope="module")
def alone(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuning in one process."""
    out = tmp_path_factory.mktemp("alone") / "sft"
    run_stage("sft", _recipe(small), [small.base, small.train, small.validation, out], ONE)
    return out


@pytest.fixture(scope="module")
def calibrated(small: Small, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated")
    calibrate(_recipe(small), "all", small.base, alone / "adapter", small.train, out)
    return out / "quant_state.safetensors"


@pytest.fixture(scope="module")
def distilled(small: Small, alone: Path, calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distillation in one process."""
    out = tmp_path_factory.mktemp("distilled") / "all"
    paths = [small.base, alone / "adapter", calibrated, small.train, small.validation, out]
    run_stage("distill", _recipe(small), paths, ONE)
    return out


def test_fine_tuning(small: Small, alone: Path, way: Way, tmp_path: Path) -> None:
    out = tmp_path / "sft"
    outcome = run_stage("sft", _recipe(small), [small.base, small.train, small.validation, out], way.two)
    _same(out, alone)
    assert outcome.report["loop"]["processes"] == 2
    assert outcome.report["loop"]["sharded"] == (way == WAYS["shard"])
    assert outcome.report["loop"]["guard"]["dead"] == {}
    found, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, alone))
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }
    moved = torch.cat([(found[name] - expected[name]).flatten() for name in expected]).norm()
    assert moved < 0.05 * torch.cat([tensor.flatten() for tensor in expected.values()]).norm()
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "checkpoints", "log.jsonl"]


def test_distillation(small: Small, alone: Path, calibrated: Path, distilled: Path, way: Way, tmp_path: Path) -> None:
    out = tmp_path / "all"
    paths = [small.base, alone / "adapter", calibrated, small.train, small.validation, out]
    outcome = run_stage("distill", _recipe(small), paths, way.two)
    _same(out, distilled)
    assert outcome.report["loop"]["guard"]["dead"] == {}
    found, expected = (QuantState.load(folder / "quant_state.safetensors") for folder in (out, distilled))
    for name, state in expected.modules.items():
        torch.testing.assert_close(found.modules[name].weight_amax, state.weight_amax, rtol=0.02, atol=0)
        assert torch.equal(found.modules[name].input_amax, state.input_amax)


_COMMAND = """
import sys
from pathlib import Path
from qat.recipe.schema import Recipe
from qat.train import launch
launch.PROGRAM, flags = sys.argv[2], tuple(sys.argv[3].split())
paths = [Path(path) for path in sys.argv[5:]]
launch.run_stage("sft", Recipe.model_validate_json(sys.argv[1]), paths, launch.Processes(int(sys.argv[4]), flags))
"""


def _killed_in_the_middle(recipe: Recipe, program: str, processes: Processes, paths: list[Path]) -> None:
    """Run a stage in a process of its own and kill that, whatever it has started, as soon as step 2 is saved."""
    arguments = [recipe.model_dump_json(), program, " ".join(processes.flags), str(processes.gpus), *map(str, paths)]
    command = subprocess.Popen([sys.executable, "-c", _COMMAND, *arguments], env=dict(os.environ))
    deadline = time.monotonic() + 120
    while not (paths[-1] / "checkpoints" / "checkpoint-2" / "COMPLETE").is_file():
        assert command.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    command.send_signal(signal.SIGKILL)
    command.wait()
    _until(lambda: not _processes_of(paths[-1]), deadline)


def _until(done: Callable[[], bool], deadline: float) -> None:
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _processes_of(folder: Path) -> list[str]:
    """Processes that name a folder of this test in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in line:
            found.append(path.parent.name)
    return found


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_going_on_with_another_count(
    before: int, after: int, small: Small, alone: Path, way: Way, tmp_path: Path
) -> None:
    out = tmp_path / "sft"
    paths = [small.base, small.train, small.validation, out]
    processes = {1: ONE, 2: way.two}
    _killed_in_the_middle(_recipe(small), way.program, processes[before], paths)
    assert not (out / "adapter").exists()
    outcome: Any = run_stage("sft", _recipe(small), paths, processes[after])
    assert outcome.report["loop"]["resumed_from"] >= 2 and outcome.report["loop"]["processes"] == after
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "checkpoints", "log.jsonl"]
    _same(out, alone)
