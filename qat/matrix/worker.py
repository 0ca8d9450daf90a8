"""A process that does jobs on one GPU until it is told that there are none."""

from __future__ import annotations

import os
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from qat.matrix.jobs import Job, Place
from qat.storage import write_json


def work(connection: Connection, place: Place, device: str | None, log: Path) -> None:
    """Do what comes over the connection, and say how it went.

    Args:
        connection: Gives jobs, and None at the end; takes `(job, seconds, error or None)`.
        place: Where things lie.
        device: The GPU's number as CUDA_VISIBLE_DEVICES takes it; None for the CPU.
        log: What the job itself prints.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = device or ""
    with log.open("a", encoding="utf-8", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = file, file
        import torch

        torch.set_num_threads(2)
        while (job := connection.recv()) is not None:
            connection.send(_done(job, place))


def _done(job: Job, place: Place) -> tuple[str, float, str | None]:
    begun = time.monotonic()
    print(f"== {job.name}", flush=True)
    try:
        found = job.run(place)
    except Exception:
        return job.name, time.monotonic() - begun, traceback.format_exc()
    found["wall_s"] = round(time.monotonic() - begun, 1)
    write_json(place.result(job.name), found)
    _free()
    return job.name, time.monotonic() - begun, None


def _free() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
