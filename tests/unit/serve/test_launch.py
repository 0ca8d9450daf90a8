from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from qat.errors import UserError
from qat.recipe.schema import ServeBlock
from qat.serve import engine, launch, registry
from tests.unit.serve.fake_engine import make_checkpoint, make_engine

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(launch, "GRACE_S", 0.5)
    yield


def use_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str = "serves", plugin: bool = True) -> Path:
    folder = make_engine(tmp_path / "engine", mode, plugin)
    monkeypatch.setenv("QAT_ENGINE", str(folder))
    return folder


def alive(pid: int) -> bool:
    """Whether a process runs; zombies do not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_gone(pids: list[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def server_pids(engine_folder: Path) -> list[int]:
    return [int(pid) for pid in (engine_folder / "pids").read_text().split()]


def test_serves_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = use_engine(tmp_path, monkeypatch)
    checkpoint = make_checkpoint(tmp_path / "export" / "nvfp4_all_ptq")
    with launch.serve_checkpoint(checkpoint, ServeBlock(), tmp_path / "logs" / "vllm.log") as endpoint:
        assert endpoint.model == "nvfp4_all_ptq"
        assert httpx.get(f"{endpoint.url}/health").status_code == 200
        pids = [endpoint.pid, *server_pids(folder)]
        assert all(map(alive, pids))
        assert [server.url for server in engine.status().servers] == [endpoint.url]
        assert engine.logs() == [tmp_path / "logs" / "vllm.log"]
    assert all_gone(pids, 0)
    assert engine.status().servers == []


def test_an_exception_in_the_block_stops_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = use_engine(tmp_path, monkeypatch)
    with (
        pytest.raises(KeyboardInterrupt),
        launch.serve_checkpoint(make_checkpoint(tmp_path / "c"), ServeBlock(), tmp_path / "log"),
    ):
        raise KeyboardInterrupt
    assert all_gone(server_pids(folder), 0)


@pytest.mark.parametrize("victim", ["parent", "guardian"])
def test_no_process_survives_a_sigkill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    folder = use_engine(tmp_path, monkeypatch)
    checkpoint = make_checkpoint(tmp_path / "c")
    code = (
        "import time; from pathlib import Path\n"
        "from qat.serve.launch import serve_checkpoint; from qat.recipe.schema import ServeBlock\n"
        f"with serve_checkpoint(Path({str(checkpoint)!r}), ServeBlock(), Path({str(tmp_path / 'log')!r})) as e:\n"
        "    print(e.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    guardian = int(parent.stdout.readline())
    server, child = server_pids(folder)
    try:
        if victim == "parent":
            parent.kill()
            assert all_gone([guardian, server, child], within_s=10)
        else:
            # The server is told to end; what it leaves behind is its own affair then.
            os.kill(guardian, signal.SIGKILL)
            assert all_gone([server], within_s=5)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        if alive(child):
            os.kill(child, signal.SIGKILL)


def test_engine_stop_ends_servers_of_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = use_engine(tmp_path, monkeypatch)
    with launch.serve_checkpoint(make_checkpoint(tmp_path / "c"), ServeBlock(), tmp_path / "log") as endpoint:
        stopper = "from qat.serve import engine; print([s.url for s in engine.stop()])"
        # In another process: a zombie child of this one would still count as running.
        killer = subprocess.Popen([sys.executable, "-c", stopper], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        out, _ = killer.communicate(timeout=20)
        assert endpoint.url in out
        assert all_gone(server_pids(folder), 5)


def test_the_reason_of_a_failed_start_is_vllms_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(tmp_path, monkeypatch, "fails")
    log = tmp_path / "log"
    with (
        pytest.raises(UserError, match="ended before it was ready") as caught,
        launch.serve_checkpoint(make_checkpoint(tmp_path / "c"), ServeBlock(), log),
    ):
        pass
    assert caught.value.value == "ValueError: no kernel for this layer"
    assert caught.value.where == str(log)


def test_a_server_that_is_not_ready_in_time_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = use_engine(tmp_path, monkeypatch, "hangs")
    block = ServeBlock(startup_timeout_s=1.5)
    with (
        pytest.raises(UserError, match=r"not ready within 2 s"),
        launch.serve_checkpoint(make_checkpoint(tmp_path / "c"), block, tmp_path / "log"),
    ):
        pass
    assert all_gone(server_pids(folder), 0)


def test_a_busy_port_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(tmp_path, monkeypatch)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match="in use") as caught,
            launch.serve_checkpoint(make_checkpoint(tmp_path / "c"), ServeBlock(port=port), tmp_path / "log"),
        ):
            pass
    assert caught.value.value == port


@pytest.mark.parametrize(
    ("made", "problem"), [("nothing", "no such environment"), ("no plugin", "plugin is not installed")]
)
def test_an_unfit_environment_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, problem: str
) -> None:
    if made == "nothing":
        monkeypatch.setenv("QAT_ENGINE", str(tmp_path / "nowhere"))
    else:
        use_engine(tmp_path, monkeypatch, plugin=False)
    with pytest.raises(UserError, match=problem) as caught:
        launch.build_command(make_checkpoint(tmp_path / "c"), ServeBlock(), 1)
    assert "qat engine install" in str(caught.value)
    assert not engine.status().installed


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_no_checkpoint_is_a_fault_of_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    use_engine(tmp_path, monkeypatch)
    folder = tmp_path / "c"
    if content is not None:
        make_checkpoint(folder, content)
    with pytest.raises(UserError):
        launch.build_command(folder, ServeBlock(), 1)


def test_the_command_carries_the_whole_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(tmp_path, monkeypatch)
    config = {
        "model_type": "nemotron_h",
        "quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}},
    }
    checkpoint = make_checkpoint(tmp_path / "arm", json.dumps(config))
    block = ServeBlock(
        max_model_len=640,
        max_num_seqs=7,
        kv_cache_gib=0.5,
        tool_parser="hermes",
        dtype="float32",
        extra_args=("--seed", "3"),
    )
    command = launch.build_command(checkpoint, block, 8123)
    options = dict(zip(command.argv, command.argv[1:], strict=False))
    expected = {
        "--model": str(checkpoint),
        "--served-model-name": "arm",
        "--host": "127.0.0.1",
        "--port": "8123",
        "--max-model-len": "640",
        "--max-num-seqs": "7",
        "--kv-cache-memory-bytes": "536870912",
        "--tool-call-parser": "hermes",
        "--dtype": "float32",
        "--kv-cache-dtype": "fp8",
        "--seed": "3",
    }
    assert {name: options.get(name) for name in expected} == expected
    assert {"--enable-auto-tool-choice", "--no-enable-prefix-caching", "--enforce-eager"} <= set(command.argv)
    assert "--no-enable-chunked-prefill" in command.argv
    assert command.env["VLLM_PLUGINS"] == "qat"
    assert command.env["QAT_VLLM_FLOAT32"] == "1"


def test_what_only_some_models_need_is_left_out_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(tmp_path, monkeypatch)
    checkpoint = make_checkpoint(tmp_path / "arm", '{"model_type": "qwen3"}')
    command = launch.build_command(checkpoint, ServeBlock(), 1)
    assert not {"--no-enable-prefix-caching", "--kv-cache-dtype"} & set(command.argv)
    assert "QAT_VLLM_FLOAT32" not in command.env
    on_gpu = launch.build_command(checkpoint, ServeBlock(device="cuda"), 1)
    assert not {"--enforce-eager", "--kv-cache-memory-bytes", "--no-enable-chunked-prefill"} & set(on_gpu.argv)


def test_the_curl_line_survives_a_shell() -> None:
    endpoint = launch.Endpoint("http://127.0.0.1:1", "it's", 1)
    words = subprocess.run(
        ["sh", "-c", endpoint.curl().replace("curl ", "printf '%s\\n' ", 1)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert json.loads(words[-1])["model"] == "it's"


def test_files_of_dead_servers_are_forgotten(tmp_path: Path) -> None:
    folder = registry.state_folder()
    folder.mkdir(parents=True)
    # This process lives but is no guardian: its number was given out again.
    (folder / "1.json").write_text(json.dumps(registry.Server(os.getpid(), "u", "m", "c", "l")._asdict()))
    (folder / "2.json").write_text('{"pid": 1')
    assert registry.running() == []
    assert list(folder.iterdir()) == []
