"""Measure what the statistics promise and publish it: docs/benchmarks/statistics.json and statistics.md.

Run `python scripts/measure_statistics.py`; half an hour on one core. `--runs` sets the simulated suites per cell.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy
import scipy

from qat.behavior.coverage import measure
from qat.behavior.coverage_page import page

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()
    start = time.monotonic()
    found = measure(options.runs, options.seed)
    versions = f"Python {platform.python_version()}, numpy {numpy.__version__}, scipy {scipy.__version__}"
    found = {
        "command": f"python scripts/measure_statistics.py --runs {options.runs} --seed {options.seed}",
        "environment": versions,
        "seconds": round(time.monotonic() - start, 1),
        **found,
    }
    (FOLDER / "statistics.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "statistics.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
