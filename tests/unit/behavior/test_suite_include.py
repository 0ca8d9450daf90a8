"""Suites of suites with their pins, and faults with the lines that they stand on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qat.behavior.suite import Suite, load_suite
from qat.errors import UserError
from tests.unit.behavior.helpers import TOOLS, case, write_suite


def outer(folder: Path, cases: list[dict[str, Any]], **pin: Any) -> Path:
    """A suite that includes `suite.yaml` beside it."""
    path = folder / "outer.yaml"
    include = [{"suite": "./suite.yaml", "version": "1"} | pin]
    content = {"name": "outer", "version": "1", "persona": "./p.yaml", "include": include, "cases": cases}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def inner(folder: Path) -> Suite:
    return load_suite(write_suite(folder, [case(0), case(1)]))


@pytest.mark.parametrize("digits", [12, 64])
def test_included_cases_come_first_and_are_the_same(tmp_path: Path, digits: int) -> None:
    part = inner(tmp_path)
    whole = load_suite(outer(tmp_path, [case(2)], sha256=part.sha256[:digits]))
    assert whole.cases[:2] == part.cases
    assert [c.id for c in whole.cases] == ["c-000", "c-001", "c-002"]
    assert set(whole.checks) == set(whole.by_id)
    assert whole.sha256 not in ("", part.sha256)
    assert load_suite(outer(tmp_path, [], sha256=part.sha256)).sha256 == part.sha256


@pytest.mark.parametrize(
    ("pin", "text"),
    [
        ({"version": "2"}, "is of version '1', not '2'"),
        ({"sha256": "0" * 64}, "asks other questions than those pinned; its sha256 is "),
        ({"sha256": "xyz"}, "sha256"),
    ],
)
def test_another_suite_than_the_pinned_one_is_refused(tmp_path: Path, pin: dict[str, str], text: str) -> None:
    part = inner(tmp_path)
    with pytest.raises(UserError) as fault:
        load_suite(outer(tmp_path, [case(2)], **({"sha256": part.sha256} | pin)))
    assert text in str(fault.value)
    assert "include[0]" in str(fault.value)


def test_two_cases_of_one_id_across_suites(tmp_path: Path) -> None:
    part = inner(tmp_path)
    with pytest.raises(UserError, match=r"cases\[0\] \(c-001\).*second case of this id"):
        load_suite(outer(tmp_path, [case(1)], sha256=part.sha256))


def test_a_suite_that_includes_itself(tmp_path: Path) -> None:
    path = outer(tmp_path, [], suite="./outer.yaml", sha256="0" * 64)
    write_suite(tmp_path, [case(0)])
    with pytest.raises(UserError, match="includes itself"):
        load_suite(path)


def test_every_fault_stands_at_its_line(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"name": "p", "system_prompt": "P.", "tools": TOOLS, "facts": {}}))
    text = """\
name: lines
version: "1"
persona: ./p.yaml
cases:
  - id: one
    category: k
    messages: [{role: user, content: hi}]
    checks:
      - {check: no_emoji}
      - {check: no_emojis}
  - id: two
    category: k
    colour: red
    turns:
      - user: a
        tool_results: {fly: x}
      - user: b
        checks:
          - {check: max_sentences, m: 1}
    checks: [{check: no_emoji}]
  - id: one
    category: k
    messages:
      - {role: system, content: s}
      - {role: user, content: "{{town}}"}
    weight: 1
    weight: 2
    checks: [{check: no_emoji}]
  - id: four
    category: k
    messages: [{role: user, content: hi}]
    tool_results:
      search_memory:
        - {arguments: {query: {contain: x}}, result: y}
    checks: [{check: no_emoji}]
  - id: four
    category: k
    turns: [{user: a, tool_results: {fly: x}}, {user: b, checks: [{check: max_sentences, m: 1}]}]
    checks: [{check: no_emoji}]
"""
    (tmp_path / "suite.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as fault:
        load_suite(tmp_path / "suite.yaml")
    found = [line.strip().removeprefix("value:").strip() for line in str(fault.value).splitlines() if "line " in line]
    wanted = [
        ("10", "cases[0] (one).checks.1: no check is named 'no_emojis'; did you mean 'no_emoji'?"),
        ("13", "cases[1] (two).colour: unknown key"),
        ("25", "cases[2] (one).messages.1.content: no variable is named 'town'; known: none"),
        ("27", "cases.2.weight: this key stands twice"),
        ("33", "cases[3] (four).tool_results.search_memory: arguments.query"),
        ("36", "cases[4] (four).id: a second case of this id, 'four'; the first: line 29"),
        ("38", "cases[4] (four).turns.1.checks.0: check max_sentences: "),
        ("38", "cases[4] (four).turns.0.tool_results.fly: tool_results names 'fly', which is not offered"),
    ]
    assert [line.startswith(f"line {number}: {text}") for line, (number, text) in zip(found, wanted, strict=True)] == [
        True
    ] * len(wanted), found


def test_the_hash_of_old_cases_leaves_new_keys_out(tmp_path: Path) -> None:
    """By the first format's own rule: SHA-256 of canonical JSON of these keys alone."""
    (found,) = (suite := load_suite(write_suite(tmp_path, [case(0)]))).cases
    keys = ("id", "category", "messages", "tools", "tool_results", "weight", "tags")
    plain = {key: getattr(found, key) for key in keys}
    plain["checks"] = [{"check": spec.check, **spec.params} for spec in found.checks]
    text = json.dumps([plain], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert suite.sha256 == hashlib.sha256(text.encode()).hexdigest()
    for more in ({"reference": "r"}, {"unscripted": "x"}):
        assert load_suite(write_suite(tmp_path, [case(0, **more)])).sha256 != suite.sha256
    turned = [case(0, messages=[{"role": "system", "content": "s"}], turns=[{"user": text}]) for text in "ab"]
    assert load_suite(write_suite(tmp_path, turned[:1])).sha256 != load_suite(write_suite(tmp_path, turned[1:])).sha256


SHIPPED = {
    "annie_core": "6d055954a14eef0787fb43d2b2a398619cb3032026e755e655f53987322c8cc5",
    "annie_tiny": "22229e4ea89461a4ff0ab57835c103cf8e1f34bb0da0884ad3a8e068dfeb7b4b",
    "annie_tiny_full": "e9a24803fdc6a0bfe998370a396367da34c450c5850f7eec38484f7812ef8319",
}


def test_shipped_suites_ask_what_their_published_answers_answer() -> None:
    """Another hash is another suite: raise its version, and measure again what docs/benchmarks says of it."""
    assert {name: load_suite(name).sha256 for name in SHIPPED} == SHIPPED
