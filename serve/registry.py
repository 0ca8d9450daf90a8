"""The servers that qat has started and that still run, one small file each, so that another shell can find them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from qat.errors import UserError


class Server(NamedTuple):
    """A running server.

    Attributes:
        pid: Its guardian's process id.
        url: Where it listens.
        model: The name it serves.
        checkpoint: The folder it serves.
        log: Its log file.
        started: Seconds since 1970; 0 before it is registered.
    """

    pid: int
    url: str
    model: str
    checkpoint: str
    log: str
    started: float = 0.0


def state_folder() -> Path:
    """`$XDG_STATE_HOME/qat/servers`, by default below `~/.local/state`."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "qat" / "servers"


@contextmanager
def registered(server: Server) -> Iterator[None]:
    """Keep a server listed for the length of a `with` block.

    Raises:
        UserError: The state folder cannot be written.
    """
    path = state_folder() / f"{server.pid}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(server._replace(started=time.time())._asdict()) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"The list of running servers cannot be written: {error.strerror}.",
            where=str(path),
            remedy="Point XDG_STATE_HOME to a folder that can be written.",
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def running() -> list[Server]:
    """List the servers that run, oldest first; files of servers that are gone are removed."""
    servers = []
    for path in state_folder().glob("*.json"):
        try:
            server = Server(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            continue  # it has just ended
        except (ValueError, TypeError):
            path.unlink(missing_ok=True)  # half written by a process that was killed
            continue
        if _is_guardian(server.pid):
            servers.append(server)
        else:
            path.unlink(missing_ok=True)
    return sorted(servers, key=lambda server: server.started)


def _is_guardian(pid: int) -> bool:
    """Whether the process is still the one that was registered; numbers are given out again."""
    try:
        return b"guardian.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
