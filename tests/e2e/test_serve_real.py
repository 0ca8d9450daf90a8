"""`serve_checkpoint` with a real vLLM: answers, long prompts, the reason of a failure, nothing left behind."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("torch")

from qat.errors import UserError
from qat.recipe.schema import ServeBlock
from qat.serve import engine
from qat.serve.health import tree_memory
from qat.serve.launch import Endpoint, serve_checkpoint
from tests.e2e import served_models

pytestmark = [pytest.mark.slow, pytest.mark.engine]
ROOT = Path(__file__).resolve().parents[2]
BLOCK = ServeBlock(max_model_len=640, kv_cache_gib=0.125)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_models.save_base(tmp_path_factory.mktemp("models") / "bf16")


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def ask(endpoint: Endpoint, length: int) -> dict[str, Any]:
    """A reply to a prompt of about `length` tokens (one a byte)."""
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": "x" * length}],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


@pytest.mark.parametrize("kind", ["bf16", "nvfp4", "nvfp4_fp8_cache"])
def test_answers_prompts_of_any_length(base: Path, tmp_path: Path, kind: str) -> None:
    checkpoint = base
    if kind != "bf16":
        checkpoint = served_models.export_nvfp4(base, tmp_path / kind, "fp8" if "fp8" in kind else "bf16")
    log = tmp_path / "vllm.log"
    with serve_checkpoint(checkpoint, BLOCK, log) as endpoint:
        assert endpoint.model == kind
        # Lengths around vLLM's block sizes: with prefix caching a prompt beyond one block ends the engine.
        lengths = [1, 60, 127, 128, 129, 255, 256, 257, 300, 400, 500, 600]
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda length: ask(endpoint, length), lengths))
        assert [answer["usage"]["completion_tokens"] for answer in answers] == [8] * len(lengths)
        assert all(answer["usage"]["prompt_tokens"] > length for answer, length in zip(answers, lengths, strict=True))
        memory = tree_memory(endpoint.pid)
        assert memory.pss_mib < 2500
        print(f"{kind}: {memory.processes} processes, {memory.pss_mib:.0f} MiB")
        text = log.read_text()
        assert ("Nvfp4CpuLinear" in text) == (kind != "bf16")
        assert ("fp8" in text) == ("fp8" in kind)
    assert engine.status().servers == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{endpoint.url}/health")


def test_a_damaged_checkpoint_fails_with_vllms_reason(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with (
        pytest.raises(UserError, match="ended before it was ready") as caught,
        serve_checkpoint(broken, BLOCK, tmp_path / "vllm.log"),
    ):
        pass
    assert "SafetensorError" in str(caught.value.value)
    assert len(str(caught.value.value).splitlines()) <= 3


@pytest.mark.parametrize("victim", ["parent", "guardian"])
def test_no_process_of_vllm_survives_a_sigkill(base: Path, tmp_path: Path, victim: str) -> None:
    code = (
        "import time; from pathlib import Path; from qat.serve.launch import serve_checkpoint\n"
        "from qat.recipe.schema import ServeBlock\n"
        "block = ServeBlock(kv_cache_gib=0.125)\n"
        f"with serve_checkpoint(Path({str(base)!r}), block, Path({str(tmp_path / 'log')!r})) as e:\n"
        "    print(e.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        guardian = int(parent.stdout.readline())
        processes = descendants(guardian)
        assert len(processes) >= 2  # the HTTP server and the engine
        os.kill(parent.pid if victim == "parent" else guardian, signal.SIGKILL)
        deadline = time.monotonic() + 15
        while (left := [pid for pid in processes if runs(pid)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        parent.kill()
    assert left == []


def descendants(pid: int) -> list[int]:
    """Process ids below one, by `ps`."""
    rows = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = [tuple(map(int, row.split())) for row in rows]
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        below = [child for child, its_parent in pairs if its_parent == parent]
        found += below
        todo += below
    return found


def runs(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


def test_many_seeded_requests_at_once(base: Path, tmp_path: Path) -> None:
    """Together their prompts exceed a step's tokens: prefilled in pieces, a seeded one would end the engine."""
    tight = BLOCK.model_copy(update={"extra_args": ("--max-num-batched-tokens", str(BLOCK.max_model_len))})

    def seeded(number: int) -> str:
        body = {
            "model": endpoint.model,
            "messages": [{"role": "user", "content": "x" * (100 + 9 * number)}],
            "max_tokens": 4,
            "temperature": 0.7,
            "seed": number,
            "ignore_eos": True,
        }
        answer = httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["finish_reason"])

    with serve_checkpoint(base, tight, tmp_path / "vllm.log") as endpoint:
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            assert list(pool.map(seeded, range(48))) == ["length"] * 48
        assert "does not use offset" not in (tmp_path / "vllm.log").read_text()
