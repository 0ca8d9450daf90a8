"""SIGKILL at any moment: what was accepted stays, whole and once, and the next call goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qat.data.duplicates import normalise_turn, user_turns
from qat.data.load import load_conversations
from tests.unit.behavior.stub_server import serving
from tests.unit.data.teaching import by_parts

ROOT = Path(__file__).resolve().parents[3]
WANTED = 12


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path) -> None:
    rng = random.Random(3)
    settings = tmp_path / "teacher.yaml"
    out = tmp_path / "t.jsonl"
    answer = by_parts()

    def slowly(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        time.sleep(0.02)
        return answer(body, number)

    with serving(slowly) as stub:
        quotas = f"categories: {{concise_voice: {{count: {WANTED}}}}}"
        settings.write_text(f"url: {stub.url}\nmodel: m\nconcurrency: 3\nattempts: 20\n{quotas}\n")
        command = [sys.executable, "-m", "qat", "data", "generate", str(out), "--teacher", str(settings)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        kept = b""
        for goal in (1, 4, 7):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            deadline = time.monotonic() + 60
            while _lines(out) < goal:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(rng.random() * 0.03)
            process.send_signal(signal.SIGKILL)
            process.wait()
            now = out.read_bytes()
            assert now.startswith(kept)
            kept = now[: now.rfind(b"\n") + 1]
        assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=60).returncode == 0
    assert out.read_bytes().startswith(kept)
    made = load_conversations(out)
    assert len(made) == len({each["id"] for each in made}) == WANTED
    turns = Counter(normalise_turn(turn) for each in made for turn in user_turns(each))
    assert set(turns.values()) == {1}


@pytest.mark.slow
def test_interrupted_by_ctrl_c(tmp_path: Path) -> None:
    """Exit code 130; what was spent on conversations under way is counted, and none is lost, torn or made twice."""
    settings, out = tmp_path / "teacher.yaml", tmp_path / "t.jsonl"
    answer = by_parts()

    def slowly(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        time.sleep(0.05)
        return answer(body, number)

    with serving(slowly) as stub:
        quotas = f"categories: {{concise_voice: {{count: {WANTED}}}}}"
        settings.write_text(f"url: {stub.url}\nmodel: m\nconcurrency: 3\nattempts: 20\n{quotas}\n")
        command = [sys.executable, "-m", "qat", "data", "generate", str(out), "--teacher", str(settings), "--json"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while _lines(out) < 2:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130 and b"Traceback" not in said
        kept = out.read_bytes()
        assert kept.endswith(b"\n") and 2 <= kept.count(b"\n") < WANTED
        outcomes = Counter(json.loads(line)["outcome"] for line in _log(out))
        assert outcomes["accepted"] == kept.count(b"\n") and 0 < outcomes["unfinished"] <= 3
        again = subprocess.run(command, env=environment, capture_output=True, timeout=60)
        report = json.loads(again.stdout)
        answered = len(stub.bodies)
    assert again.returncode == 0 and report["complete"] and out.read_bytes().startswith(kept)
    made = load_conversations(out)
    turns = Counter(normalise_turn(turn) for each in made for turn in user_turns(each))
    assert len(made) == len({each["id"] for each in made}) == WANTED and set(turns.values()) == {1}
    assert answered - 3 <= report["requests"] <= answered  # but for those that nobody waited for


def _log(out: Path) -> list[str]:
    return out.with_name(f"{out.stem}.log.jsonl").read_text(encoding="utf-8").splitlines()[1:]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
