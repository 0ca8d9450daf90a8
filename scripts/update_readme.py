"""Put the arms table of a finished run into README.md, between its two markers.

Run `python scripts/update_readme.py runs/annie_tiny_full`. Numbers come from the run's `verdict.json` and
`divergence.json` only; what they do not hold stays empty in the table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- arms:begin -->", "<!-- arms:end -->"
HEAD = (
    "arm",
    "pass rate ({confidence:.0%} interval)",
    "cases",
    "difference to {references}",
    "KL to BF16 ± its standard error, nats a token",
    "same top token",
)


def arms_table(run: Path) -> str:
    """The table of a run in Markdown, the verdict and its reasons below it.

    Args:
        run: A run folder with `verdict.json` and, where NVFP4 arms were measured, `divergence.json`.
    """
    verdict = json.loads((run / "verdict.json").read_text(encoding="utf-8"))
    measured = run / "divergence.json"
    divergence = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else {}
    differences = {found["arm"]: found for found in verdict["comparisons"]}
    references = sorted({found["reference"] for found in verdict["comparisons"]})
    shown = {"confidence": verdict["gate"]["confidence"], "references": " / ".join(f"`{name}`" for name in references)}
    head = [text.format(**shown).replace("%", " %") for text in HEAD]
    rows = [_row(head), _row(["---"] * len(head))]
    for arm, rates in verdict["arms"].items():
        drift = divergence.get(arm, {})
        rows.append(
            _row(
                [
                    f"`{arm}`",
                    _rate(rates["overall"]),
                    str(rates["overall"]["n"]),
                    _difference(differences.get(arm)),
                    _drift(drift),
                    f"{100 * drift['top1']:.1f} %" if drift else "",
                ]
            )
        )
    reasons = "; ".join(verdict["reasons"])
    return "\n".join([*rows, "", f"`{run.name}`: **{verdict['verdict']}**. {reasons}"])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rate(rate: dict[str, Any]) -> str:
    if rate["rate"] is None:
        return "too few"
    return f"{100 * rate['rate']:.1f} % ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"


def _difference(found: dict[str, Any] | None) -> str:
    """Percentage points with the interval."""
    if found is None or found["difference"] is None:
        return ""
    low, high = (100 * found[bound] for bound in ("ci_low", "ci_high"))
    return f"{100 * found['difference']:+.1f} points ({low:+.1f} to {high:+.1f})"


def _drift(drift: dict[str, Any]) -> str:
    """KL divergence; its standard error is None for a single conversation."""
    if not drift:
        return ""
    error = "" if drift["kl_se"] is None else f" ± {drift['kl_se']:.4f}"
    return f"{drift['kl']:.4f}{error}"


def update(readme: str, table: str) -> str:
    """The README's text with the block between the markers replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must hold {BEGIN} and then {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Update README.md from the run folder given."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "verdict.json").is_file():
        print("usage: update_readme.py RUN_FOLDER   (a finished run, with verdict.json)", file=sys.stderr)
        return 2
    readme = ROOT / "README.md"
    readme.write_text(update(readme.read_text(encoding="utf-8"), arms_table(Path(arguments[0]))), encoding="utf-8")
    print(f"README.md shows {arguments[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
