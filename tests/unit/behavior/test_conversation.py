"""Scripts played against a model that answers from a list: turns, results of tools, and where a conversation ends."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from qat.behavior.answers import AnsweredBy
from qat.behavior.conversation import MAX_TOOL_ROUNDS, Talk, converse
from qat.behavior.runner import run_suite
from qat.behavior.suite import Suite, load_suite
from tests.unit.behavior.helpers import block, case, write_suite
from tests.unit.behavior.stub_server import call, completion, serving
from tests.unit.behavior.test_runner import Quiet, lines

Message = dict[str, Any]


def said(text: str) -> Message:
    return {"role": "assistant", "content": text, "finish_reason": "stop"}


def calls(*queries: str) -> Message:
    made = [call("search_memory", json.dumps({"query": query})) for query in queries]
    return {"role": "assistant", "content": None, "tool_calls": made, "finish_reason": "tool_calls"}


def suite_of(folder: Path, **more: Any) -> Suite:
    return load_suite(write_suite(folder, [case(0, **more)]))


def play(suite: Suite, *answers: Message) -> tuple[Talk, list[list[Message]]]:
    """The talk, and the messages that each answer was asked with."""
    given, asked, talk = iter(answers), [], Talk()

    async def ask(messages: list[Message]) -> AnsweredBy:
        asked.append(list(messages))
        return AnsweredBy(next(given), 3, 0.25, 0.125)

    asyncio.run(converse(suite.cases[0], suite.script(suite.cases[0]), ask, talk))
    return talk, asked


def test_turns_are_played_in_order_with_all_that_was_said_before(tmp_path: Path) -> None:
    turns = [{"user": "one", "checks": [{"check": "mentions", "all": ["eins"]}]}, {"user": "two"}]
    suite = suite_of(tmp_path, messages=[], turns=turns)
    talk, asked = play(suite, said("eins"), said("zwei"))
    system = {"role": "system", "content": "You are P."}
    first = [system, {"role": "user", "content": "one"}]
    assert asked == [first, [*first, {"role": "assistant", "content": "eins"}, {"role": "user", "content": "two"}]]
    assert [m["turn"] for m in talk.produced] == [1, 2]
    assert [reply.texts for reply in talk.replies] == [("eins",), ("zwei",)]
    assert talk.replies[1].context == asked[1]
    whole = talk.whole(suite.cases[0])
    assert whole.texts == ("eins", "zwei")
    assert [m["content"] for m in whole.context] == ["You are P.", "one", "two"]
    assert (talk.seconds, talk.first_token_s, talk.completion_tokens) == (0.5, 0.125, 6)
    assert [(r.latency_s, r.first_token_s) for r in talk.replies] == [(0.25, 0.125)] * 2


def test_results_by_number_and_by_arguments(tmp_path: Path) -> None:
    by_number = suite_of(tmp_path, tool_results={"search_memory": ["first", "second"]})
    assert play(by_number, calls("a"), calls("b"), said("x"))[0].fed == ["first", "second"]
    assert play(by_number, calls("a", "b"), calls("c"))[0].fed == ["first", "second"]
    rules = [
        {"arguments": {"query": {"contains": "bike"}}, "result": "blue"},
        {"call": 3, "result": "third"},
        {"result": "else"},
    ]
    by_arguments = suite_of(tmp_path, tool_results={"search_memory": rules})
    talk, _ = play(by_arguments, calls("my bike", "car"), calls("bus"), calls("bike"), said("x"))
    assert talk.fed == ["blue", "else", "third", "blue"]


def test_results_of_a_turn_come_before_those_of_the_case(tmp_path: Path) -> None:
    turns = [{"user": "one", "tool_results": {"search_memory": "turn"}}, {"user": "two"}]
    suite = suite_of(tmp_path, messages=[], turns=turns, tool_results={"search_memory": "case"})
    talk, _ = play(suite, calls("a"), said("x"), calls("a"), said("y"))
    assert talk.fed == ["turn", "case"]
    assert [reply.tool_results for reply in talk.replies] == [("turn",), ("case",)]


def test_an_unscripted_call_ends_the_conversation_or_gets_what_the_case_says(tmp_path: Path) -> None:
    turns = [{"user": "one"}, {"user": "two"}]
    ends = suite_of(tmp_path, messages=[], turns=turns)
    talk, asked = play(ends, calls("a"))
    assert len(asked) == 1
    (failure,) = talk.unreached(ends.cases[0])
    assert failure.check == "turns"
    assert failure.detail == "only 1 of 2 were played: turn 1: a call of search_memory has no scripted result"
    goes_on = suite_of(tmp_path, messages=[], turns=turns, unscripted="no such thing")
    talk, _ = play(goes_on, calls("a"), said("x"), said("y"))
    assert talk.fed == ["no such thing"]
    assert talk.unreached(goes_on.cases[0]) == []


def test_broken_arguments_and_endless_calls_end_it(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, messages=[], turns=[{"user": "a"}, {"user": "b"}], unscripted="x")
    broken = {"role": "assistant", "content": "", "tool_calls": [call("search_memory", '{"query": ')]}
    assert "no JSON object" in (play(suite, broken)[0].ended or "")
    talk, asked = play(suite, *[calls("a")] * (MAX_TOOL_ROUNDS + 1))
    assert len(asked) == MAX_TOOL_ROUNDS + 1
    assert "after 3 rounds" in (talk.ended or "")


def test_failures_of_turns_say_which(tmp_path: Path) -> None:
    turns = [
        {"user": "one", "checks": [{"check": "mentions", "all": ["eins"]}]},
        {"user": "two", "checks": [{"check": "mentions", "all": ["zwei"]}]},
    ]
    suite = suite_of(tmp_path, messages=[], turns=turns, checks=[{"check": "mentions", "all": ["drei"]}])
    with serving(lambda body, n: (200, completion("eins"))) as stub:
        run_suite(suite, stub.url, "m", "new", block(), tmp_path / "new.jsonl", Quiet())
    (line,) = lines(tmp_path / "new.jsonl")
    second, last = (failure["detail"] for failure in line["failed_checks"])
    assert second.startswith("turn 2: ")
    assert "zwei" in second
    assert "drei" in last


def test_a_judge_takes_the_reference_of_the_case_unless_it_names_its_own(tmp_path: Path) -> None:
    judge = {"check": "judge", "url": "http://x", "model": "j", "criterion": "c"}
    checks = [judge, judge | {"reference": "own"}, judge | {"reference": None}]
    suite = suite_of(tmp_path, checks=checks, reference="of the case")
    assert [c.params.reference for c in suite.checks["c-000"]] == ["of the case", "own", None]  # type: ignore[attr-defined]


def test_turns_that_were_not_reached_fail_the_case(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, messages=[], turns=[{"user": "one"}, {"user": "two"}], checks=[{"check": "no_emoji"}])
    with serving(lambda body, n: (200, completion("", [call("search_memory", '{"query": "x"}')]))) as stub:
        summary = run_suite(suite, stub.url, "m", "new", block(), tmp_path / "new.jsonl", Quiet())
    (line,) = lines(tmp_path / "new.jsonl")
    assert (summary.requests, summary.passed, summary.errors) == (1, 0, 0)
    assert [failure["check"] for failure in line["failed_checks"]] == ["turns"]
