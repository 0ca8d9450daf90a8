"""The Markdown summary, read back as a reader's Markdown parser does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from qat.behavior.gate import judge
from qat.behavior.summary import markdown
from tests.unit.behavior.helpers import small_suite
from tests.unit.behavior.test_gate import arm, gate


def tables(text: str) -> list[list[list[str]]]:
    """Tables as rows of cell texts."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt().enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level > 1:
            found[-1][-1].append(token.content)
    return found


@pytest.fixture
def verdict(tmp_path: Path) -> dict[str, Any]:
    suite = small_suite(tmp_path, 60)
    files = {
        "old": arm(tmp_path, suite, "old", lambda n, s: n != 1),
        "new": arm(tmp_path, suite, "new", lambda n, s: n not in range(0, 50, 2)),
    }
    return judge(files, suite, gate()).to_json()


def test_tables_hold_the_numbers_of_the_verdict(verdict: dict[str, Any]) -> None:
    text = markdown(verdict)
    assert text.startswith("## ❌ FAIL: new on small 1\n")
    arms, comparisons, categories = tables(text)
    assert arms[1][:3] == ["old", "98.3 (91.1 to 99.7)", "60"]  # Wilson of 59 of 60
    assert arms[2][0::2] == ["new", "60", "wilson"]
    assert comparisons[1][0] == "new − old" and comparisons[1][1].startswith("-40.0 (")
    assert comparisons[1][2:5] == ["60", "25 / 1", "-- / --"]
    assert {row[0]: row[4] for row in categories[1:]} == {"k0": "25 / 0", "k1": "0 / 1"}
    assert "`c-000`, `c-002`" in text and "and 5 more" in text
    assert all(f"- {reason}" in text for reason in verdict["reasons"])
    assert "2.5 % at most, and of 11.9 %" in text


def test_text_of_strangers_breaks_no_table(verdict: dict[str, Any]) -> None:
    verdict["arms"] = {"a|b <img src=x>\nz": verdict["arms"]["old"], "new": verdict["arms"]["new"]}
    verdict["reasons"] = ["the server said <script>alert(1)</script>\n\n# heading"]
    text = markdown(verdict)
    assert tables(text)[0][1][0] == "a|b &lt;img src=x> z"
    assert "<script" not in text and "\n# heading" not in text


def test_too_few_and_asked_twice(tmp_path: Path, verdict: dict[str, Any]) -> None:
    verdict["comparisons"][0]["self_flips"] = {"flips": 2, "pairs": 60, "rate": 0.03, "low": 0, "high": 1}
    verdict["comparisons"][0]["difference"] = None
    verdict["look"] = {"number": 2, "planned": None, "confidence": 0.99}
    text = markdown(verdict)
    assert "| too few | 60 | 25 / 1 | 2 of 60 / -- |" in text
    assert "Look 2 (any number may follow)" in text and "Intervals: 99 %" in text
