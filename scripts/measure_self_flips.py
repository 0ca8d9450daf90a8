"""How often a served model disagrees with itself: the suite twice in the same way, at several concurrencies.

Run `python scripts/measure_self_flips.py CHECKPOINT --dtype bfloat16` with vLLM's environment; each call measures
one checkpoint in one dtype and takes its place in docs/benchmarks/self_flips.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qat.behavior.checks import Reply
from qat.behavior.compare import Answers, read_answers, self_flips
from qat.behavior.records import CaseResult
from qat.behavior.runner import repeated, run_suite
from qat.behavior.suite import load_suite
from qat.recipe.schema import BehaviorBlock, GateBlock, Sampling, ServeBlock
from qat.serve.launch import Endpoint, serve_checkpoint

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "benchmarks" / "self_flips.json"
CONCURRENCIES = (1, 8, 32)


def main() -> None:
    """Serve, ask, and put what was found in the place of what was measured before in the same way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path, help="its folder's name stands in the table")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--suite", default="annie_tiny")
    parser.add_argument("--cases", type=int, default=60, help="the first so many of the suite")
    options = parser.parse_args()
    serve = ServeBlock(dtype=options.dtype, kv_cache_gib=0.25)
    with (
        tempfile.TemporaryDirectory() as folder,
        serve_checkpoint(options.checkpoint, serve, Path(folder) / "vllm.log") as server,
    ):
        found = [
            entry
            for concurrency in CONCURRENCIES
            for entry in measure(server, options.suite, options.cases, concurrency, Path(folder))
        ]
    command = f"python {shlex.join([f'scripts/{Path(sys.argv[0]).name}', *sys.argv[1:]])}"
    head = {"command": command, "dtype": options.dtype}
    entries = [{"arm": options.checkpoint.name, **head, **entry} for entry in found]
    before = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else []
    others = [e for e in before if (e["arm"], e["dtype"]) != (options.checkpoint.name, options.dtype)]
    OUT.write_text(json.dumps([*others, *entries], indent=1) + "\n", encoding="utf-8")
    for entry in entries:
        print(entry)


def measure(server: Endpoint, suite_name: str, cases: int, concurrency: int, folder: Path) -> list[dict[str, Any]]:
    """One entry a sampling: verdicts that flipped, and answers that differ at all."""
    suite = load_suite(suite_name)
    passes = (
        Sampling(name="greedy", seeds=(0,), limit=cases),
        Sampling(name="production", temperature=0.7, top_p=0.95, seeds=(1,), limit=cases),
    )
    gate = GateBlock(candidate="a", reference="a")
    block = BehaviorBlock(suite=suite_name, concurrency=concurrency, sampling=passes, gate=gate)
    out = folder / f"{concurrency}.jsonl"
    started = time.monotonic()
    run_suite(suite, server.url, server.model, "a", repeated(block, 2), out)
    seconds = time.monotonic() - started
    answers = read_answers(out)
    return [
        {"concurrency": concurrency, "sampling": one.name, "seconds_of_all_passes": round(seconds, 1)}
        | _flips(answers, one.name)
        for one in passes
    ]


def _flips(answers: Answers, sampling: str) -> dict[str, Any]:
    found = self_flips(answers, sampling, 0.95)
    assert found is not None
    pairs = [
        (first, answers.results[key._replace(sampling=f"{sampling}_2")])
        for key, first in answers.results.items()
        if key.sampling == sampling
    ]
    different = sum(_words(first) != _words(second) for first, second in pairs)
    passed = sum(first.passed for first, _ in pairs)
    errors = sum(one.error is not None for pair in pairs for one in pair)
    return {**found._asdict(), "different_answers": different, "passed_first": passed, "errors": errors}


def _words(result: CaseResult) -> list[tuple[object, list[tuple[str, str]]]]:
    """What the model wrote, without the ids that the server gives to calls."""
    replies = [Reply([message]) for message in result.produced]
    return [(reply.final, [(call.name, call.raw) for call in reply.calls]) for reply in replies]


if __name__ == "__main__":
    main()
