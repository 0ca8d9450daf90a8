"""Measure `qat data audit` on many conversations: one entry a size and part in docs/benchmarks/audit.json.

Run `python scripts/benchmark_audit.py`; the conversations are made first, the three parts that the bars are set for
follow, each a command of its own. `--counts 2000` takes a minute. `--profile` prints where one part spends its time.
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

from qat.data.generate import conversations
from qat.data.load import to_line
from qat.data.schema import Persona, load_persona

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks" / "audit.json"
RECIPE = "annie_tiny"
AT_A_TIME = 2000
PARTS = {"schema": ["schema"], "replies and duplicates": ["replies", "duplicates"], "tokens": ["tokens"], "all": []}


def main() -> None:
    """Measure every part at every size, and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--counts", type=int, nargs="+", default=[2000, 100_000])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--prompt", help="persona whose system prompt stands in front instead of the small world's")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        persona = _persona(options.prompt, Path(folder))
        for count in options.counts:
            path = Path(folder) / f"{count}.jsonl"
            _write(path, load_persona(persona), count)
            overrides = ["--recipe", RECIPE, "--set", f"persona={persona}", "--set", "data.max_length=2048"]
            for part in options.parts:
                arguments = [str(path), *(word for name in PARTS[part] for word in ("--only", name)), *overrides]
                if options.profile:
                    _profile(arguments)
                    continue
                found = {"part": part, "prompt": options.prompt or RECIPE, **_measure(arguments), **_facts(path, count)}
                print(json.dumps(found), flush=True)
                _keep(found)
            path.unlink()


def _persona(prompt: str | None, folder: Path) -> Path:
    """The small world's persona, its system prompt as long as asked for."""
    source = load_persona(RECIPE)
    text = load_persona(prompt).system_prompt if prompt else source.system_prompt
    path = folder / "persona.yaml"
    content = {"name": source.name, "system_prompt": text, "tools": source.tools, "facts": source.facts}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")  # JSON is YAML
    return path


def _write(path: Path, persona: Persona, count: int) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for start in range(0, count, AT_A_TIME):
            for number, each in enumerate(conversations(persona, min(AT_A_TIME, count - start), seed=start)):
                stream.write(to_line({**each, "id": f"c{start + number}"}) + "\n")  # type: ignore[typeddict-item]


def _measure(arguments: list[str]) -> dict[str, Any]:
    """Wall and CPU seconds of one audit, and the greatest sum of the resident memory of all its processes."""
    command = [sys.executable, "-m", "qat", "data", "audit", *arguments, "--json"]
    started, load, before = time.monotonic(), os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL, cwd=ROOT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.2)
        seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        output.seek(0)
        result = json.load(output)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_rss_mb": round(peak / 2**20),
        "exit": process.returncode,
        "findings": {finding["code"]: finding["count"] for finding in result["findings"]},
        "tokens": result.get("tokens", {}).get("total"),
        "distinct_turns": result.get("user_turns", {}).get("distinct"),
        "load_average_before": round(load, 2),
    }


def _resident(pid: int) -> int:
    """Resident bytes of a process and its children; pages that they share count for each."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):  # it has just ended
        return 0
    return pages * resource.getpagesize() + sum(_resident(int(child)) for child in children)


def _facts(path: Path, count: int) -> dict[str, Any]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "tokenizers"))
    return {
        "conversations": count,
        "file_mb": round(path.stat().st_size / 2**20, 1),
        "cores": os.cpu_count(),
        "environment": f"Python {platform.python_version()}, {versions}",
    }


def _keep(found: dict[str, Any]) -> None:
    keys = ("part", "prompt", "conversations", "environment")
    runs = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    others = [run for run in runs if any(run[key] != found[key] for key in keys)]
    RESULTS.write_text(json.dumps([*others, found], indent=1) + "\n", encoding="utf-8")


def _profile(arguments: list[str]) -> None:
    from qat.cli import main as qat
    from qat.data.audit import stream

    stream.WORKERS = 0
    profile = cProfile.Profile()
    profile.enable()
    qat(["data", "audit", *arguments, "--json"])
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
