"""The record of the matrix as one file, and the tables."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qat.behavior import stats
from qat.matrix import design
from qat.matrix.findings import HYPOTHESES, Row, family, holm, points, rows_of, tests_of
from qat.matrix.jobs import Job, Place
from qat.storage import write_json


def assemble(place: Place, jobs: Sequence[Job], command: str, out: Path) -> None:
    """Put all results that are there into one file."""
    found = {
        job.name: json.loads(place.result(job.name).read_text(encoding="utf-8"))
        for job in jobs
        if place.result(job.name).is_file()
    }
    bases = dict.fromkeys(job.name.partition("/")[0] for job in jobs)
    shared = {base: place.result(f"{base}/shared") for base in bases}
    record = {
        "command": command,
        "scale": {"name": place.scale, **asdict(place.amount)},
        "seed": design.SEED,
        "environment": {"python": platform.python_version(), "packages": _versions()},
        "shared": {
            base: json.loads(path.read_text(encoding="utf-8")) for base, path in shared.items() if path.is_file()
        },
        "results": found,
        "not_run": [job.name for job in jobs if job.name not in found],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, record)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "nvidia-modelopt", "peft", "triton", "mamba-ssm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def render(record: dict[str, Any]) -> str:
    """The tables as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in record["environment"]["packages"].items())
    devices = sorted({shared["device"] for shared in record["shared"].values()}) or ["no device yet"]
    parts = [
        "# The quality matrix: measured",
        f"`{record['command']}` on {', '.join(devices)}, Python "
        f"{record['environment']['python']}, {versions}. Raw numbers: [quality_matrix.json](quality_matrix.json). "
        "What was tried, why, and how it is tested was [fixed beforehand](../quality_matrix.md). Scale: "
        + ", ".join(f"{key} {value}" for key, value in record["scale"].items())
        + ".",
    ]
    for base in design.BASES:
        rows = rows_of(record, base)
        if rows:
            parts += _base_tables(record, base, rows)
    if record["not_run"]:
        parts += ["## Not run", "\n".join(f"- {name}" for name in record["not_run"])]
    return "\n\n".join(parts) + "\n"


def _base_tables(record: dict[str, Any], base: str, rows: list[Row]) -> list[str]:
    adjusted = holm(rows, "d_passed") if family(rows) else {}
    head = ["arm", "pass rate", "against BF16", "Holm p", "manners", "knowledge, chat", "against BF16"]
    head += ["knowledge, dialogue", "nats/token, generated", "nats/token, real", "KL", "top-1"]
    body = [_cells(row, adjusted) for row in rows]
    tests = tests_of(rows)
    made = record["results"].get(f"{base}/pretraining")
    lines = [f"## Base `{base}`"]
    if made:
        settings, corpus = made["settings"], made["corpus"]
        real = corpus.get("texts", {}).get("tokens", 0)
        lines.append(
            f"Pretrained here: {settings['steps']} steps of {settings['batch']} x {settings['length']} tokens, from "
            f"{corpus['tokens'] / 1e6:.0f} M generated tokens and {real / 1e6:.1f} M of real text (these "
            f"{settings['texts_copies']} times); last loss {made['final_loss']:.3f}; {made['wall_s']:.0f} s."
        )
    lines.append(
        "Differences are arm minus BF16 persona, in points or nats a token, with 95 % intervals. **Bold**: the "
        "learning rate that the training's own validation chose, and plain NVFP4; Holm's p is over these."
    )
    lines.append(_table(head, body))
    if tests:
        said = [[t.hypothesis, HYPOTHESES[t.hypothesis], t.where, t.figure, t.verdict] for t in tests]
        lines.append(_table(["", "hypothesis", "where", "figure", "verdict"], said))
    return lines


def _cells(row: Row, adjusted: dict[str, float]) -> list[str]:
    name = row.arm.name.partition("/")[2]
    change = row.d_knowledge.get("chat")
    return [
        f"**{name}**" if row.arm.name in adjusted else name,
        _percent(row.passed),
        "" if row.d_passed is None else points(row.d_passed),
        f"{adjusted[row.arm.name]:.2g}" if row.arm.name in adjusted else "",
        _percent(row.manners),
        _percent(row.knowledge["chat"]),
        "" if change is None else points(change),
        _percent(row.knowledge["dialogue"]),
        _nats(row, "generated"),
        _nats(row, "real"),
        f"{row.kl:.4f} ± {row.kl_se:.4f}",
        f"{row.top1:.2%}",
    ]


def _nats(row: Row, text: str) -> str:
    change = row.d_nats.get(text)
    return "" if change is None else f"{change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"


def _percent(rate: stats.Rate) -> str:
    if rate.rate is None:
        return str(rate.reason)
    return f"{rate.rate:.1%} [{100 * (rate.low or 0):.1f}, {100 * (rate.high or 0):.1f}]"


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
