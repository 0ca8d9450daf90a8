"""Runs one command in a process group of its own and leaves nothing of it behind.

Started by `launch.py` as a script with the standard library alone. It waits for the first of three things: the command
ends, it is told to stop (SIGTERM or SIGINT), or the process that started it is gone, even by SIGKILL. Then the whole
group gets SIGTERM and, after a grace period, SIGKILL. vLLM consists of several processes that outlive each other's
sudden death; that is what this is for.

    python guardian.py PARENT_PID GRACE_SECONDS COMMAND [ARGUMENT ...]

The exit status is the command's; 128 + n where signal n ended it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

_POLL_S = 0.5
_WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _ended(pid: int) -> bool:
    """Whether the child has ended; it stays a zombie, so that its group's number cannot be taken by another."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _prepare_child() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
    # Should somebody kill the guardian itself, the command is told to end.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def guard(parent: int, grace_s: float, command: list[str]) -> int:
    """Run `command` until it ends or must end.

    Args:
        parent: Process whose end is this one's end.
        grace_s: Seconds between SIGTERM and SIGKILL.
        command: Program and arguments.

    Returns:
        The command's exit status, 128 + n for signal n.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=_prepare_child,  # safe: there are no threads here
    )
    while not _ended(child.pid) and os.getppid() == parent:
        received = signal.sigtimedwait(_WATCHED, _POLL_S)
        if received is not None and received.si_signo != signal.SIGCHLD:
            break
    _signal_group(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while not _ended(child.pid) and time.monotonic() < deadline:
        signal.sigtimedwait({signal.SIGCHLD}, 0.1)
    _signal_group(child.pid, signal.SIGKILL)
    status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
