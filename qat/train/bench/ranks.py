"""Training steps on several GPUs against one, each count started by accelerate's launcher as the product starts it.

What the processes do is in `qat.train.bench.process`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qat.storage import write_json
from qat.train.bench.process import Measurements
from qat.train.bench.run import environment
from qat.train.launch import REPLICATED, SHARDED, Processes, launch_command, supervise

PROGRAM = "qat.train.bench.process"
METHODS = {"alone": (), "replicate": REPLICATED, "shard": SHARDED}
"""How processes keep the base -> the launcher's flags."""


def bench_ranks(
    config: Path, out: Path, layers: int, counts: Sequence[int], modes: Sequence[str], shapes: Sequence[str], limit: int
) -> None:
    """Measure arms on several counts of GPUs.

    Args:
        config: `config.json`.
        out: JSON; what it holds already stays.
        layers: How many layers of the network.
        counts: Of GPUs; one GPU is measured without any wrapper.
        modes: For the other counts: `replicate`, `shard`.
        shapes: As `Shape.parse` reads them; the batch is that of each GPU.
        limit: Seconds for one count in one mode, all its arms together.
    """
    measured, facts = Measurements(out), environment()
    command = facts.pop("command")
    measured.begin({**facts, "config": config.name, "optimizer": "AdamW, fused"})
    with TemporaryDirectory() as folder:
        for count, mode in chain.from_iterable(product([each], modes if each > 1 else ["alone"]) for each in counts):
            job, log = Path(folder) / f"{count}-{mode}.json", Path(folder) / f"{count}-{mode}.log"
            what = {"config": str(config), "out": str(out), "layers": layers, "mode": mode, "shapes": list(shapes)}
            write_json(job, what)
            began = time.monotonic()
            try:
                status: Any = supervise(launch_command(METHODS[mode], Processes(count), PROGRAM, job), log, limit)
            except subprocess.TimeoutExpired:
                status = f"ended after {limit} s"
            took = round(time.monotonic() - began, 1)
            measured.add("launch", command=command, layers=layers, gpus=count, mode=mode, status=status, seconds=took)
            if status != 0:
                print(log.read_text(encoding="utf-8", errors="replace")[-6000:], file=sys.stderr, flush=True)


def markdown(file: Path) -> str:
    """A table of the timed steps, each against one GPU's of the same arm and shape."""
    measured = json.loads(file.read_text(encoding="utf-8"))["measurements"]
    rows = [row for row in measured if row["kind"] == "step"]
    profiles = {(_arm(row), row["gpus"], row["mode"]): row for row in measured if row["kind"] == "profile"}
    one = {_arm(row): row["tokens_per_second"] for row in rows if row["gpus"] == 1}
    head = ["layers", "arm", "batch x length of a GPU", "recomputation", "GPUs", "base", "median s"]
    head += ["95 % interval of the mean", "tok/s", "against one", "peak GiB", "NCCL ms", "of it exposed"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        profile = profiles.get((_arm(row), row["gpus"], row["mode"]), {})
        speed, single = row["tokens_per_second"], one.get(_arm(row))
        cells = [
            row["layers"],
            row["arm"],
            f"{row['batch']} x {row['length']}",
            "yes" if row["checkpointing"] else "no",
        ]
        cells += [row["gpus"], row["mode"], f"{row['median']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}"]
        cells += [f"{speed:,.0f}", f"{speed / single:.2f}" if single else "–", f"{row['peak_gib']:.1f}"]
        cells += [profile.get("communicating_ms", "–"), profile.get("exposed_ms", "–")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _arm(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("layers", "arm", "batch", "length", "checkpointing"))
