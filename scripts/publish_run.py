"""Publish the measurements of a finished run: one JSON file and one page under docs/benchmarks.

Run `python scripts/publish_run.py runs/annie_tiny_full`. Every number is the run's own; only sums are computed here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "benchmarks"


def measurements(run: Path) -> dict[str, Any]:
    """What the run measured, without its lists of answers."""
    receipt, verdict, divergence = (
        json.loads((run / name).read_text(encoding="utf-8"))
        for name in ("receipt.json", "verdict.json", "divergence.json")
    )
    stages = {
        name: {"seconds": stage["seconds"], "peak_rss_mb": stage["peak_rss_mb"]}
        for name, stage in receipt["stages"].items()
    }
    exports = {
        name.removeprefix("export/"): {
            key: stage["notes"][key] for key in ("packed", "merged", "copied", "bytes", "verification")
        }
        for name, stage in receipt["stages"].items()
        if name.startswith("export/")
    }
    comparisons = [
        {
            **{k: v for k, v in found.items() if k != "categories"},
            "flips_worse": len(found["flips_worse"]),
            "flips_better": len(found["flips_better"]),
        }
        for found in (
            *verdict["comparisons"],
            *(row for rows in verdict["sampling_comparisons"].values() for row in rows),
        )
    ]
    return {
        "command": f"qat run --recipe {receipt['recipe']['name']}",
        "qat": receipt["qat"],
        "recipe": receipt["recipe"],
        "environment": receipt["environment"],
        "stages": stages,
        "exports": exports,
        "divergence": divergence,
        "verdict": verdict["verdict"],
        "reasons": verdict["reasons"],
        "gate": verdict["gate"],
        "suite": verdict["suite"],
        "arms": verdict["arms"],
        "comparisons": comparisons,
    }


def page(name: str, found: dict[str, Any]) -> str:
    """The same as a page: machine, stages, arms under every sampling, differences."""
    machine = found["environment"]
    lines = [
        f"# {name}",
        "",
        f"`{found['command']}` on {machine['cpu']}, {machine['threads']} threads, Python {machine['python']}, "
        f"torch {machine['packages']['torch']}, transformers {machine['packages']['transformers']}. "
        f"Raw numbers: [{name}.json]({name}.json).",
        "",
        f"**{found['verdict']}.** " + "; ".join(found["reasons"]),
        "",
        "| arm | " + " | ".join(_samplings(found)) + " | KL to BF16, nats a token | same top token |",
        "|" + "---|" * (3 + len(_samplings(found))),
    ]
    for arm, rates in found["arms"].items():
        drift = found["divergence"].get(arm)
        cells = [_rate(rates["samplings"].get(sampling)) for sampling in _samplings(found)]
        cells += [f"{drift['kl']:.5f} ± {drift['kl_se']:.5f}", f"{100 * drift['top1']:.2f} %"] if drift else ["", ""]
        lines.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    lines += ["", "| arm against reference | sampling | pairs | difference, points | McNemar p | worse / better |"]
    lines.append("|---|---|---|---|---|---|")
    for row in found["comparisons"]:
        if row["difference"] is None:
            continue
        points = f"{100 * row['difference']:+.1f} [{100 * row['ci_low']:+.1f}, {100 * row['ci_high']:+.1f}]"
        flips = f"{row['flips_worse']} / {row['flips_better']}"
        lines.append(
            f"| `{row['arm']}` / `{row['reference']}` | {row['sampling']} | {row['pairs']} | {points} "
            f"| {row['p_mcnemar']:.3g} | {flips} |"
        )
    lines += ["", "| stage | seconds | peak memory of the process tree, MB |", "|---|---|---|"]
    for stage, took in found["stages"].items():
        lines.append(f"| {stage} | {took['seconds']:.0f} | {took['peak_rss_mb']:.0f} |")
    total = sum(took["seconds"] for took in found["stages"].values())
    lines.append(f"| **all** | **{total:.0f}** | **{max(t['peak_rss_mb'] for t in found['stages'].values()):.0f}** |")
    lines += ["", "| export | packed tensors | bytes | differing bytes |", "|---|---|---|---|"]
    for arm, written in found["exports"].items():
        lines.append(
            f"| `{arm}` | {written['packed']} | {written['bytes']:,} | {written['verification']['differing_bytes']} |"
        )
    return "\n".join(lines) + "\n"


def _samplings(found: dict[str, Any]) -> list[str]:
    return list(next(iter(found["arms"].values()))["samplings"])


def _rate(rate: dict[str, Any] | None) -> str:
    if rate is None or rate["rate"] is None:
        return "too few"
    return f"{100 * rate['rate']:.1f} % ({100 * rate['low']:.1f} to {100 * rate['high']:.1f}), n = {rate['n']}"


def main(arguments: list[str]) -> int:
    """Write docs/benchmarks/<run>.json and .md."""
    run = Path(arguments[0])
    found = measurements(run)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{run.name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (FOLDER / f"{run.name}.md").write_text(page(run.name, found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
