"""Measure the checks against the labelled replies and publish it: docs/benchmarks/checks.json and checks.md.

Run `python scripts/measure_checks.py`; a few seconds.
"""

from __future__ import annotations

import json
from pathlib import Path

from qat.behavior.quality import load_labels, page, results

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"


def main() -> None:
    """Measure and write both files."""
    found = {"command": "python scripts/measure_checks.py", **results(load_labels())}
    (FOLDER / "checks.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "checks.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
