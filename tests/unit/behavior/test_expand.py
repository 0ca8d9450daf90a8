"""Variables: every combination against a nested loop, draws that stay, and faults with their place."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from qat.behavior.expand import expand
from qat.behavior.suite import load_suite
from qat.errors import UserError
from tests.unit.behavior.helpers import case, write_suite

HERE = Path(".")


def texts(entry: dict[str, Any], shared: dict[str, Any] | None = None) -> list[str]:
    made, faults = expand(entry, shared or {}, HERE)
    assert faults == []
    return [one["text"] for one in made]


def test_every_combination_the_last_variable_fastest() -> None:
    variables = {"a": ["x", "y"], "b": {"range": [1, 7], "step": 3}, "c": [{"k": "p", "v": 1}, {"k": "q", "v": 2}]}
    found = texts({"id": "i", "variables": variables, "text": "{{a}} {{ b }} {{c.k}}{{c.v}}"})
    assert found == [f"{a} {b} {c}" for a in "xy" for b in (1, 4, 7) for c in ("p1", "q2")]


def test_draws_are_different_stay_and_go_on() -> None:
    entry = {"id": "i", "variables": {"a": {"range": [0, 9]}, "b": {"range": [0, 9]}}, "text": "{{a}}-{{b}}"}
    every = {f"{a}-{b}" for a, b in itertools.product(range(10), range(10))}
    few, many = texts(entry | {"count": 5, "seed": 4}), texts(entry | {"count": 60, "seed": 4})
    assert many[:5] == few
    assert len(set(many)) == 60
    assert set(many) <= every
    assert set(texts(entry | {"count": 100, "seed": 4})) == every
    assert texts(entry | {"count": 5, "seed": 5}) != few
    # Frozen: another order would change the hash of suites that are in use.
    assert few == ["0-2", "2-8", "4-7", "3-6", "2-4"]


def test_a_whole_placeholder_keeps_its_type_and_keys_are_filled() -> None:
    entry = {"id": "i", "variables": {"n": [7], "t": ["f"]}, "x": ["{{n}}", "n={{n}}", {"{{t}}": r"\{{n}}"}]}
    (made,), faults = expand(entry, {}, HERE)
    assert faults == []
    assert made == {"id": "i-001", "x": [7, "n=7", {"f": "{{n}}"}]}


def test_ids_are_numbered_or_filled() -> None:
    made, _ = expand({"id": "w", "variables": {"n": [5, 6]}, "t": "{{n}}"}, {}, HERE)
    assert [one["id"] for one in made] == ["w-001", "w-002"]
    made, _ = expand({"id": "{{n}}", "variables": {"n": [5, 6]}, "t": "{{n}}"}, {}, HERE)
    assert [one["id"] for one in made] == ["5", "6"]


def test_shared_variables_count_only_where_they_are_used(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("Asha\n\n ರವಿ \n", encoding="utf-8")
    shared = {"city": ["Mysuru", "Hassan"], "name": {"lines": "names.txt"}}
    assert expand({"id": "i", "t": "plain {x} "}, shared, tmp_path) == ([{"id": "i", "t": "plain {x} "}], [])
    made, _ = expand({"id": "i", "t": "{{name}}"}, shared, tmp_path)
    assert [one["t"] for one in made] == ["Asha", "ರವಿ"]
    made, _ = expand({"id": "i", "variables": {"city": ["Hampi"]}, "t": "{{city}}"}, shared, tmp_path)
    assert [one["t"] for one in made] == ["Hampi"]


@pytest.mark.parametrize(
    ("entry", "place", "text"),
    [
        ({"variables": {"city": ["a"]}, "t": ["{{city}} {{town}}"]}, ("t", 0), "no variable is named 'town'"),
        ({"variables": {"city": ["a"]}, "t": "{{city}} {{citty}}"}, ("t",), "did you mean 'city'"),
        ({"variables": {"a": ["a"], "b": ["b"]}, "t": "{{a}}"}, ("variables", "b"), "used nowhere"),
        ({"variables": {"a": "x"}, "t": "{{a}}"}, ("variables", "a"), "a list of values"),
        ({"variables": {"a": {"range": [3, 1]}}, "t": "{{a}}"}, ("variables", "a"), "first <= last"),
        ({"variables": {"a": {"lines": "no.txt"}}, "t": "{{a}}"}, ("variables", "a"), "cannot be read"),
        ({"variables": {"a": [{"k": 1}]}, "t": "{{a.v}}"}, ("t",), "without 'v'"),
        ({"variables": {"a": [{"k": 1}]}, "t": "{{a}}"}, ("t",), "name one, as {{a.field}}"),
        ({"variables": {"a": ["a"]}, "t": "{{a}}", "count": 2}, ("count",), "2 cases of 1 combinations"),
        ({"variables": {"a": ["a"]}, "t": "{{a}}", "count": True}, ("count",), "no whole number"),
        ({"variables": {"a": {"range": [1, 20000]}}, "t": "{{a}}"}, ("variables",), "20,000 combinations"),
        ({"t": "x", "count": 2}, ("count",), "no variables"),
        ({"variables": ["a"], "t": "x"}, ("variables",), "not a mapping"),
    ],
)
def test_faults_name_their_place(entry: dict[str, Any], place: tuple[str | int, ...], text: str) -> None:
    made, faults = expand({"id": "i"} | entry, {}, HERE)
    assert made == []
    assert [(found, text in problem) for found, problem in faults] == [(place, True)]


def test_a_suite_with_variables(tmp_path: Path) -> None:
    wide = case(
        0,
        variables={"n": {"range": [1, 3]}},
        messages=[{"role": "user", "content": "n {{n}}"}],
        checks=[{"check": "max_sentences", "n": "{{n}}"}],
    )
    suite = load_suite(write_suite(tmp_path, [wide, case(1)]))
    assert [c.id for c in suite.cases] == ["c-000-001", "c-000-002", "c-000-003", "c-001"]
    assert [c.messages[-1]["content"] for c in suite.cases[:3]] == ["n 1", "n 2", "n 3"]
    assert [c.checks[0].params for c in suite.cases[:3]] == [{"n": 1}, {"n": 2}, {"n": 3}]
    with pytest.raises(UserError, match=r"line \d+: cases\[0\] \(c-000\)\.messages\.0\.content: no variable is named"):
        load_suite(write_suite(tmp_path, [case(0, messages=[{"role": "user", "content": "{{x}}"}])]))
