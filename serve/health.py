"""What a starting or running server tells about itself: readiness, the reason of its end, its memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx

from qat.errors import UserError
from qat.progress import Progress

_POLL_S = 0.1

# What vLLM 0.32 logs on its way; the bar moves when one is seen.
MILESTONES = (
    ("non-default args", "reading the model's configuration"),
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading weights"),
    ("init engine", "starting the HTTP server"),
)
STEPS = len(MILESTONES) + 1

# `(EngineCore pid=12) ERROR 11-21 08:18:34 [core.py:906] ` in front of what was raised.
_LOG_PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s*)?((ERROR|WARNING|INFO|CRITICAL)\s[\d-]+ [\d:]+ \[[^\]]*\]\s?)?")
_RAISED = re.compile(r"^(?:[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)|[\w.-]+\.py: error)\b:? ?.*\S")
# Raised because something else was: true, but not the reason.
_CONSEQUENCES = (
    "Engine core initialization failed",
    "EngineDeadError",
    "WorkerProc initialization failed",
    "Executor failed",
    "asyncio.exceptions.CancelledError",
)


class ServerEnded(Exception):
    """The server process ended before it was ready; carries its exit status."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"exit status {status}")


def wait_until_healthy(
    url: str, log: Path, timeout_s: float, exit_status: Callable[[], int | None], progress: Progress
) -> float:
    """Wait for `/health`.

    Args:
        url: The server's address without a path.
        log: Its log file, read for the milestones.
        timeout_s: Longest wait.
        exit_status: The process's exit status, None while it runs.
        progress: Told of each milestone; `STEPS` in all.

    Returns:
        Seconds waited.

    Raises:
        ServerEnded: The process ended first.
        UserError: The time ran out.
    """
    start = time.monotonic()
    progress.update(0, "starting Python")
    with httpx.Client(timeout=2.0, trust_env=False) as client:
        while True:
            if (status := exit_status()) is not None:
                raise ServerEnded(status)
            if _is_healthy(client, url):
                waited = time.monotonic() - start
                progress.update(STEPS, f"ready after {waited:.0f} s")
                return waited
            text = _read(log)
            if time.monotonic() - start > timeout_s:
                raise UserError(
                    f"vLLM was not ready within {timeout_s:.0f} s.",
                    where=str(log),
                    value=failure_reason(text),
                    remedy="Raise serve.startup_timeout_s if the model is large or the machine busy.",
                )
            reached = sum(mark in text for mark, _ in MILESTONES)
            if reached:
                progress.update(reached, MILESTONES[reached - 1][1])
            time.sleep(_POLL_S)


def failure_reason(log_text: str, limit: int = 3) -> str:
    """Pick the lines of vLLM's log that say why it ended.

    The last exceptions that are not mere consequences of another; without any, the last lines.

    Args:
        log_text: The whole log.
        limit: Most lines to return.

    Returns:
        One line each, newest last; a fixed sentence for an empty log.
    """
    lines = [_LOG_PREFIX.sub("", line).strip() for line in log_text.splitlines()]
    lines = [line for line in lines if line]
    raised = [line for line in lines if _RAISED.match(line)]
    causes = [line for line in raised if not any(consequence in line for consequence in _CONSEQUENCES)]
    chosen = list(dict.fromkeys(causes or raised or lines))[-limit:]
    return "\n          ".join(line[:400] for line in chosen) or "the log is empty"


def _is_healthy(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/health").status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _read(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


class ProcessMemory(NamedTuple):
    """Memory of a process and everything below it.

    Attributes:
        processes: How many there are.
        pss_mib: Proportional set sizes added up, in MiB: pages that several processes share count once in all.
    """

    processes: int
    pss_mib: float


def tree_memory(pid: int) -> ProcessMemory:
    """Measure a process and its descendants through `/proc` (Linux); processes that end meanwhile count as nothing."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The command name stands in parentheses and may hold spaces; the parent is the second field behind it.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    todo, kib, count = [pid], 0, 0
    while todo:
        current = todo.pop()
        todo.extend(children.get(current, []))
        try:
            rollup = Path(f"/proc/{current}/smaps_rollup").read_text()
        except OSError:
            continue
        count += 1
        kib += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return ProcessMemory(count, kib / 1024)
