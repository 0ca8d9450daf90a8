"""Jobs over processes over GPUs, within a time: what was not reached is left for the next call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from qat.matrix.jobs import Job, Place
from qat.matrix.worker import work


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    device: str | None
    job: Job | None = None


@dataclass
class Outcome:
    """What a call did.

    Attributes:
        done: Names of jobs with a result, those of earlier calls included.
        failed: Job to error.
        left: Jobs that were not reached.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def run(
    jobs: Sequence[Job],
    place: Place,
    devices: Sequence[str | None],
    workers: int,
    seconds: float,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run jobs whose results are not there yet.

    Args:
        jobs: In the order of preference.
        place: Where things lie.
        devices: GPUs; `[None]` for the CPU.
        workers: Processes of each.
        seconds: After so long everything still running is ended; trainings go on from their checkpoints next time.
        say: Where to report.

    Returns:
        What there is now.
    """
    started = time.monotonic()
    logs = place.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    place.result("x").parent.mkdir(parents=True, exist_ok=True)
    outcome = Outcome(done=[job.name for job in jobs if place.result(job.name).is_file()])
    waiting = [job for job in jobs if job.name not in outcome.done]
    crew = [_hire(place, device, number) for number in range(workers) for device in devices]
    try:
        while waiting or any(one.job for one in crew):
            _dispatch(crew, waiting, outcome, say, started)
            busy = [one.connection for one in crew if one.job]
            if not busy:
                break
            rest = seconds - (time.monotonic() - started)
            if rest <= 0:
                break
            for ready in wait(busy, timeout=min(rest, 30.0)):
                worker = next(one for one in crew if one.connection is ready)
                _collect(worker, outcome, say, started)
    finally:
        for one in crew:
            one.process.kill()
            one.process.join()
    reached = {*outcome.done, *outcome.failed}
    outcome.left = [job.name for job in jobs if job.name not in reached]
    return outcome


def _hire(place: Place, device: str | None, number: int) -> _Worker:
    here, there = get_context("spawn").Pipe()
    log = place.work / "logs" / f"worker-{device or 'cpu'}-{number}.log"
    # Not a daemon: pretraining has processes of its own that generate text.
    process = get_context("spawn").Process(target=work, args=(there, place, device, log))
    process.start()
    there.close()
    return _Worker(process, here, device)


def _dispatch(
    crew: list[_Worker], waiting: list[Job], outcome: Outcome, say: Callable[[str], None], started: float
) -> None:
    for worker in [one for one in crew if one.job is None and one.process.is_alive()]:
        beside = [one.job for one in crew if one.device == worker.device and one.job is not None]
        if any(job.alone for job in beside):
            continue
        ready = [job for job in waiting if set(job.needs) <= set(outcome.done) and not (job.alone and beside)]
        if ready:
            worker.job = ready[0]
            waiting.remove(ready[0])
            say(f"[{time.monotonic() - started:5.0f} s] {worker.device or 'cpu'}: {ready[0].name}")
            worker.connection.send(ready[0])


def _collect(worker: _Worker, outcome: Outcome, say: Callable[[str], None], started: float) -> None:
    name = worker.job.name if worker.job else ""
    try:
        name, spent, error = worker.connection.recv()
    except EOFError:
        worker.process.join()
        spent, error = 0.0, f"the process ended with status {worker.process.exitcode}"
    worker.job = None
    now = f"[{time.monotonic() - started:5.0f} s]"
    if error is None:
        outcome.done.append(name)
        say(f"{now} done {name} in {spent:.0f} s")
    else:
        last = error.strip().rpartition("\n")[2]
        seen = any(other.strip().endswith(last) for other in outcome.failed.values())
        outcome.failed[name] = error
        say(f"{now} FAILED {name} after {spent:.0f} s\n{last if seen else error}")
