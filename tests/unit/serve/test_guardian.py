from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

GUARDIAN = Path(__file__).resolve().parents[3] / "serve" / "guardian.py"


def guard(code: str, grace: str = "0.3") -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-S", str(GUARDIAN), str(os.getpid()), grace, sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize(
    ("code", "status"),
    [("pass", 0), ("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_the_exit_status_is_the_commands(code: str, status: int) -> None:
    with guard(code) as process:
        assert process.wait(timeout=10) == status


def test_children_of_an_ended_command_are_killed() -> None:
    code = (
        "import subprocess, sys\n"
        "c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], stdout=subprocess.DEVNULL)\n"
        "print(c.pid, flush=True)"
    )
    with guard(code) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert process.wait(timeout=10) == 0
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_deaf_command_is_killed_after_the_grace_period() -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    with guard(code) as process:
        assert process.stdout is not None
        process.stdout.readline()
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 128 + signal.SIGKILL
        assert 0.3 <= time.monotonic() - start < 3


def test_a_polite_command_may_end_by_itself() -> None:
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(5)); print('up', flush=True); time.sleep(600)"
    )
    with guard(code, grace="20") as process:
        assert process.stdout is not None
        process.stdout.readline()
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 5
        assert time.monotonic() - start < 5
