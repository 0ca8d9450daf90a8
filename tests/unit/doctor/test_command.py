"""`qat doctor`: exit codes, text and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat.cli import main
from tests.unit.doctor.planting import EMBEDDINGS, TINY_BASE, WEIGHTS, copy_base, edit_header, edit_tensors
from tests.unit.doctor.test_planted import rename

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return copy_base(tmp_path / "checkpoint")


def test_a_clean_checkpoint(capsys: Capture) -> None:
    assert main(["doctor", str(TINY_BASE)]) == 0
    text = capsys.readouterr().out
    assert "0 errors, 0 warnings, 0 notes; 133 tensors" in text
    # 64 expert matrices of 192 x 128 in two bytes each
    assert "routed experts" in text and "3,145,728" in text
    assert main(["doctor", str(TINY_BASE), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["clean"] and result["findings"] == [] and result["tensors"] == 133
    assert sum(row["bytes"] for row in result["census"]) == result["bytes"]


def test_findings_exit_with_1_and_notes_do_not(checkpoint: Path, capsys: Capture) -> None:
    edit_header(lambda header: header.pop("__metadata__"))(checkpoint)
    assert main(["doctor", str(checkpoint)]) == 0
    assert "metadata_format" in capsys.readouterr().out
    edit_tensors(lambda tensors: tensors.update(ghost=tensors[EMBEDDINGS][0].clone()))(checkpoint)
    assert main(["doctor", str(checkpoint), "--base", str(TINY_BASE)]) == 1
    assert "tensor_extra" in capsys.readouterr().out
    assert main(["doctor", str(checkpoint), "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["code"] == "tensor_extra" and finding["severity"] == "warning" and "ghost" in finding["problem"]
    assert all(isinstance(text, str) and text for text in finding.values())


def test_what_is_unreadable_exits_with_2(tmp_path: Path, capsys: Capture) -> None:
    for arguments in ([str(tmp_path / "absent")], [str(tmp_path)], [str(TINY_BASE), "--base", str(tmp_path)]):
        assert main(["doctor", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and not captured.out


def test_deep_reads_the_bytes(checkpoint: Path, capsys: Capture) -> None:
    edit_tensors(lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))(checkpoint)
    assert main(["doctor", str(checkpoint)]) == 0
    assert main(["doctor", str(checkpoint), "--deep"]) == 1
    assert "tensor_not_finite" in capsys.readouterr().out


def test_fix_judges_the_copy(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    rename(EMBEDDINGS, "backbone.embedding.weight")(checkpoint)
    assert main(["doctor", str(checkpoint), "--fix", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [finding["code"] for finding in result["findings"]] == ["tensor_renamed"]
    assert result["left"] == [] and "renamed" in result["repaired"][0]
    assert main(["doctor", str(tmp_path / "out"), "--base", str(TINY_BASE)]) == 0
    capsys.readouterr()
    assert main(["doctor", str(checkpoint), "--fix", str(tmp_path / "out")]) == 2, "it is not overwritten"


def test_fix_says_what_it_could_not_mend(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    edit_tensors(lambda tensors: tensors.pop("lm_head.weight"))(checkpoint)
    assert main(["doctor", str(checkpoint), "--fix", str(tmp_path / "out")]) == 1
    assert "nothing was written" in capsys.readouterr().out and not (tmp_path / "out").exists()
    edit_header(lambda header: header.pop("__metadata__"))(checkpoint)
    assert main(["doctor", str(checkpoint), "--fix", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().out
    assert "lm_head_missing" in text.partition("left in")[2] and (tmp_path / "out" / WEIGHTS).exists()


def test_hostile_names_do_not_reach_the_terminal(checkpoint: Path, capsys: Capture) -> None:
    edit_header(lambda header: header.update({"\x1b[2J\ud800": header.pop("lm_head.weight")}))(checkpoint)
    assert main(["doctor", str(checkpoint), "--base", str(TINY_BASE)]) == 1
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\\x1b[2J\\ud800" in text.replace("\n", "").replace(" ", "")
