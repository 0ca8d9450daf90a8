from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from qat.errors import UserError
from qat.recipe.schema import Recipe
from qat.train import launch
from qat.train.launch import Processes
from tests.unit.train import world


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return world.recipe(tmp_path)


def test_the_machines_are_those_of_the_flags() -> None:
    assert Processes().machines == 1
    assert Processes(16, ("--machine_rank", "0", "--num_machines", "4", "--main_process_ip", "10.0.0.1")).machines == 4
    assert Processes(16, ("--num_machines=2",)).machines == 2


def test_one_process_is_this_one(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Report:
        def to_json(self) -> dict[str, int]:
            return {"loss": 1}

    def train(*arguments: Any) -> Report:
        seen.extend(arguments)
        return Report()

    module = types.ModuleType("fake_stage")
    module.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_stage", module)
    monkeypatch.setitem(launch.STAGES, "sft", ("fake_stage", "train"))
    outcome = launch.run_stage("sft", recipe, [tmp_path / "a", tmp_path / "out"])
    assert outcome.report == {"loss": 1} and seen == [recipe, tmp_path / "a", tmp_path / "out"]


@pytest.mark.parametrize(
    ("processes", "switch", "message"),
    [
        (Processes(2), "", "fewer GPUs"),
        (Processes(1, ("--num_machines", "2")), "true", "nothing to launch"),
        (Processes(3, ("--num_machines", "2")), "true", "cannot be shared out"),
    ],
)
def test_what_this_machine_cannot_do(
    processes: Processes, switch: str, message: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("ACCELERATE_USE_CPU", switch)
    with pytest.raises(UserError, match=message):
        launch.run_stage("sft", recipe, [tmp_path], processes)
    assert not list(tmp_path.iterdir())


def test_the_base_stays_whole_where_that_fits(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense decoder of 2 x 1000 x 10 + 2 x 900 weights: 43,600 bytes, and what a step of it needs beside them."""
    import torch

    from qat.train import before
    from qat.train.memory import estimate

    config = {"model_type": "qwen3", "vocab_size": 1000, "hidden_size": 10, "intermediate_size": 20}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 5}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    needs = {count: estimate(config, before._need(recipe, "sft", [], [], count)) for count in (1, 2, 4)}
    assert needs[2].weights == 2 * (2 * 10_000 + 2 * 900) and needs[4].saved == needs[2].saved / 2 == needs[1].saved / 4
    room = (needs[2].total + needs[2].trained / 3) / 0.94
    free = {0: 2 * room, 1: room + 1}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (free[number], 3 * room))

    def way(*flags: str) -> tuple[str, ...]:
        return launch._method("sft", recipe, [tmp_path], Processes(2, flags))

    assert way() == way("--multi_gpu") == launch.REPLICATED and way("--use_fsdp") == launch.SHARDED
    free[1] = room - 1  # the fuller GPU decides
    assert way() == launch.SHARDED and way("--multi_gpu") == launch.REPLICATED
    assert launch._method("sft", recipe, [tmp_path], Processes(8, ("--num_machines", "4"))) == launch.REPLICATED
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}), encoding="utf-8")
    free[1] = 1e18
    assert way() == launch.SHARDED  # nothing is known of its layers


def test_the_launchers_command() -> None:
    flags = ("--use_fsdp", "--num_machines", "2", "--machine_rank", "1")
    command = launch.launch_command(launch.SHARDED, Processes(4, flags), "a.program", Path("/job"))
    assert command.count("--use_fsdp") == 1 and command[-3:] == ["-m", "a.program", "/job"]
    assert command[command.index("--machine_rank") + 1] == "1" and "--main_process_port" not in command
    command = launch.launch_command((), Processes(2, ("--main_process_port", "9")), "a.program", Path("/job"))
    assert "--use_fsdp" not in command and "--multi_gpu" not in command
    ports = [command[index + 1] for index, word in enumerate(command) if word == "--main_process_port"]
    assert ports == ["0", "9"]  # argparse takes the last one


def test_what_is_not_shared(recipe: Recipe, tmp_path: Path) -> None:
    for key, value in (("memory", "nvfp4"), ("trains", "all")):
        train = recipe.train.model_copy(update={key: value})
        with pytest.raises(UserError, match="nothing else") as caught:
            launch.run_stage("sft", recipe.model_copy(update={"train": train}), [tmp_path], Processes(2))
        assert caught.value.where == f"train.{key}" and caught.value.value == value


def _answer(command: list[str], log: Path, files: dict[str, Any], status: int, seen: list[list[str]]) -> int:
    seen.append(command)
    for name, content in files.items():
        (log.parent / name).write_text(json.dumps(content), encoding="utf-8")
    return status


def test_what_the_processes_say(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report comes back and the folder goes; a fault keeps its fields; silence is a bug."""
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    seen: list[list[str]] = []

    def answer(status: int, **files: Any) -> None:
        names = {f"{name}.json": content for name, content in files.items()}
        monkeypatch.setattr(launch, "supervise", lambda command, log: _answer(command, log, names, status, seen))

    answer(0, result={"report": {"loop": 1}, "patches": [{"name": "p"}]})
    cut = Processes(2, ("--use_fsdp",))
    outcome = launch.run_stage("distill", recipe, [tmp_path / "base", tmp_path], cut)
    assert outcome.report == {"loop": 1} and outcome.patches == [{"name": "p"}]
    assert not (tmp_path / "processes").exists()
    (command,) = seen
    assert command[command.index("--fsdp_version") + 1] == "2" and command[command.index("--num_processes") + 1] == "2"
    assert command.count("--use_fsdp") == 1 and "--multi_gpu" not in command
    assert command[-3:-1] == ["-m", "qat.train.launch"]

    answer(2, fault={"what": "Too long.", "where": "data", "value": "9", "remedy": "shorten"})
    with pytest.raises(UserError, match="Too long") as caught:
        launch.run_stage("distill", recipe, [tmp_path], cut)
    assert (caught.value.where, caught.value.value, caught.value.remedy) == ("data", "9", "shorten")
    job = json.loads((tmp_path / "processes" / "job.json").read_text(encoding="utf-8"))
    assert job["stage"] == "distill" and Recipe.model_validate_json(job["recipe"]) == recipe

    answer(1)
    with pytest.raises(RuntimeError, match=r"status 1; see .*launcher\.log"):
        launch.run_stage("distill", recipe, [tmp_path], cut)


def test_the_command_hands_the_processes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qat import chain
    from qat.cli import main

    seen: list[Processes] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chain, "train", lambda run, processes: seen.append(processes))
    assert main(["train", "--recipe", "annie_tiny"]) == 0
    flags = "--num_machines 2 --main_process_ip '10.0.0.1'"
    assert main(["train", "--recipe", "annie_tiny", "--gpus", "4", "--launch-flags", flags]) == 0
    assert seen == [launch.ONE, Processes(4, ("--num_machines", "2", "--main_process_ip", "10.0.0.1"))]


def _alive(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.is_file() and "\nState:\tZ" not in status.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal on a parent's end is Linux's")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_launcher_ends_with_the_command(number: int, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib; from qat.train.launch import supervise\n"
            "supervise([sys.executable, '-c', f'import os, pathlib, time; pathlib.Path({sys.argv[1]!r})."
            "write_text(str(os.getpid())); time.sleep(60)'], pathlib.Path(sys.argv[1] + '.log'))",
            str(tmp_path / "pid"),
        ],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    launcher = int((tmp_path / "pid").read_text())
    parent.send_signal(number)
    parent.wait(timeout=30)
    while _alive(launcher):
        assert time.monotonic() < deadline
        time.sleep(0.02)
