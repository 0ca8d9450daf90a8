from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qat.behavior.records import Case, CaseResult, FailedCheck, ResultMeta, meta_path
from qat.behavior.suite import load_suite
from qat.data.duplicates import find_leaks, near_pairs, normalise_turn, user_turns
from qat.data.generate import lexicon
from qat.data.generate.adversarial import briefs, by_grammar, failures, names_and_numbers, shape_of, shape_of_case
from qat.data.generate.conversations import cases, conversations
from qat.data.generate.teacher import generate_with_teacher
from qat.errors import UserError
from tests.unit.behavior.stub_server import completion, serving
from tests.unit.data.teaching import annie, by_parts, part_of, small_suite, teacher


def result(case: str, category: str, failed: dict[str, str], seed: int = 0, error: str | None = None) -> str:
    return CaseResult(
        case=case,
        category=category,
        arm="ptq",
        sampling="greedy",
        seed=seed,
        produced=[],
        passed=not failed and error is None,
        failed_checks=[FailedCheck(check=name, detail=detail) for name, detail in failed.items()],
        latency_s=0.1,
        completion_tokens=1,
        error=error,
    ).model_dump_json()


def write_results(path: Path, lines: list[str], **meta: Any) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    if meta:
        described = ResultMeta(version="1", model="m", max_tokens=8, samplings={}, **meta)
        meta_path(path).write_text(described.model_dump_json(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_suite("annie_tiny")


@pytest.fixture
def results(tmp_path: Path, tiny: Any) -> Path:
    """Every fourth case failed, one of them under two seeds; one ended in an error."""
    lines = []
    for number, case in enumerate(tiny.cases[:60]):
        failed = {"no_emoji": "😀"} if number % 4 == 0 else {}
        lines.append(result(case.id, case.category, failed))
        if number == 4:
            lines.append(result(case.id, case.category, {"max_words": "30"}, seed=1))
    last = tiny.cases[61]
    lines.append(result(last.id, last.category, {}, error="timeout: 300 s"))
    return write_results(tmp_path / "ptq.jsonl", lines, suite=tiny.name, sha256=tiny.sha256)


def test_failures_are_cases_that_failed_and_not_errors(tiny: Any, results: Path) -> None:
    found = failures(results, tiny)
    assert [failure.case.id for failure in found] == [case.id for case in tiny.cases[:60:4]]
    assert found[1].failed == {"no_emoji": "😀", "max_words": "30"}


def test_new_conversations_have_the_failed_cases_shape_and_nothing_of_the_suite(tiny: Any, results: Path) -> None:
    found = failures(results, tiny)
    made, report = by_grammar(annie(), tiny, found, per_case=3, seed=7)
    assert report.complete and len(made) == 3 * 15 and set(report.made.values()) == {3}
    of_case = {failure.case.id: failure.case for failure in found}
    for conversation in made:
        case = of_case[conversation["id"].removeprefix("again-").rsplit("-", 1)[0]]
        assert conversation["category"] == case.category
        assert len(user_turns(conversation)) == sum(m["role"] == "user" for m in case.messages)
    # Another library of the house than the one that chose them: equal turns, then nearly equal ones.
    records = [{"id": case.id, "messages": case.messages} for case in tiny.cases]
    assert find_leaks(made, records) == []
    ours = {normalise_turn(turn) for each in made for turn in user_turns(each)}
    theirs = {normalise_turn(turn) for each in records for turn in user_turns(each)}
    turns = [*sorted(ours), *sorted(theirs)]
    assert not [pair for pair in near_pairs(turns) if pair.first < len(ours) <= pair.second]


def test_other_names_and_facts_than_the_suites(tiny: Any, results: Path) -> None:
    made, _ = by_grammar(annie(), tiny, failures(results, tiny), per_case=3, seed=7)

    def named(records: list[Any]) -> set[str]:
        words = {word for each in records for turn in user_turns(each) for word in re.findall(r"[A-Z]\w+", turn)}
        return words & {*lexicon.PEOPLE, *lexicon.TOWNS}

    asked, taught = named([{"messages": case.messages} for case in tiny.cases]), named(made)
    assert len(asked) > 20 and len(taught) > 10 and not asked & taught


def test_same_seed_same_conversations_and_known_data_is_not_repeated(tiny: Any, results: Path) -> None:
    found = failures(results, tiny)[:5]
    first, _ = by_grammar(annie(), tiny, found, per_case=2, seed=7)
    assert by_grammar(annie(), tiny, found, per_case=2, seed=7)[0] == first
    assert by_grammar(annie(), tiny, found, per_case=2, seed=8)[0] != first
    second, report = by_grammar(annie(), tiny, found, per_case=2, seed=7, known=first)
    turns = {normalise_turn(turn) for each in first for turn in user_turns(each)}
    assert report.complete and not turns & {normalise_turn(turn) for each in second for turn in user_turns(each)}
    assert report.passed_over["near other training data"] >= len(first)


def test_shape_of_a_case_is_that_of_the_conversation_it_becomes() -> None:
    """The grammars make cases and conversations from the same plans: the same shapes on both sides."""
    made = {shape_of(each) for each in conversations(annie(), 1000, 3)}
    asked = {shape_of_case(Case.model_validate(each)) for each in cases(annie(), 1000, 5)}
    short = "mixed_multiturn"  # of so many shapes that neither side shows all of them
    assert {shape for shape in asked if shape.category != short} == {shape for shape in made if shape.category != short}
    memory = [shape for shape in asked if shape.category == "honest_memory"]
    assert {shape.calls for shape in memory} == {(("search_memory", True),), (("search_memory", False),)}
    assert sum(shape.category == short for shape in asked & made) > 10


def test_results_of_another_suite_or_without_failure_are_refused(tmp_path: Path, tiny: Any) -> None:
    case = tiny.cases[0]
    good = write_results(tmp_path / "good.jsonl", [result(case.id, case.category, {})])
    with pytest.raises(UserError, match="nothing to learn"):
        failures(good, tiny)
    strange = write_results(tmp_path / "strange.jsonl", [result("x-1", "x", {"no_emoji": ""})])
    with pytest.raises(UserError, match="a case that the suite does not"):
        failures(strange, tiny)
    line = [result(case.id, case.category, {"no_emoji": ""})]
    other = write_results(tmp_path / "other.jsonl", line, suite="mine", sha256="0" * 64)
    with pytest.raises(UserError, match="of another suite"):
        failures(other, tiny)


def test_names_and_numbers() -> None:
    turns = [
        "What did I say about Malvek's bike from Hassan? I'm sure it cost 4200.",
        "Ok. Then call Dr. Rao at 7pm, I said",
    ]
    assert names_and_numbers(turns) == {"malvek", "hassan", "4200", "dr", "rao", "7pm"}
    assert names_and_numbers(["ನನ್ನ ಬೈಕ್ ಬಗ್ಗೆ ಏನು ಹೇಳಿದ್ದೆ?"]) == frozenset()


def test_a_teacher_gets_the_lesson_and_may_not_reuse_the_case(tmp_path: Path) -> None:
    suite = small_suite(tmp_path)
    lines = [result("memory-1", "honest_memory", {"mentions": "none of 'no memory'"})]
    found = failures(write_results(tmp_path / "arm.jsonl", lines), suite)
    wanted = briefs(annie(), found, 1, teacher("http://127.0.0.1:9"))
    assert wanted[0].forbidden == {"hassan"} and wanted[0].name == "again-memory-1"
    turns = iter(["Was there ever a word from me on the old boat in Hassan?", "Have I ever spoken of a clay lamp?"])

    def user(body: dict[str, Any], number: int) -> dict[str, Any]:
        return completion(json.dumps({"turns": [next(turns)], "world": "nothing"}))

    with serving(by_parts(user=user)) as stub:
        settings = teacher(stub.url)
        report = generate_with_teacher(settings, annie(), suite, tmp_path / "t.jsonl", wanted)
    assert report.complete and report.rejected == {"reuses the case": 1}
    asked = next(body["messages"][0]["content"] for body in stub.bodies if part_of(body) == "user")
    assert "green bike" in asked and "none of 'no memory'" in asked
    assert json.loads((tmp_path / "t.jsonl").read_text())["id"] == "teacher-again-memory-1-00001"
