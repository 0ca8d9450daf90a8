"""Measure the runner against the stub server in a process of its own: one entry an environment in runner.json.

Run `python scripts/benchmark_runner.py`; half a minute on two cores. `--profile` prints where the runner's time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.metadata
import json
import os
import platform
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from qat.behavior.runner import run_suite
from qat.behavior.suite import load_suite
from qat.progress import progress_bar
from qat.recipe.schema import BehaviorBlock, GateBlock, Sampling

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "tests" / "unit" / "behavior" / "stub_server.py"
SUITE = "annie_tiny_full"
CONCURRENCY = 16


def main() -> None:
    """Ask 1,000 cases under `--seeds` seeds, all their checks on, and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    stub = subprocess.Popen([sys.executable, str(STUB)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert stub.stdout is not None
    url = f"http://127.0.0.1:{int(stub.stdout.readline())}"
    profile = cProfile.Profile()
    try:
        if options.profile:
            profile.enable()
        found = measure(url, options.seeds)
        profile.disable()
    finally:
        stub.communicate(b"", timeout=10)
    print(json.dumps(found, indent=1))
    if options.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    found = {"command": f"python scripts/benchmark_runner.py --seeds {options.seeds}", **found}
    path = ROOT / "docs" / "benchmarks" / "runner.json"
    others = [run for run in json.loads(path.read_text(encoding="utf-8")) if run["environment"] != found["environment"]]
    path.write_text(json.dumps([found, *others], indent=1) + "\n", encoding="utf-8")


def measure(url: str, seeds: int) -> dict[str, Any]:
    """One run, with wall and CPU seconds of this process and its highest memory."""
    suite = load_suite(SUITE)
    sampling = (Sampling(name="warm", temperature=0.7, seeds=tuple(range(seeds))),)
    gate = GateBlock(candidate="stub", reference="stub")
    block = BehaviorBlock(suite=SUITE, concurrency=CONCURRENCY, sampling=sampling, gate=gate)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, progress_bar("", 1, enabled=False) as silent:
        wall, cpu = time.monotonic(), time.process_time()
        summary = run_suite(suite, url, "stub", "stub", block, Path(folder) / "stub.jsonl", silent)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        size = (Path(folder) / "stub.jsonl").stat().st_size
    checks = sum(len(script.checks) for script in suite.scripts.values())
    return {
        "suite": SUITE,
        "checks_per_answer": round(checks / len(suite.cases), 1),
        "concurrency": CONCURRENCY,
        "answers": summary.asked,
        "requests": summary.requests,
        "errors": summary.errors,
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "requests_per_second": round(summary.requests / wall),
        "requests_per_cpu_second": round(summary.requests / cpu),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "result_file_mb": round(size / 1e6, 1),
        "load_average_before": round(load, 2),
        "cores": os.cpu_count(),
        "environment": f"Python {platform.python_version()}, httpx {httpx.__version__}, sniffio {_sniffio()}",
    }


def _sniffio() -> str:
    """Its version: httpcore tries to import it several times a request, which is slow where it is not there."""
    try:
        return importlib.metadata.version("sniffio")
    except importlib.metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
