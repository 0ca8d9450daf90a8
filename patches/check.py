"""All defects looked at, each in a process of its own: what is there, and whether qat's repair holds.

One child process imports the libraries and then forks for each defect, so that nothing leaks from one to the next (a
patch stays on, a plugin registers itself) and the imports are paid once.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from qat.patches import cache
from qat.patches.cache import Remembered, timed
from qat.patches.protocol import Defect, Status
from qat.patches.registry import find, outcome, repair

TIMEOUT_S = 180.0
"""For one defect; probes in vLLM's environment import vLLM, which takes tens of seconds."""
FAILS = "fails"
"""Outcome of a repair that does not help, or of a look that came to no result."""
# Distribution -> what is imported before the forks. None of it starts threads or touches a GPU.
_PRELOAD = {
    "torch": "torch",
    "transformers": "transformers.models.nemotron_h.modeling_nemotron_h",
    "peft": "peft",
    "nvidia-modelopt": "modelopt.torch.quantization",
}


class Checked(NamedTuple):
    """One defect, looked at.

    Attributes:
        name: Of the defect.
        status: What the probe found.
        evidence: What it observed.
        outcome: `applied` or `avoided` where the defect is there and the repair holds, `fails` where it does not, empty
            where there was nothing to repair.
        repaired: What was observed with the repair; the error where the look itself failed.
        versions: Library -> installed version, or `absent`.
        seconds: Wall time of probe and repair.
        remembered: Whether all of it is from an earlier look.
    """

    name: str
    status: Status
    evidence: str
    outcome: str
    repaired: str
    versions: dict[str, str]
    seconds: float
    remembered: bool

    @property
    def failed(self) -> bool:
        """Whether the defect is here and qat does not hold it off, or could not find out."""
        return self.outcome == FAILS

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return {**self._asdict(), "status": self.status.value}


def recall(defect: Defect) -> Checked | None:
    """What an earlier look found under the same versions, sources and hardware; None where there was none."""
    probe = cache.recall(defect, "probe")
    if probe is None:
        return None
    if probe.result.status is not Status.NEEDED:
        return _checked(defect, probe, None, remembered=True)
    second = cache.recall(defect, "repair")
    return None if second is None else _checked(defect, probe, second, remembered=True)


def look(defects: Sequence[Defect]) -> Iterator[Checked]:
    """Look for defects and try their repairs; what is found is remembered.

    Yields:
        Each defect as soon as it is done, in the order given.
    """
    for defect, report in _reports(defects):
        yield _take(defect, report)


def _take(defect: Defect, report: dict[str, Any]) -> Checked:
    """Remember and describe what a child reported; a look that failed is not remembered."""
    if "error" in report:
        return Checked(defect.name, Status.CANNOT_TELL, "", FAILS, report["error"], cache.versions(defect), 0.0, False)
    probe = Remembered.from_json(report["probe"])
    second = Remembered.from_json(report["repair"]) if "repair" in report else None
    cache.remember(defect, "probe", probe)
    if second is not None:
        cache.remember(defect, "repair", second)
    return _checked(defect, probe, second, remembered=False)


def _checked(defect: Defect, probe: Remembered, second: Remembered | None, *, remembered: bool) -> Checked:
    word = repaired = ""
    seconds = probe.seconds
    if second is not None:
        word = FAILS if second.result.status is Status.NEEDED else outcome(defect, second.result)
        repaired, seconds = second.result.detail, seconds + second.seconds
    status, evidence = probe.result
    return Checked(defect.name, status, evidence, word, repaired, cache.versions(defect), seconds, remembered)


# The process that imports ---------------------------------------------------------------------------------------------


def _reports(defects: Sequence[Defect]) -> Iterator[tuple[Defect, dict[str, Any]]]:
    """Start that process and pair its reports, one JSON object a line, with the defects."""
    if not defects:
        return
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "qat.patches.check", str(writer), *(defect.name for defect in defects)]
    # Without NVML, torch's question for a GPU would initialize CUDA in the process that forks.
    environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as log, open(reader, encoding="utf-8") as reports:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, pass_fds=(writer,), start_new_session=True
        )
        os.close(writer)
        try:
            for defect in defects:
                line = reports.readline()
                yield defect, json.loads(line) if line else {"error": _last_words(log.fileno())}
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_words(log: int) -> str:
    """The end of what a process wrote."""
    size = os.fstat(log).st_size
    lines = os.pread(log, 2000, max(0, size - 2000)).decode(errors="replace").strip().splitlines()
    return f"the checking process died: {lines[-1] if lines else 'without a word'}"


def _work(reports: int, names: Sequence[str]) -> None:
    """Import the libraries, then look at each defect in a fork and report a line."""
    defects = find(*names)
    wanted = {library for defect in defects for library in defect.libraries}
    for library, module in _PRELOAD.items():
        if library in wanted:
            with suppress(Exception):  # the probes say what is wrong with it
                importlib.import_module(module)
    with open(reports, "w", encoding="utf-8") as stream:
        for defect in defects:
            print(json.dumps(_in_a_fork(defect)), file=stream, flush=True)


def _in_a_fork(defect: Defect) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_send_report, args=(defect, writer))
    process.start()
    writer.close()
    try:
        if not reader.poll(TIMEOUT_S):
            return {"error": f"no answer within {TIMEOUT_S:g} s"}
        report: dict[str, Any] = json.loads(reader.recv_bytes())
        return report
    except EOFError:
        process.join()
        return {"error": f"the process died with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _send_report(defect: Defect, writer: Connection) -> None:
    report: dict[str, Any] = {}
    try:
        probe = timed(defect.probe)
        report["probe"] = probe.to_json()
        if probe.result.status is Status.NEEDED:
            report["repair"] = timed(lambda: repair(defect)).to_json()
    except Exception as error:  # whatever a library throws: it is said in the report, and the others are looked at
        report = {"error": f"{type(error).__name__}: {error}"}
    writer.send_bytes(json.dumps(report).encode())


if __name__ == "__main__":
    _work(int(sys.argv[1]), sys.argv[2:])
