"""Training steps on several GPUs against one, each count started by accelerate's launcher as the product starts it.

What the processes do is in `qat.train.bench.process`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qat.errors import UserError
from qat.storage import write_json
from qat.train.bench.process import Measurements
from qat.train.bench.run import environment
from qat.train.launch import REPLICATED, SHARDED, Processes, launch_command, supervise

PROGRAM = "qat.train.bench.process"
METHODS = {"alone": (), "replicate": REPLICATED, "shard": SHARDED}
"""How processes keep the base -> the launcher's flags."""


def bench_ranks(
    config: Path,
    out: Path,
    layers: int,
    counts: Sequence[int],
    modes: Sequence[str],
    shapes: Sequence[str],
    limit: int,
    stacks: int = 0,
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
        stacks: Seconds between dumps of all stacks of a process into its log; 0: none.
    """
    measured, facts = Measurements(out), environment()
    command = facts.pop("command")
    measured.begin({**facts, "config": config.name, "optimizer": "AdamW, fused"})
    with TemporaryDirectory() as folder:
        for count, mode in chain.from_iterable(product([each], modes if each > 1 else ["alone"]) for each in counts):
            job, log = Path(folder) / f"{count}-{mode}.json", Path(folder) / f"{count}-{mode}.log"
            what = {"config": str(config), "out": str(out), "layers": layers, "mode": mode}
            what |= {"shapes": list(shapes), "stacks": stacks}
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


def merge(out: Path, runs: Mapping[str, Sequence[Path]]) -> None:
    """Put the files of several runs into one, each measurement with the run that it is of.

    Args:
        out: JSON, written anew: device and versions by run, and all measurements.
        runs: What each run is called (when, on what, what ran beside it) -> its files.

    Raises:
        UserError: Files of one run name different devices or versions.
    """
    facts: dict[str, dict[str, Any]] = {}
    measured: list[dict[str, Any]] = []
    for run, files in runs.items():
        for file in files:
            content = json.loads(file.read_text(encoding="utf-8"))
            measured += [{"run": run, **row} for row in content.pop("measurements")]
            if facts.setdefault(run, content) != content:
                raise UserError(
                    "Files of one run must be measured on one device with the same versions.",
                    where=str(file),
                    value=run,
                    remedy="give the file a run of its own",
                )
    write_json(out, {"runs": facts, "measurements": measured})


def markdown(file: Path) -> str:
    """A table of the timed steps, each against one GPU's of the same arm and shape, if possible of the same run."""
    measured = json.loads(file.read_text(encoding="utf-8"))["measurements"]
    rows = [row for row in measured if row["kind"] == "step"]
    profiles = {_processes(row): row for row in measured if row["kind"] == "profile"}
    alone = [row for row in rows if row["gpus"] == 1]
    one = {_arm(row): row["tokens_per_second"] for row in alone}
    own = {(row.get("run"), _arm(row)): row["tokens_per_second"] for row in alone}
    head = ["layers", "arm", "batch x length of a GPU", "recomputation", "GPUs", "base", "median s"]
    head += ["95 % interval of the mean", "tok/s", "against one", "peak GiB", "NCCL ms", "of it exposed"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        profile = profiles.get(_processes(row), {})
        speed, single = row["tokens_per_second"], own.get((row.get("run"), _arm(row)), one.get(_arm(row)))
        cells = [row["layers"], row["arm"], f"{row['batch']} x {row['length']}"]
        cells += ["yes" if row["checkpointing"] else "no", row["gpus"], row["mode"]]
        cells += [f"{row['median']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}"]
        cells += [f"{speed:,.0f}", f"{speed / single:.2f}" if single else "–", f"{row['peak_gib']:.1f}"]
        cells += [profile.get("communicating_ms", "–"), profile.get("exposed_ms", "–")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _arm(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("layers", "arm", "batch", "length", "checkpointing"))


def _processes(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("run"), row["gpus"], row["mode"], *_arm(row)
