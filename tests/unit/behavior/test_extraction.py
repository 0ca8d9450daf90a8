"""Scores of extracted JSON: counts by hand, F1 by scikit-free arithmetic, a run against a stub server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat.behavior.checks import Reply, bind
from qat.behavior.extraction import DOMAINS, Field, extraction_suite, read_reply, score, scores_of
from qat.behavior.records import read_results
from qat.behavior.runner import run_suite
from qat.errors import UserError
from tests.unit.behavior.helpers import block
from tests.unit.behavior.stub_server import completion, serving


@pytest.mark.parametrize(
    ("rule", "value", "given", "counts"),
    [
        ("exact", "A-1", "A-1", (1, 0, 0)),
        ("exact", "A-1", "a-1", (0, 1, 1)),
        ("exact", 1, 1.0, (1, 0, 0)),
        ("exact", 1, True, (0, 1, 1)),
        ("exact", True, "true", (0, 1, 1)),
        ("exact", None, None, (0, 0, 0)),
        ("exact", None, "x", (0, 0, 1)),
        ("exact", "x", None, (0, 1, 0)),
        ("exact", {"a": [1]}, {"a": [True]}, (0, 1, 1)),
        ("normalised", "Zoë Brandt", " zoe  brandt.", (1, 0, 0)),
        ("normalised", "Zoë Brandt", "Zoë Brand", (0, 1, 1)),
        ("normalised", "ಮೈಸೂರು", "ಮೈಸೂರು", (1, 0, 0)),
        ("normalised", "7", 7, (0, 1, 1)),
        ("number", 1234.5, "1,234.50", (1, 0, 0)),
        ("number", 1234.5, 1234.6, (0, 1, 1)),
        ("number", 3, True, (0, 1, 1)),
        ("number", 3, "three", (0, 1, 1)),
        ("number", 3, float("nan"), (0, 1, 1)),
        ("set", ["a", "b"], ["B", "A"], (2, 0, 0)),
        ("set", ["a", "b"], ["a", "c"], (1, 1, 1)),
        ("set", ["a", "b"], "a", (1, 1, 0)),
        ("set", ["a"], ["a", "a"], (1, 0, 1)),
        ("set", [], None, (0, 0, 0)),
        ("set", [], ["a"], (0, 0, 1)),
        ("set", ["a"], None, (0, 1, 0)),
    ],
)
def test_counts(rule: Any, value: Any, given: Any, counts: tuple[int, int, int]) -> None:
    assert score(Field(value=value, rule=rule), given) == counts


def test_tolerance_includes_its_end() -> None:
    field = Field(value=0.3, rule="number", tolerance=0.1)
    assert [score(field, given).found for given in (0.2, 0.4, 0.41, 0.19)] == [1, 1, 0, 0]


@pytest.mark.parametrize("made", [{"value": 1, "rule": "set"}, {"value": True, "rule": "number"}, {"tolerance": 1}])
def test_rules_refuse_other_values(made: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="rule"):
        Field.model_validate(made)


def test_a_reply_is_an_object_with_nothing_around_it() -> None:
    assert read_reply(' {"a": 1}\n') == read_reply('```json\n{"a": 1}\n```') == {"a": 1}
    for text in ("", "[1]", 'Here: {"a": 1}', '{"a": 1', "null", "[" * 100_000):
        assert read_reply(text) is None


def test_the_check_names_the_fields() -> None:
    bound = bind("extraction", {"fields": {"a": {"value": 1}, "b": {"value": None}}})

    def detail(text: str) -> str:
        return bound(Reply([{"role": "assistant", "content": text}])).detail

    assert detail('{"a": 1}') == detail('{"a": 1, "b": null}') == ""
    assert detail('{"a": 2, "b": "x", "c": 3}') == "a: 2, not 1; b: 'x', not None; c: 3, not no such field"
    assert "no JSON object" in detail("1")


def test_the_suite_is_large_enough_and_the_same_each_time() -> None:
    suite = extraction_suite()
    assert len(suite.cases) == 96 and len(suite.by_id) == 96 and set(c.category for c in suite.cases) == set(DOMAINS)
    assert suite.sha256 == extraction_suite().sha256 != extraction_suite(seed=1).sha256
    assert extraction_suite(2).cases[2:4] == suite.cases[12:14]
    values = [field["value"] for case in suite.cases for field in case.checks[0].params["fields"].values()]
    assert sum(value is None for value in values) >= 15
    with pytest.raises(UserError):
        extraction_suite(0)


def test_what_the_text_says_stands_in_it() -> None:
    for case in extraction_suite(30).cases:
        text = case.messages[1]["content"].split("\n\nKeys:")[0]
        for field in case.checks[0].params["fields"].values():
            if field["rule"] == "set" or (field["rule"] == "normalised" and field["value"] is not None):
                items = field["value"] if field["rule"] == "set" else [field["value"]]
                assert all(item in text for item in items), case.id


def test_scores_of_a_run(tmp_path: Path) -> None:
    """The stub is right but for one wrong, one left out and one invented field in every case of one domain."""
    suite = extraction_suite(12)
    right = {
        case.messages[1]["content"]: {k: f["value"] for k, f in case.checks[0].params["fields"].items()}
        for case in suite.cases
    }

    def answer(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        made = dict(right[body["messages"][-1]["content"]])
        if "humidity" in made:
            made |= {"humidity": made["humidity"] + 1, "sky": "blue"}
            del made["celsius"]
        return 200, completion("no" if "task" in made else json.dumps(made))

    with serving(answer) as stub:
        summary = run_suite(suite, stub.url, "m", "m", block(), tmp_path / "out.jsonl")
    assert summary.passed == 72
    scores = scores_of(suite.by_id, read_results(tmp_path / "out.jsonl").results.values())
    assert scores["measurement.humidity"].counts == (0, 12, 12)
    assert scores["measurement.celsius"].counts == (0, 12, 0)
    assert scores["measurement.sky"].counts == (0, 0, 12)
    assert scores["measurement.humidity"].f1.rate == 0.0 and scores["recipe.ingredients"].f1.rate == 1.0
    assert scores["reminder.task"].unreadable == 12 and scores["reminder.task"].recall.rate == 0.0
    whole = scores[""]
    found, missed, invented = whole.counts
    precision, recall = found / (found + invented), found / (found + missed)
    assert whole.precision.rate == pytest.approx(precision) and whole.recall.rate == pytest.approx(recall)
    assert whole.f1.rate == pytest.approx(2 * precision * recall / (precision + recall))
    assert whole.unreadable == 12
    assert (whole.f1.low or 0) < (whole.f1.rate or 0) < (whole.f1.high or 0)
