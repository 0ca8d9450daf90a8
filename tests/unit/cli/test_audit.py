"""`qat data audit` as it is called, on parts that need no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat.cli import main
from qat.data.generate import conversations
from qat.data.load import to_line
from qat.data.schema import load_persona

Capture = pytest.CaptureFixture[str]
PARTS = ["--only", "schema", "--only", "replies", "--only", "duplicates"]


def made(path: Path, count: int = 20) -> list[Any]:
    records = conversations(load_persona("annie_tiny"), count, seed=1)
    write(path, records)
    return records


def write(path: Path, records: list[Any]) -> None:
    path.write_text("".join(to_line(record) + "\n" for record in records), "utf-8")


def test_generated_conversations_pass(tmp_path: Path, capsys: Capture) -> None:
    made(tmp_path / "a.jsonl")
    assert main(["data", "audit", str(tmp_path / "a.jsonl"), *PARTS, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["faults"] == [] and result["conversations"] == 20
    assert result["replies"]["suites"] == ["annie_tiny"] and result["replies"]["failing"] == 0
    assert "tokens" not in result


def test_a_failing_reply_is_refused_and_can_be_accepted(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "a.jsonl"
    records = made(path)
    records[3]["messages"][-1]["content"] = "Sure 😀"
    write(path, records)
    assert main(["data", "audit", str(path), *PARTS, "--html", str(tmp_path / "a.html")]) == 1
    shown = capsys.readouterr().out
    assert "replies fail the suite's check no_emoji  [no_emoji]" in shown and "line 4" in shown
    assert "no_emoji" in (tmp_path / "a.html").read_text("utf-8")
    assert main(["data", "audit", str(path), *PARTS, "--accept", "no_emoji"]) == 0
    assert "accepted: 1 of" in capsys.readouterr().out
    assert main(["data", "audit", str(path), *PARTS, "--set", "data.accept=[no_emoji]"]) == 0
    assert main(["data", "audit", str(path), "--only", "schema"]) == 0


def test_other_forms_and_broken_lines(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "broken.jsonl").write_text("{\n")
    assert main(["data", "audit", str(tmp_path / "broken.jsonl"), "--only", "schema"]) == 1
    assert "line 1: malformed JSON" in capsys.readouterr().out
    (tmp_path / "a.json").write_text('[{"instruction": "Add.", "output": "5"}]')
    accepted = [word for code in ("system_prompt", "tools") for word in ("--accept", code)]
    assert main(["data", "audit", str(tmp_path / "a.json"), "--only", "schema", *accepted]) == 0
    assert "alpaca" in capsys.readouterr().out
    assert main(["data", "audit", str(tmp_path / "a.json"), "--only", "schema", "--form", "openai"]) == 1
    assert "messages is missing" in capsys.readouterr().out
    assert main(["data", "audit", str(tmp_path / "none.jsonl"), "--only", "schema"]) == 2
    assert "cannot be read" in capsys.readouterr().err
