"""Each stage writes into the receipt which defects of the libraries it found, patched or went around."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat.cli import main
from qat.patches import registry
from qat.patches.stages import AROUND

from .conftest import FakeStages


def test_every_stage_notes_its_patches(stages: FakeStages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = registry.Handled(
        name="peft_mamba_out_proj", affects="peft", versions="peft 0", before="needed", after="applied", detail="seen"
    )
    monkeypatch.setattr(registry, "_HANDLED", {done["name"]: done})  # what the real training would have done
    assert main(["run", "--recipe", "annie_tiny"]) == 0
    records = json.loads(Path("runs/annie_tiny/receipt.json").read_text())["stages"]
    for stage in ("sft", "calibrate/all", "distill/all", "divergence"):
        assert records[stage]["notes"]["patches"] == [done]
    for stage, around in (("data", "data"), ("export/bf16", "export"), ("behavior/bf16", "serve/cpu")):
        noted = records[stage]["notes"]["patches"]
        assert [entry["name"] for entry in noted] == list(AROUND[around])
        assert {(entry["before"], entry["after"]) for entry in noted} == {("unknown", "avoided")}
