"""Two GPUs over NCCL against one: the trainer itself, as `qat train --gpus 2` starts it.

All trainings run as commands of their own. One GPU comes first and compiles what kernels there are; after it everything
that does not wait for something else runs at the same time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from qat.quant.state import QuantState
from qat.recipe.schema import Recipe
from tests.unit.train import world

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
SECONDS = 150

WHOLE, CUT = ("--multi_gpu",), ("--use_fsdp",)

_COMMAND = """
import json, sys
from pathlib import Path
from qat.recipe.schema import Recipe
from qat.train.launch import Processes, run_stage
stage, recipe, gpus, flags, report, *paths = sys.argv[1:]
recipe, paths = Recipe.model_validate_json(recipe), [Path(path) for path in paths]
if stage == "calibrate":
    from qat.calibration import calibrate
    calibrate(recipe, "all", *paths)
    found = {}
else:
    found = run_stage(stage, recipe, paths, Processes(int(gpus), tuple(flags.split()))).report
Path(report).write_text(json.dumps(found))
"""


class Command(NamedTuple):
    """One stage as a command.

    Attributes:
        stage: `sft`, `calibrate` or `distill`.
        paths: Its arguments, the last one its folder.
        gpus: How many.
        flags: Of the launcher.
    """

    stage: str
    paths: Sequence[Path]
    gpus: int = 1
    flags: Sequence[str] = ()

    @property
    def report(self) -> Path:
        return self.paths[-1].with_name(f"{self.paths[-1].name}.report.json")

    def start(self, recipe: Recipe) -> subprocess.Popen[bytes]:
        self.paths[-1].parent.mkdir(parents=True, exist_ok=True)
        visible = {"CUDA_VISIBLE_DEVICES": "0"} if self.gpus == 1 else {}
        words = [self.stage, recipe.model_dump_json(), str(self.gpus), " ".join(self.flags), str(self.report)]
        with self.report.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", _COMMAND, *words, *map(str, self.paths)],
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", **visible},
                stdout=log,
                stderr=log,
            )

    def run(self, recipe: Recipe) -> dict[str, Any]:
        """To its end; its report."""
        started = self.start(recipe)
        try:
            status = started.wait(SECONDS)
        except subprocess.TimeoutExpired:
            started.kill()
            status = -1
        if status != 0:
            inner = self.paths[-1] / "processes" / "launcher.log"
            logs = [
                file.read_text(errors="replace")[-3000:]
                for file in (self.report.with_suffix(".log"), inner)
                if file.is_file()
            ]
            raise AssertionError(f"{self.stage} on {self.gpus} ended with {status}\n" + "\n".join(logs))
        found: dict[str, Any] = json.loads(self.report.read_text(encoding="utf-8"))
        return found

    def kill_after_step_two(self, recipe: Recipe) -> None:
        """With all that it has started."""
        started, until = self.start(recipe), time.monotonic() + SECONDS
        while not (self.paths[-1] / "checkpoints" / "checkpoint-2" / "COMPLETE").is_file():
            assert started.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        started.kill()
        started.wait()
        time.sleep(3)  # its processes follow it


class Trainings:
    """All trainings, each a future of its report."""

    def __init__(self, root: Path, pool: ThreadPoolExecutor) -> None:
        self.root = root
        self.base = world.save_base(root / "base")
        self.train = world.save_conversations(root / "train.jsonl", 24, seed=1)
        self.validation = world.save_conversations(root / "validation.jsonl", 10, seed=2)
        sft = {"batch_size": 23, "gradient_accumulation": 2, "learning_rate": 0.01, "save_every": 1, "epochs": 4}
        distill = {"batch_size": 5, "max_steps": 4, "learning_rate": 0.0003, "eval_every": 2, "save_every": 1}
        self.recipe = world.recipe(self.base, sft=sft, distill=distill)
        self.futures: dict[str, Future[dict[str, Any]]] = {}
        start = pool.submit
        self.futures["sft"] = start(self.fine_tune, "sft", 1)
        self.futures["calibrated"] = start(self.after, "sft", self.calibrate)
        self.futures["distill"] = start(self.after, "calibrated", self.distil, "distill", 1)
        for name, flags in (("whole", WHOLE), ("cut", CUT)):
            self.futures[f"sft-{name}"] = start(self.after, "sft", self.fine_tune, f"sft-{name}", 2, flags)
            self.futures[f"distill-{name}"] = start(self.after, "distill", self.distil, f"distill-{name}", 2, flags)
            for before, after in ((1, 2), (2, 1)):
                resumed = f"sft-{name}-{before}-{after}"
                self.futures[resumed] = start(self.after, "sft", self.resume, resumed, before, after, flags)
        self.futures["sft-chosen"] = start(self.after, "sft", self.fine_tune, "sft-chosen", 2)

    def after(self, first: str, work: Any, *arguments: Any) -> dict[str, Any]:
        self.futures[first].result()
        found: dict[str, Any] = work(*arguments)
        return found

    def fine_tune(self, name: str, gpus: int, flags: Sequence[str] = ()) -> dict[str, Any]:
        return Command("sft", [self.base, self.train, self.validation, self.root / name], gpus, flags).run(self.recipe)

    def calibrate(self) -> dict[str, Any]:
        paths = [self.base, self.root / "sft" / "adapter", self.train, self.root / "calibrated"]
        return Command("calibrate", paths).run(self.recipe)

    def distil(self, name: str, gpus: int, flags: Sequence[str] = ()) -> dict[str, Any]:
        state = self.root / "calibrated" / "quant_state.safetensors"
        paths = [self.base, self.root / "sft" / "adapter", state, self.train, self.validation, self.root / name]
        return Command("distill", paths, gpus, flags).run(self.recipe)

    def resume(self, name: str, before: int, after: int, flags: Sequence[str]) -> dict[str, Any]:
        paths = [self.base, self.train, self.validation, self.root / name]
        two = {1: Command("sft", paths), 2: Command("sft", paths, 2, flags)}
        two[before].kill_after_step_two(self.recipe)
        return two[after].run(self.recipe)

    def curve(self, name: str) -> dict[str, list[float]]:
        rows = [json.loads(line) for line in (self.root / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        keys = ("step", "loss", "grad_norm", "eval_loss", "kl")
        return {key: [row[key] for row in rows if key in row] for key in keys}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices")
    with ThreadPoolExecutor(max_workers=16) as pool:
        yield Trainings(tmp_path_factory.mktemp("two"), pool)


def _same(trainings: Trainings, name: str, expected: str) -> None:
    """The same rows; figures within what other kernels for other batch sizes make of bfloat16.

    The first step has a learning rate of zero, so two steps see the same weights. Then Adam, whose first step is the
    gradient's sign, makes something of the rounding of gradients near zero.
    """
    found, one = trainings.curve(name), trainings.curve(expected)
    pairs = {key: list(zip(found[key], one[key], strict=True)) for key in one if key != "step" and one[key]}
    apart = {key: max(abs(a / b - 1) for a, b in both) for key, both in pairs.items()}
    print(f"{name} against {expected}, largest relative differences: {apart}")
    assert found["step"] == one["step"] and len(one["loss"]) > 3
    assert found["loss"][:2] == pytest.approx(one["loss"][:2], rel=5e-3)
    assert found["grad_norm"][:2] == pytest.approx(one["grad_norm"][:2], rel=2e-2)
    assert found["loss"] == pytest.approx(one["loss"], rel=0.05)
    assert found["eval_loss"] == pytest.approx(one["eval_loss"], rel=0.02)
    assert found["kl"] == pytest.approx(one["kl"], rel=0.15)


@pytest.mark.parametrize("name", ["sft-whole", "sft-cut", "sft-chosen"])
def test_fine_tuning(name: str, trainings: Trainings) -> None:
    report = trainings.futures[name].result()
    assert (report["loop"]["processes"], report["loop"]["sharded"]) == (2, name == "sft-cut")
    guard = report["loop"]["guard"]
    assert guard["dead"] == {} and guard["trained_parameters"] == 2 * guard["adapted_weights"] > 0
    _same(trainings, name, "sft")


@pytest.mark.parametrize("name", ["distill-whole", "distill-cut"])
def test_distillation(name: str, trainings: Trainings) -> None:
    report = trainings.futures[name].result()
    guard = report["loop"]["guard"]
    assert guard["dead"] == {} and guard["quantizers_ran"] > 0
    _same(trainings, name, "distill")
    found, expected = (QuantState.load(trainings.root / each / "quant_state.safetensors") for each in (name, "distill"))
    for module, state in expected.modules.items():
        torch.testing.assert_close(found.modules[module].weight_amax, state.weight_amax, rtol=0.02, atol=0)
        assert torch.equal(found.modules[module].input_amax, state.input_amax)


@pytest.mark.parametrize("name", ["sft-whole-1-2", "sft-whole-2-1", "sft-cut-1-2", "sft-cut-2-1"])
def test_going_on_with_another_count(name: str, trainings: Trainings) -> None:
    report = trainings.futures[name].result()
    assert report["loop"]["resumed_from"] >= 2 and report["loop"]["processes"] == int(name[-1])
    _same(trainings, name, "sft")
