"""`qat sensitivity` on a measurement that is already there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat import chain
from qat.calibration.sensitivity import Score, Sensitivity
from qat.cli import main
from qat.commands.calibrate import parse_size, with_preset
from qat.errors import ExitCode, UserError
from qat.recipe.load import load_recipe

GROUPS = [
    Score("0.mamba.in_proj", "nvfp4", ["backbone.layers.0.mixer.in_proj"], 2000, 570, 0.5, 0.01, 0.9),
    Score("1.experts", "nvfp4", ["backbone.layers.1.mixer.experts.up_proj"], 8000, 2270, 0.1, 0.01, 0.98),
]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stages that do nothing but leave a measurement."""

    def sensitivity(run: Any, formats: tuple[str, ...], conversations: int) -> None:
        assert formats == ("nvfp4", "fp8") and conversations == 5
        found = Sensitivity(GROUPS, GROUPS, 1000, 5, 60)
        run.path("sensitivity.json").write_text(json.dumps(found.to_json()))

    monkeypatch.setattr(chain, "sensitivity", sensitivity)
    for name in ("data", "sft"):
        monkeypatch.setattr(chain, name, lambda run: None)
    return tmp_path


def test_a_budget_becomes_a_recipe(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = measured / "mixed.yaml"
    given = ["sensitivity", "--recipe", "annie_tiny", "--runs-dir", str(measured / "runs"), "--format", "fp8"]
    given += ["--conversations", "5"]
    assert main([*given, "--budget", "50%", "--preset", "mine", "--out", str(out)]) == ExitCode.DONE
    shown = capsys.readouterr().out
    # 11,000 bytes in BF16; 5,500 hold the Mamba layer in BF16 (2,000 + 2,270 + 1,000), not the experts.
    assert "0.mamba.in_proj" in shown and "add up to 0.10000" in shown
    recipe = load_recipe(out)
    assert recipe.quant.presets["mine"].bf16 == ("backbone.layers.0.mixer.in_proj",)
    assert recipe.arms[-1].preset == "mine" and recipe.arms[-1].kind == "ptq"
    assert recipe.arms[:-1] == load_recipe("annie_tiny").arms
    assert main([*given, "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["fixed_bytes"] == 1000
    assert main([*given, "--budget", "30%"]) == ExitCode.USER_ERROR
    assert "at least 3,840 bytes" in capsys.readouterr().err
    assert main([*given, "--out", str(out)]) == ExitCode.USER_ERROR
    assert main([*given, "--budget", "50%", "--preset", "all"]) == ExitCode.USER_ERROR
    assert "a shipped preset has this name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500", 500),
        ("2 kB", None),
        ("18GB", 18 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("40%", 400),
        ("-1GB", None),
        ("", None),
    ],
)
def test_sizes(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(UserError, match="no size"):
            parse_size(text, 1000)
    else:
        assert parse_size(text, 1000) == size


def test_the_same_name_again_replaces_the_preset() -> None:
    once = with_preset(load_recipe("annie_tiny"), "mine", {"bf16": ["a"]})
    twice = with_preset(once, "mine", {"fp8": ["b"]})
    assert twice.quant.presets["mine"].bf16 == () and twice.quant.presets["mine"].fp8 == ("b",)
    assert len(twice.arms) == len(once.arms)
