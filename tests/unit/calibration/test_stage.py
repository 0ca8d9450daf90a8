"""The stage `sensitivity` on a run whose fine-tuning is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qat import chain
from qat.calibration.sensitivity import EVERYTHING, Sensitivity
from qat.recipe.schema import Recipe
from qat.runs import Run
from tests.unit.calibration.test_run import Given
from tests.unit.train import world


def test_a_run_is_measured_once(tmp_path: Path) -> None:
    given = Given(tmp_path)
    content = given.recipe.model_dump(mode="json")
    content["data"] |= {"source": str(given.train), "count": None}
    run = Run.open(Recipe.model_validate(content), tmp_path / "runs")
    with run.stage("sft", inputs={}, outputs=["sft/adapter"]):
        shutil.copytree(given.adapter, run.path("sft", "adapter"))
    run.path("data").mkdir(exist_ok=True)
    shutil.copy(given.train, run.path(chain.TRAIN_FILE))
    world.save_conversations(run.path(chain.VALIDATION_FILE), 6, seed=5)
    chain.sensitivity(run, ("nvfp4",), 4)
    path = run.path(chain.SENSITIVITY)
    found = Sensitivity.from_json(json.loads(path.read_text()))
    assert found.conversations == 4 and found.kinds[0].group == EVERYTHING
    record = run.record("sensitivity")
    assert record["notes"]["tokens"] == found.tokens and record["inputs"]["formats"] == ["nvfp4"]
    before = path.stat().st_mtime_ns
    chain.sensitivity(run, ("nvfp4",), 4)
    assert path.stat().st_mtime_ns == before
