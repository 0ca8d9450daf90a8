"""Measure calibration on a run's persona and publish it: docs/benchmarks/calibration.json and calibration.md.

Run `python scripts/measure_calibration.py RUN_FOLDER [CONVERSATIONS]` after `qat train`; a killed call goes on where it
was.
"""

from __future__ import annotations

import json
import platform
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from qat.calibration.sensitivity import Sensitivity, measure
from qat.calibration.study import Persona, cases, page, run_case
from qat.recipe.load import load_recipe
from qat.train.base import resolve_base

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"


def main() -> None:
    """Measure what is not there yet; both files are written after every case."""
    run, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 96
    recipe = load_recipe(run / "recipe.yaml")
    lines = (run / "data" / "held_out.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    rows = Path(tempfile.mkdtemp()) / "rows.jsonl"
    rows.write_text("".join(random.Random(0).sample(lines, count)), encoding="utf-8")
    persona = Persona(recipe, resolve_base(recipe.base), run / "sft" / "adapter", run / "data" / "train.jsonl", rows)
    target = FOLDER / "calibration.json"
    found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    found["command"] = f"python scripts/measure_calibration.py runs/{run.name} {count}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    found["environment"] = f"{platform.machine()} CPU, {versions}, persona of recipe {recipe.name}"
    if "sensitivity" not in found:
        arguments = persona.recipe, persona.base, persona.adapter, persona.train, persona.held_out
        found["sensitivity"] = measure(*arguments, conversations=count).to_json()
        target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for label, case in cases(Sensitivity.from_json(found["sensitivity"])):
        if label not in found.setdefault("cases", {}):
            found["cases"][label] = run_case(persona, case)
            target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(label, found["cases"][label], flush=True)
    (FOLDER / "calibration.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
