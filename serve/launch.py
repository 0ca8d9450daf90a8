"""Starts vLLM on a checkpoint folder as a child process, waits for it, and takes it down with all it started.

vLLM is never imported here: it lives in an environment of its own (`engine.py`), because its pins on torch and
setuptools contradict ModelOpt's.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.errors import UserError
from qat.progress import progress_bar
from qat.serve import engine, registry
from qat.serve.moe_backend import moe_arguments

if TYPE_CHECKING:
    from qat.recipe.schema import ServeBlock

HOST = "127.0.0.1"
GRACE_S = 5.0
"""Seconds that vLLM has to end by itself before it is killed."""


class Endpoint(NamedTuple):
    """A running server.

    Attributes:
        url: `http://127.0.0.1:<port>`; the OpenAI-compatible API is below `/v1`.
        model: The name that requests must give.
        pid: The guardian's process id: SIGTERM to it ends the server and every process of it.
    """

    url: str
    model: str
    pid: int

    def curl(self) -> str:
        """One line that asks the server something."""
        body = json.dumps({"model": self.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})
        return f"curl {self.url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"


class Command(NamedTuple):
    """How vLLM is started.

    Attributes:
        argv: Interpreter and arguments.
        env: Variables set on top of this process's own.
    """

    argv: list[str]
    env: dict[str, str]

    def shell(self) -> str:
        """The same as one line for a shell."""
        return shlex.join(["env", *(f"{name}={value}" for name, value in self.env.items()), *self.argv])


@contextmanager
def serve_checkpoint(checkpoint: Path, block: ServeBlock, log: Path) -> Iterator[Endpoint]:
    """Serve a checkpoint for the length of a `with` block.

    Args:
        checkpoint: Folder with `config.json`, weights and tokenizer; its name becomes the model's.
        block: The recipe's `serve` block.
        log: File that takes everything vLLM prints; overwritten.

    Yields:
        The endpoint, once it answers `/health`.

    Raises:
        UserError: No such checkpoint, no engine environment, the port is taken, vLLM ended (with its own reason) or was
            not ready in time.
    """
    from qat.serve.health import STEPS, ServerEnded, failure_reason, wait_until_healthy

    port = choose_port(block.port)
    command = build_command(checkpoint, block, port)
    model = model_name(checkpoint)
    url = f"http://{HOST}:{port}"
    log.parent.mkdir(parents=True, exist_ok=True)
    process = _start(command, log)
    try:
        with progress_bar(f"starting vLLM: {model}", STEPS) as progress:
            try:
                wait_until_healthy(url, log, block.startup_timeout_s, process.poll, progress)
            except ServerEnded as ended:
                raise UserError(
                    f"vLLM ended before it was ready ({_describe_status(ended.status)}).",
                    where=str(log),
                    value=failure_reason(log.read_text(encoding="utf-8", errors="replace")),
                    remedy="The log has the whole story; `qat serve --dry-run` shows the command.",
                ) from None
        with registry.registered(
            registry.Server(process.pid, url, model, str(checkpoint.resolve()), str(log.resolve()))
        ):
            yield Endpoint(url, model, process.pid)
    finally:
        stop(process)


def build_command(checkpoint: Path, block: ServeBlock, port: int) -> Command:
    """Translate the recipe's `serve` block and the checkpoint's configuration into vLLM's command line.

    Raises:
        UserError: No such checkpoint, or no engine environment.
    """
    config = _read_config(checkpoint)
    argv = [
        *(str(engine.engine_python()), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(checkpoint.resolve()), "--served-model-name", model_name(checkpoint)),
        *("--host", HOST, "--port", str(port)),
        *(
            "--dtype",
            block.dtype,
            "--max-model-len",
            str(block.max_model_len),
            "--max-num-seqs",
            str(block.max_num_seqs),
        ),
        *("--enable-auto-tool-choice", "--tool-call-parser", block.tool_parser),
        *("--disable-uvicorn-access-log", "--disable-log-stats"),
    ]
    if _has_fp8_kv_cache(config):
        argv += ["--kv-cache-dtype", "fp8"]
    env = {
        "HF_HUB_OFFLINE": "1",  # everything is in the folder
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "qat",
    }
    if block.device == "cpu":
        argv += _cpu_arguments(config, block)
        env |= _cpu_environment()
    else:
        argv += moe_arguments(checkpoint, config)
    if block.dtype == "float32" and "quantization_config" in config:
        env["QAT_VLLM_FLOAT32"] = "1"
    return Command([*argv, *block.extra_args], env)


def _cpu_arguments(config: dict[str, Any], block: ServeBlock) -> list[str]:
    # Nothing is compiled, and with the size of the cache given vLLM skips its profiling run. `uni` keeps the engine and
    # its worker in one process: one import of vLLM less.
    arguments = ["--enforce-eager", "--distributed-executor-backend", "uni"]
    arguments += ["--kv-cache-memory-bytes", str(int(block.kv_cache_gib * 2**30))]
    # A prompt that is prefilled in two steps takes its seed's generator back by an offset, which CPU generators do not
    # have: "RuntimeError: CPU Generator does not use offset" ends the engine (gpu_model_runner.py, vLLM 0.32).
    arguments.append("--no-enable-chunked-prefill")
    if config.get("model_type") == "nemotron_h":
        # vLLM's Mamba scan for CPU keeps no state per chunk, which prefix caching needs: with it, any prompt longer
        # than a cache block ends the engine with an IndexError (mamba_mixer2.py, vLLM 0.32).
        arguments.append("--no-enable-prefix-caching")
    return arguments


def _cpu_environment() -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # without it vLLM turns `uni` back into a worker process
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",  # the plugin keeps it from becoming `spawn`
    }


def model_name(checkpoint: Path) -> str:
    """The name under which a checkpoint is served: its folder's."""
    return checkpoint.resolve().name


def choose_port(port: int) -> int:
    """Return `port` if it is free, for 0 any free one.

    Raises:
        UserError: It is taken, or not allowed to this user.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # A server that has just ended leaves connections in TIME_WAIT; they are no obstacle to vLLM either.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"The port cannot be used: {error.strerror}.",
                where="serve.port",
                value=port,
                remedy="Give another one, 0 for any free one; `qat engine status` lists servers that run already.",
            ) from None
        return int(probe.getsockname()[1])


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a guardian and with it the server; returns when nothing of it is left."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.wait()


def _start(command: Command, log: Path) -> subprocess.Popen[bytes]:
    guardian = Path(__file__).with_name("guardian.py")
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(guardian), str(os.getpid()), str(GRACE_S), *command.argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | command.env,
            # Ctrl-C in the terminal is for this process, which then takes the server down in order.
            start_new_session=True,
        )


def _read_config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            "There is no checkpoint to serve.", where=str(path), remedy="Give a folder that `qat export` has written."
        ) from None
    except ValueError as error:
        raise UserError("config.json is not valid JSON.", where=str(path), value=str(error)) from None
    if not isinstance(config, dict):
        raise UserError("config.json is no JSON object.", where=str(path), value=type(config).__name__)
    return config


def _has_fp8_kv_cache(config: dict[str, Any]) -> bool:
    quantization = config.get("quantization_config") or {}
    scheme = quantization.get("kv_cache_scheme") or {}
    return scheme.get("num_bits") == 8 and scheme.get("type") == "float"


def _describe_status(status: int) -> str:
    if status > 128:
        name = signal.Signals(status - 128).name
        return f"{name}, out of memory?" if name == "SIGKILL" else name
    return f"exit status {status}"
