"""The reference of the checks: complete, fresh, and what `qat suite checks` shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat.behavior.checks import bind
from qat.behavior.reference import describe, page
from qat.cli import main

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_is_fresh() -> None:
    assert (ROOT / "docs" / "checks.md").read_text(encoding="utf-8") == page(), "run python scripts/make_docs.py"


def test_parameters_by_hand() -> None:
    found = describe("no_call")
    assert [(each.name, each.kind, each.default) for each in found.parameters] == [
        ("tools", "list: text or null", "null")
    ]
    kinds = {each.name: (each.kind, each.default) for each in describe("judge").parameters}
    assert kinds["accept"] == ("`win` or `tie`", '"tie"')
    assert kinds["criterion"] == ("text", None) and kinds["timeout_s"] == ("number", "120.0")
    assert describe("no_emoji").parameters == []
    assert "Raises" not in describe("judge").text


def test_a_parameter_that_the_page_calls_required_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suite", "checks", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed) > 25 and all(each["text"] for each in listed)
    for each in listed:
        if any(parameter["default"] is None for parameter in each["parameters"]):
            with pytest.raises(ValueError, match="check"):
                bind(each["name"], {})


def test_one_check_and_a_slip(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suite", "checks", "max_words"]) == 0
    assert "n: whole number, required" in capsys.readouterr().out
    assert main(["suite", "checks", "max_word"]) == 2
    assert "did you mean 'max_words'?" in capsys.readouterr().err
