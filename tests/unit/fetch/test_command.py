"""`qat fetch` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat.cli import main
from qat.plan.shape import find_shape
from qat.recipe.schema import BaseBlock
from tests.unit.fetch.conftest import MODEL
from tests.unit.fetch.stub_hub import COMMIT, StubHub

RECIPE = ["--recipe", "annie_qwen", "--set", f"base.model={MODEL}", "--set", "base.family=llama"]
LLAMA = [*RECIPE, "--set", "train.adapter.targets=[attention]"]


def test_from_the_hub_to_a_folder_and_back(hub: StubHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "carried"
    assert main(["fetch", *LLAMA, "--out", str(out), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["revision"] == COMMIT and done["pin"].endswith(COMMIT) and done["use"].endswith(str(out))
    assert main(["fetch", *LLAMA, "--from", str(out), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["hashed"] == len(checked["files"]) == len(done["files"])


def test_config_only_is_enough_to_find_the_sizes(hub: StubHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", *LLAMA, "--config-only"]) == 0
    assert "pin" in capsys.readouterr().out
    assert find_shape(BaseBlock(model=MODEL, family="llama")).config == {"model_type": "llama"}


def test_an_unsuitable_base_is_said_before_its_weights_come(hub: StubHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", *RECIPE, "--set", "base.family=qwen"]) == 2
    assert "no qwen model" in capsys.readouterr().err
    hub.files["config.json"] = b'{"model_type": "llama", "quantization_config": {"quant_method": "modelopt"}}'
    hub.commit = "d" * 40
    assert main(["fetch", *LLAMA]) == 2
    assert "quantized already" in capsys.readouterr().err
    assert not any(name.endswith(".safetensors") for name, _ in hub.ranges)


def test_the_embedded_base_needs_no_fetching(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "--recipe", "annie_tiny"]) == 0
    assert "nothing to fetch" in capsys.readouterr().out


def test_wrong_calls(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["fetch"]) == 2 and "needs a recipe" in capsys.readouterr().err
    assert main(["fetch", *LLAMA, "--from", str(tmp_path), "--config-only"]) == 2
    assert main(["fetch", *LLAMA, "--from", str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err
