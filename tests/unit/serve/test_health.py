from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qat.serve.health import failure_reason, tree_memory

# As vLLM 0.32 writes it, shortened.
WORKER_DIED = """\
(APIServer pid=9) INFO 11-21 08:18:14 [model.py:733] Resolved architecture: NemotronHForCausalLM
(EngineCore pid=10) ERROR 11-21 08:18:20 [core.py:906] EngineCore failed to start.
(EngineCore pid=10) ERROR 11-21 08:18:20 [core.py:906] Traceback (most recent call last):
(EngineCore pid=10) ERROR 11-21 08:18:20 [core.py:906]   File "/x/modelopt.py", line 7, in process
(EngineCore pid=10) ERROR 11-21 08:18:20 [core.py:906]     raise ValueError("nope")
(EngineCore pid=10) ERROR 11-21 08:18:20 [core.py:906] ValueError: in features is no multiple of 16
(EngineCore pid=10) Process EngineCore:
(EngineCore pid=10) ValueError: in features is no multiple of 16
(APIServer pid=9)     raise RuntimeError(
(APIServer pid=9) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (WORKER_DIED, "ValueError: in features is no multiple of 16"),
        (
            "usage: x\napi_server.py: error: unrecognized arguments: --nope\n",
            "api_server.py: error: unrecognized arguments: --nope",
        ),
        (
            "safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata\n",
            "safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata",
        ),
        (
            "RuntimeError: Engine core initialization failed. See root cause above.\n",
            "RuntimeError: Engine core initialization failed. See root cause above.",
        ),
        ("one\n\ntwo\nthree\nfour\n", "two\n          three\n          four"),
        ("", "the log is empty"),
    ],
)
def test_the_reason_is_the_cause_and_not_its_consequences(log: str, reason: str) -> None:
    assert failure_reason(log) == reason


def test_memory_counts_descendants() -> None:
    code = "b = bytearray(64 << 20); b[::4096] = b'x' * len(b[::4096]); print('up', flush=True); input()"
    outer = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {code!r}]))"
    with subprocess.Popen(
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        measured = tree_memory(process.pid)
        process.communicate("\n")
    assert measured.processes == 2
    assert 64 < measured.pss_mib < 128
    assert tree_memory(os.getpid()).pss_mib > 0
