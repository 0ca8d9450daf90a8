"""The tutorial of docs/behavior.md, taken literally: its files, its commands, a tiny model that knows no library."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qat.behavior.checks import Reply
from qat.behavior.gate import judge
from qat.behavior.records import CaseResult, read_results
from qat.behavior.runner import run_suite
from qat.behavior.suite import load_suite
from qat.errors import UserError
from qat.recipe.schema import BehaviorBlock, GateBlock
from qat.serve import engine
from tests.unit.behavior.test_runner import Quiet

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "behavior.md").read_text(encoding="utf-8")
TUTORIAL = PAGE[PAGE.index("## A suite for another persona") : PAGE.index("## Flips are rare")]
BLOCKS = re.findall(r"```sh\n(.*?)```", TUTORIAL, re.S)
SCRIPTS = [block for block in BLOCKS if "$URL" in block]
"""What a CI job would run."""
COMMANDS = [line for block in BLOCKS if block not in SCRIPTS for line in block.splitlines() if line.strip()]
EXITS = {"qat test": 1, "qat baseline check": 1}
"""The tiny model fails the suite, and is told so."""


def write_files(folder: Path) -> list[str]:
    blocks = re.findall(r"```yaml\n# (\S+)\n(.*?)```", TUTORIAL, re.S)
    for name, content in blocks:
        (folder / name).write_text(content, encoding="utf-8")
    return [name for name, _ in blocks]


def qat(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    arguments = [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', command)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "qat", *arguments[1:]],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def shell(script: str, folder: Path, url: str) -> subprocess.CompletedProcess[str]:
    """A script as a CI job runs it: `bash -e`, with the product's commands on the path."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name in ("qat", "pytest"):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {name} "$@"\n', encoding="utf-8")
        (tools / name).chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{tools}:{os.environ['PATH']}", "URL": url}
    return subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_its_suite_is_one(tmp_path: Path) -> None:
    assert write_files(tmp_path) == ["clerk.yaml", "desk.yaml"]
    shown = qat("qat suite check desk.yaml", tmp_path)
    assert shown.returncode == 0, shown.stderr
    for line in shown.stdout.splitlines():
        assert line in TUTORIAL


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`qat serve` as the tutorial says it, at a free port."""
    try:
        engine.engine_python()
    except UserError as fault:
        if os.environ.get("CI"):  # there, a missing environment is a missing step of the setup
            raise
        pytest.skip(f"no vLLM environment: {fault}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    [command] = [line for line in COMMANDS if line.startswith("qat serve")]
    arguments = command.replace("8000", str(port)).replace("../data", str(ROOT / "data")).split()[1:]
    folder = tmp_path_factory.mktemp("serve")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder)}
    served = subprocess.Popen([sys.executable, "-m", "qat", *arguments], cwd=folder, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and served.poll() is None:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1.0)
        assert served.poll() is None
        yield url
    finally:
        served.send_signal(signal.SIGINT)
        served.wait(30)


@pytest.mark.slow
@pytest.mark.engine
def test_every_step_of_the_tutorial(server: str, tmp_path: Path) -> None:
    write_files(tmp_path)
    steps = [line for line in COMMANDS if not line.startswith("qat serve")]
    assert len(steps) >= 6
    for step in steps:
        done = qat(step.replace("http://127.0.0.1:8000", server), tmp_path)
        print(f"$ {step}\n{done.stdout}")
        assert done.returncode == next((code for start, code in EXITS.items() if step.startswith(start)), 0), (
            done.stderr
        )
    assert len(SCRIPTS) == 2
    for script in SCRIPTS:  # the tiny model fails the suite, and so does the job
        done = shell(script, tmp_path, server)
        print(f"$ {script}\n{done.stdout}")
        assert done.returncode == 1, done.stderr
    assert re.search(r"\d+ failed", done.stdout) and (tmp_path / "junit.xml").is_file()
    answers = read_results(tmp_path / "desk.jsonl").results.values()
    assert len(answers) == 12 and all(answer.error is None for answer in answers)
    assert {entry.case for entry in answers} == set(load_suite(tmp_path / "desk.yaml").by_id)


def words(result: CaseResult) -> list[Any]:
    """What the model wrote, without the ids that the server gives to calls."""
    replies = [Reply([message]) for message in result.produced]
    return [(reply.final, [(call.name, call.raw) for call in reply.calls]) for reply in replies]


@pytest.mark.slow
@pytest.mark.engine
def test_the_verdict_is_the_same_with_the_same_seeds(server: str, tmp_path: Path) -> None:
    """At concurrency 1 not only the verdict: every word."""
    suite = load_suite("clerk_core")
    gate = GateBlock(candidate="tiny", reference="tiny")
    block = BehaviorBlock(suite="clerk_core", max_tokens=24, concurrency=1, gate=gate)
    files = [tmp_path / f"{name}.jsonl" for name in ("first", "second")]
    for file in files:
        run_suite(suite, server, "tiny_base", "tiny", block, file, Quiet())
    first, second = (read_results(file).results for file in files)
    assert {key: words(result) for key, result in first.items()} == {key: words(r) for key, r in second.items()}
    verdicts = [json.dumps(judge({"tiny": file}, suite, gate).to_json(), sort_keys=True) for file in files]
    assert verdicts[0] == verdicts[1]
    assert '"verdict": "FAIL"' in verdicts[0]
