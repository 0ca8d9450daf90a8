"""`baseline` and `test --power` from the command line, on a run folder made by hand."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from qat.behavior.records import CaseResult, ResultMeta
from qat.behavior.suite import load_suite
from qat.cli import main
from qat.recipe.load import load_recipe
from qat.runs import Run

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of annie_tiny as its behaviour stages leave it: all pass, but for the PTQ arm, which passes half."""
    monkeypatch.chdir(tmp_path)
    with Run.open(load_recipe("annie_tiny"), Path("runs")) as opened:
        folder = opened.path("behavior")
    folder.mkdir()
    suite = load_suite("annie_tiny")
    for arm in ("bf16", "nvfp4_all_ptq", "nvfp4_all_qad"):
        lines = [
            CaseResult(
                case=case.id, category=case.category, arm=arm, sampling="greedy", seed=0, produced=[],
                passed=arm != "nvfp4_all_ptq" or index < 60, failed_checks=[], latency_s=0.1, completion_tokens=3,
            ).model_dump_json() + "\n"
            for index, case in enumerate(suite.cases)
        ]  # fmt: skip
        (folder / f"{arm}.jsonl").write_text("".join(lines))
        meta = ResultMeta(
            suite=suite.name, version=suite.version, sha256=suite.sha256, model=arm, max_tokens=96,
            samplings={"greedy": {"temperature": 0.0, "top_p": 1.0}},
        )  # fmt: skip
        (folder / f"{arm}.meta.json").write_text(meta.model_dump_json())


@pytest.mark.usefixtures("ran")
def test_save_list_show(capsys: Capture) -> None:
    assert main(["baseline", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["baseline", "save", "v1", "bf16", "--json"]) == 0
    saved = json.loads(capsys.readouterr().out)
    assert saved["baseline"] == "baselines/v1.json" and saved["arm"] == "bf16"
    assert main(["baseline", "save", "v1", "runs/annie_tiny/behavior/nvfp4_all_ptq.jsonl"]) == 2
    assert "--replace" in capsys.readouterr().err
    assert main(["baseline", "save", "v2", "runs/annie_tiny/behavior/nvfp4_all_ptq.jsonl"]) == 0
    capsys.readouterr()
    assert main(["baseline", "list", "--json"]) == 0
    assert [(e["name"], e["passes"][0]["passed"]) for e in json.loads(capsys.readouterr().out)] == [
        ("v1", 120),
        ("v2", 60),
    ]
    assert main(["baseline", "list"]) == 0
    assert "greedy/0: 60/120" in capsys.readouterr().out
    assert main(["baseline", "show", "v2"]) == 0
    shown = capsys.readouterr().out
    assert "60/120" in shown and "greedy, seed 0 fails: " in shown
    assert main(["baseline", "show", "v2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rates"]["greedy"]["overall"]["passed"] == 60
    assert main(["baseline", "show", "v3"]) == 2
    assert "baselines here: v1, v2" in capsys.readouterr().err


@pytest.mark.usefixtures("ran")
def test_check_exits_with_the_verdict(capsys: Capture) -> None:
    assert main(["baseline", "save", "v1", "bf16"]) == 0
    same = ["baseline", "check", "nvfp4_all_qad", "v1"]
    assert main([*same, "--max-drop", "0.1", "--junit", "out/j.xml", "--summary", "out/s.md"]) == 0
    assert "verdict: PASS" in capsys.readouterr().out
    assert len(list(ElementTree.parse("out/j.xml").getroot().iter("testcase"))) == 120
    assert Path("out/s.md").read_text().startswith("## ✅ PASS: nvfp4_all_qad")
    assert main(same) == 3  # 120 cases cannot show "not worse by more than 3 points"
    assert main(["baseline", "check", "nvfp4_all_ptq", "v1", "--json"]) == 1
    capsys.readouterr()
    assert main([*same, "--max-drop", "0.1", "--look", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["look"]["confidence"] == pytest.approx(1 - 0.05 / 6)
    assert main([*same, "--looks", "3"]) == 2
    assert "--look" in capsys.readouterr().err
    assert main([*same, "--sampling", "warm"]) == 2
    assert "no answers under sampling 'warm'" in capsys.readouterr().err


@pytest.mark.usefixtures("ran")
def test_results_of_a_suite_of_ones_own_need_its_file(capsys: Capture) -> None:
    path = Path("runs/annie_tiny/behavior/bf16.meta.json")
    path.write_text(path.read_text().replace('"annie_tiny"', '"mine"'))
    assert main(["baseline", "save", "v1", "runs/annie_tiny/behavior/bf16.jsonl"]) == 2
    assert "--suite" in capsys.readouterr().err
    assert main(["baseline", "save", "v1", "runs/annie_tiny/behavior/bf16.jsonl", "--suite", "annie_tiny"]) == 0


def power(capsys: Capture, *arguments: str) -> Any:
    assert main(["test", "--power", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_power_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    found = power(capsys, "--recipe", "annie_tiny")
    assert list(tmp_path.iterdir()) == []
    assert (found["cases"], found["repeats"], found["drop"], found["power"]) == (120, 1, 0.1, 0.8)
    assert found["assumed"]["flips"] == 0.02 and "assumed" in found["assumed"]["source"]
    assert [row["repeats"] for row in found["needed"]] == [1]
    larger = power(capsys, "--recipe", "annie_tiny", "--drop", "0.03", "--flips", "0.05", "--power-target", "0.9")
    assert larger["needed"][0]["detect"] > 1000 > found["needed"][0]["detect"]
    assert main(["test", "--power", "--recipe", "annie_tiny"]) == 0
    assert "annie_tiny as it is asked, 120 cases x 1" in capsys.readouterr().out
    assert main(["test", "--recipe", "annie_tiny", "--drop", "0.1"]) == 2
    assert "belong to --power" in capsys.readouterr().err


def test_power_of_a_suite_without_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """The gate's own defaults take the place of a recipe's; a recipe beside the suite gives its own."""
    monkeypatch.chdir(tmp_path)
    alone = power(capsys, "--suite", "annie_tiny")
    assert (alone["suite"], alone["cases"], alone["drop"]) == ("annie_tiny", 120, 0.03)
    assert alone["needed"] == power(capsys, "--recipe", "annie_tiny", "--drop", "0.03", "--set",
                                    "behavior.gate.max_drop=0.03")["needed"]  # fmt: skip
    assert power(capsys, "--recipe", "annie_tiny", "--suite", "clerk_core")["cases"] == 48
    assert main(["test", "--power", "--suite", "annie_tiny", "--run", "r"]) == 2


@pytest.mark.usefixtures("ran")
def test_power_from_what_was_measured(capsys: Capture) -> None:
    found = power(capsys)
    assert found["assumed"]["source"] == "measured: 0 of 120 pairs of nvfp4_all_qad and bf16 differ"
    assert main(["baseline", "save", "v1", "bf16"]) == 0
    capsys.readouterr()
    assert main(["test", "--power", "--baseline", "v1"]) == 2
    assert "no case was asked twice" in capsys.readouterr().err
