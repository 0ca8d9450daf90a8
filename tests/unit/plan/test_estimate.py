"""The estimate of whole recipes: what fits, how large things get, and what the command prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qat.cli import main
from qat.plan.check import markdown
from qat.plan.estimate import PlanReport, basis
from qat.plan.estimate import plan as plan_on
from qat.plan.gpus import GPUS, Gpu
from qat.plan.shape import CARDS
from qat.recipe.load import load_recipe
from qat.recipe.schema import Recipe
from qat.train.memory import RESERVE

ROOT = Path(__file__).resolve().parents[3]


def plan(recipe: Recipe, gpu: Gpu) -> PlanReport:
    (report,) = plan_on(recipe, gpu)
    return report


CHECKPOINTED, KEPT = (f"train.gradient_checkpointing={value}" for value in ("true", "false"))


def test_the_production_recipe_on_one_h200() -> None:
    report = plan(load_recipe("annie_v4", [CHECKPOINTED]), GPUS["h200"])
    assert report.fits and 0.2 < report.seconds / 3600 < 3
    assert {stage.name for stage in report.stages} >= {"sft", "calibrate/nvidia-nano", "distill/nvidia-nano"}
    assert report.disk["base"] == pytest.approx(63.2e9, rel=0.01)  # the published checkpoint has 63 GB
    # The published NVFP4 checkpoint of the same preset: about 19 GB.
    assert report.disk["export/nvfp4_nano_qad"] == pytest.approx(19.3e9, rel=0.02)
    assert report.disk["total"] == sum(value for name, value in report.disk.items() if name != "total")


def test_what_does_not_fit_comes_with_what_does() -> None:
    report = plan(load_recipe("annie_v4", [KEPT]), GPUS["h100"])
    stage = report.stages[0]
    assert stage.name == "sft" and not stage.fits and stage.would_fit
    assert any("gradient_checkpointing" in option for option in stage.would_fit)
    assert plan(load_recipe("annie_v4", [CHECKPOINTED]), GPUS["h100"]).stages[0].fits


def test_memory_is_what_training_itself_would_refuse() -> None:
    """The same need, asked of the function that the training asks before it loads."""
    from qat.errors import UserError
    from qat.train.memory import Need, require_memory

    recipe, gpu = load_recipe("annie_v4", [KEPT]), GPUS["h100"]
    config = json.loads((CARDS / "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.json").read_text())["config"]
    need = Need(targets=recipe.train.adapter.targets, batch_size=2, length=2048)
    with pytest.raises(UserError, match="does not fit"):
        require_memory(config, need, gpu.memory, [], "train.sft")
    peak = plan(recipe, gpu).stages[0].peak
    assert peak is not None and peak.total > gpu.memory * (1 - RESERVE)


def test_a_tiny_export_has_the_size_of_its_files() -> None:
    """The base's own file holds what the sizes count, and a little more (norms, convolutions, the header)."""
    report = plan(load_recipe("annie_tiny", ["data.count=30", "train.distill.prompts=null"]), GPUS["h200"])
    assert report.disk["base"] == pytest.approx((ROOT / "data/tiny_base/model.safetensors").stat().st_size, rel=0.01)


def test_recomputing_costs_time_and_saves_memory() -> None:
    plain = plan(load_recipe("annie_qwen", [KEPT]), GPUS["b200"]).stages[0]
    recomputed = plan(load_recipe("annie_qwen", [CHECKPOINTED]), GPUS["b200"]).stages[0]
    assert recomputed.seconds > plain.seconds
    assert plain.peak is not None and recomputed.peak is not None and recomputed.peak.total < plain.peak.total


def test_an_unmeasured_gpu_says_so() -> None:
    assert basis(GPUS["dgx-spark"]).startswith("not measured: scaled by bandwidth and FLOPS")
    assert "steps measured on" in basis(GPUS["h200"]) and not basis(GPUS["h200"]).startswith("not")


def test_the_page_holds_the_table_that_the_command_prints() -> None:
    """After a new measurement: `PYTHONPATH=. python -m qat.plan.check`, and paste."""
    assert markdown() in (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "annie_v4", "--gpu", "h200", "--set", CHECKPOINTED, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["stages"][0]["stage"] == "sft" and report["not_estimated"]
    assert main(["plan", "--recipe", "annie_v4", "--gpu", "h100", "--set", KEPT]) == 1  # a finding: it does not fit
    assert "this would: gradient_checkpointing" in capsys.readouterr().out
    assert main(["plan", "--recipe", "annie_v4", "--set", CHECKPOINTED]) == 0
    assert "dgx-spark" in capsys.readouterr().out
    assert main(["plan", "--errors", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["seconds"]) >= 12
    assert main(["plan"]) == 2 and main(["plan", "--recipe", "annie_v4", "--gpu", "h20"]) == 2


def test_planning_loads_no_torch() -> None:
    program = (
        "import sys\nfrom qat.cli import main\n"
        f"main(['plan', '--recipe', 'annie_v4', '--set', '{CHECKPOINTED}', '--gpu', 'b200', '--json'])\n"
        "sys.exit(bool({'torch', 'transformers', 'modelopt'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT, text=True)
    assert done.returncode == 0, done.stderr
