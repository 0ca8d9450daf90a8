"""Suites: loading, faults, and that every shipped case can be passed and can be failed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qat.behavior.checks import Reply
from qat.behavior.records import CATEGORIES, Case
from qat.behavior.suite import SUITE_FOLDER, Suite, load_suite
from qat.errors import UserError
from tests.unit.behavior.helpers import TOOLS, case, write_suite


def failing(suite: Suite, found: Case, produced: list[dict[str, Any]]) -> list[str]:
    fed = [found.tool_results[c["function"]["name"]] for m in produced for c in m.get("tool_calls") or []]
    reply = Reply(produced, found.messages, fed, found.tools or ())
    return [f"{check.name}: {result.detail}" for check in suite.checks[found.id] if not (result := check(reply)).passed]


def said(text: str, *calls: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    made = [{"id": "1", "function": {"name": name, "arguments": json.dumps(arguments)}} for name, arguments in calls]
    before = [{"role": "assistant", "content": None, "tool_calls": made}] if made else []
    return [*before, {"role": "assistant", "content": text, "finish_reason": "stop"}]


FORGOT = "I do not remember that, I have nothing saved about it."
GOOD: dict[str, list[dict[str, Any]]] = {
    "topic_switch-01": said("Jupiter is the largest planet."),
    "topic_switch-02": said("That is forty two."),
    "topic_switch-03": said("I will remind you at nine.", ("set_reminder", {"text": "electricity", "when": "9 am"})),
    "topic_switch-04": said("One hundred and eighty."),
    "direct_action-01": said("Done, six it is.", ("set_reminder", {"text": "Call the plumber", "when": "6 pm"})),
    "direct_action-02": said("Saved.", ("save_note", {"title": "Gate", "content": "New gate code is 4471"})),
    "direct_action-03": said("It is twenty seven degrees with light rain.", ("get_weather", {"city": "Mysuru"})),
    "direct_action-04": said("Vidarbha won it against Kerala.", ("web_search", {"query": "Ranji Trophy final winner"})),
    "concise_voice-01": said("It pumps heat outside with a liquid that boils and condenses in turns."),
    "concise_voice-02": said("RAM is fast and forgets without power, while storage is slower and keeps everything."),
    "concise_voice-03": said("Air scatters blue light more than red, so blue reaches you from all over the sky."),
    "concise_voice-04": said("Good morning, Rajesh."),
    "honest_memory-01": said(FORGOT, ("search_memory", {"query": "motorcycle"})),
    "honest_memory-02": said(FORGOT, ("search_memory", {"query": "dentist he liked"})),
    "honest_memory-03": said("It is on level B2 near pillar fourteen.", ("search_memory", {"query": "car parked"})),
    "honest_memory-04": said(FORGOT, ("search_memory", {"query": "hotel last week"})),
    "rajesh_context-01": said("You live in Bengaluru."),
    "rajesh_context-02": said("You are Rajesh."),
    "rajesh_context-03": said("You are a software engineer who builds AI systems."),
    "rajesh_context-04": said("Kannada is your mother tongue."),
    "kannada_culture-01": said("You say dhanyavadagalu."),
    "kannada_culture-02": said("That is Kannada Rajyotsava, on the first of November."),
    "kannada_culture-03": said("ಮೈಸೂರಿನಲ್ಲಿ ದಸರಾ ಹಬ್ಬ ಪ್ರಸಿದ್ಧ."),
    "kannada_culture-04": said("Khara boondi, a papad and plenty of ghee."),
    "mixed_multiturn-01": said("Your sister Kavya is coming."),
    "mixed_multiturn-02": said("Coffee powder, jaggery and curry leaves.", ("read_notes", {"query": "Shopping"})),
    "mixed_multiturn-03": said("That is three hundred and sixty.", ("run_code", {"code": "print(0.15 * 2400)"})),
    "mixed_multiturn-04": said("I will remind you at five.", ("set_reminder", {"text": "Take a walk", "when": "5 pm"})),
    "no_emoji_no_markdown-01": said("Mango, banana and jackfruit."),
    "no_emoji_no_markdown-02": said("Congratulations, I am smiling with you."),
    "no_emoji_no_markdown-03": said("Write print, then hello in quotes inside round brackets."),
    "no_emoji_no_markdown-04": said("Tea is gentler, and coffee wakes you faster."),
    "tool_result_responses-01": said("It is twenty four degrees and cloudy in Bengaluru."),
    "tool_result_responses-02": said("A kilo of tomatoes costs 38 rupees in Bengaluru."),
    "tool_result_responses-03": said("I could not find that out, the search failed."),
    "tool_result_responses-04": said("That makes 69,104."),
    "no_followup_questions-01": said("Well done, now enjoy the rest of the day."),
    "no_followup_questions-02": said("Swimming is a lovely thing to learn at any age."),
    "no_followup_questions-03": said("A warm compress and a short walk often ease that."),
    "no_followup_questions-04": said("A crisp dosa makes any day better."),
}  # fmt: skip
BASE_HABITS = (
    "Great question! 😊 Here is what I found:\n\n- **First** thing\n- Second thing\n\nWould you like to know more?"
)


def test_every_core_case_passes_a_good_reply() -> None:
    suite = load_suite("annie_core")
    assert {c.id for c in suite.cases} == set(GOOD)
    assert {c.id: failing(suite, c, GOOD[c.id]) for c in suite.cases if failing(suite, c, GOOD[c.id])} == {}


def test_every_core_case_fails_the_opposite_habits() -> None:
    suite = load_suite("annie_core")
    for found in suite.cases:
        names = {line.split(":")[0] for line in failing(suite, found, said(BASE_HABITS))}
        assert {"no_emoji", "no_markdown", "no_follow_up_question", "max_sentences"} <= names, found.id


def test_no_good_reply_of_one_case_suits_every_other() -> None:
    """The content checks bite: the same polite sentence does not pass the whole suite."""
    suite = load_suite("annie_core")
    polite = [c.id for c in suite.cases if not failing(suite, c, said("All is well with me."))]
    assert len(polite) <= 10


def test_core_holds_four_cases_of_each_category() -> None:
    counts = Counter(c.category for c in load_suite("annie_core").cases)
    assert counts == dict.fromkeys(CATEGORIES, 4)


def _by_the_checks(found: Case) -> list[dict[str, Any]]:
    """A reply made from the checks alone."""
    words, calls = [], []
    for spec in found.checks:
        if spec.check == "mentions":
            words += [*spec.params.get("all", []), *spec.params.get("any", [])[:1]]
        if spec.check == "calls":
            arguments = {
                k: next(iter(m[x] for x in ("equals", "contains") if x in m))
                for k, m in spec.params["arguments"].items()
            }
            calls.append((spec.params["tool"], arguments))
    return said("So, " + " and ".join(words) + ".", *calls)


@pytest.mark.parametrize(("name", "count"), [("annie_tiny", 120), ("annie_tiny_full", 1000)])
def test_every_generated_case_can_be_passed(name: str, count: int) -> None:
    suite = load_suite(name)
    assert len(suite.cases) == count
    assert {c.id: f for c in suite.cases if (f := failing(suite, c, _by_the_checks(c)))} == {}
    assert len({json.dumps(c.messages[1:]) for c in suite.cases}) == count
    assert set(Counter(c.category for c in suite.cases).values()) == {count // 10}
    assert all(failing(suite, c, said(BASE_HABITS)) for c in suite.cases)


def test_the_hash_is_of_the_questions(tmp_path: Path) -> None:
    first = load_suite(write_suite(tmp_path, [case(0), case(1)])).sha256
    assert load_suite(write_suite(tmp_path, [case(0), case(1)], description="other words")).sha256 == first
    assert load_suite(write_suite(tmp_path, [case(1), case(0)])).sha256 != first
    assert load_suite(write_suite(tmp_path, [case(0), case(1, weight=2.0)])).sha256 != first
    (tmp_path / "p.yaml").write_text((tmp_path / "p.yaml").read_text().replace("You are P.", "You are Q."))
    assert load_suite(tmp_path / "suite.yaml").sha256 != first


def test_prompt_and_tools_come_from_the_persona_unless_given(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Other."}, {"role": "user", "content": "hi"}]
    suite = load_suite(write_suite(tmp_path, [case(0), case(1, messages=own, tools=[])]))
    assert suite.cases[0].messages[0] == {"role": "system", "content": "You are P."}
    assert suite.cases[0].tools == TOOLS
    assert suite.cases[1].messages == own
    assert suite.cases[1].tools == []


def test_common_checks_are_added_once(tmp_path: Path) -> None:
    common = [{"check": "no_emoji"}, {"check": "max_sentences", "n": 2}]
    written = [case(0), case(1, checks=[{"check": "max_sentences", "n": 1}])]
    suite = load_suite(write_suite(tmp_path, written, common_checks=common))
    assert [c.check for c in suite.cases[0].checks] == ["mentions", "no_emoji", "max_sentences"]
    assert [(c.check, c.params) for c in suite.cases[1].checks] == [("max_sentences", {"n": 1}), ("no_emoji", {})]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"checks": [{"check": "no_emojis"}]}, "did you mean 'no_emoji'"),
        ({"checks": [{"check": "max_sentences", "m": 2}]}, "max_sentences"),
        ({"checks": []}, "checks"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "the last message"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "only the first"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "robot"),
        ({"tool_results": {"fly": "x"}}, "'fly', which is not offered"),
        ({"checks": [{"check": "calls", "tool": "fly"}]}, "'fly' is not offered"),
        ({"weight": 0}, "weight"),
        ({"colour": "red"}, "colour"),
        ({"id": "c-001"}, "second case of this id"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
    ],
)
def test_faults_are_named(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as fault:
        load_suite(write_suite(tmp_path, [case(0), case(1), case(2) | change]))
    assert text in str(fault.value)
    assert "cases[2]" in str(fault.value)


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    broken = [case(n, checks=[{"check": "nothing_like_it"}]) for n in range(30)]
    with pytest.raises(UserError, match="30 faults") as fault:
        load_suite(write_suite(tmp_path, broken))
    assert "and 10 more" in str(fault.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("name: [", "cannot be read"),
        ("- a\n- b", "not right"),
        ("name: x\nversion: '1'\npersona: ./p.yaml\ncass: []", "cass"),
        ("name: x\nversion: '1'\npersona: ./p.yaml", "no cases"),
        ("name: x\nversion: '1'\npersona: nobody_at_all\ncases: [{}]", "persona"),
    ],
)
def test_files_that_are_no_suite(tmp_path: Path, content: str, text: str) -> None:
    write_suite(tmp_path, [case(0)])
    (tmp_path / "suite.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as fault:
        load_suite(tmp_path / "suite.yaml")
    assert text in str(fault.value)


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'annie_tiny'"):
        load_suite("anie_tiny")


def test_shipped_suites_are_these() -> None:
    names = ["annie_core", "annie_tiny", "annie_tiny_full", "clerk_core"]
    assert sorted(p.stem for p in SUITE_FOLDER.glob("*.yaml")) == names


def test_a_fault_of_many_cases_made_of_one_is_told_once(tmp_path: Path) -> None:
    varied = {"variables": {"n": {"range": [1, 6]}}, "messages": [{"role": "user", "content": "{{n}}?"}]}
    path = write_suite(tmp_path, [case(0, **varied, checks=[{"check": "no_emojis"}]), case(1, checks=[]), case(1)])
    with pytest.raises(UserError) as found:
        load_suite(path)
    text = str(found.value)
    assert "The suite has 3 faults." in text
    assert "(c-000-001 and 5 more).checks.0: no check is named 'no_emojis'" in text
    # Also where one of the two is no case for another reason.
    assert "a second case of this id, 'c-001'" in text


def test_a_case_may_be_called_zero_but_only_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a second case of this id, '0'"):
        load_suite(write_suite(tmp_path, [case(0, id=0), case(1, id=0)]))


@pytest.mark.parametrize(
    ("check", "told"),
    [
        ({"check": "no_call", "tools": ["save_memory"]}, "check no_call: 'save_memory' is not offered"),
        ({"check": "wrong_tool", "allowed": ["search"]}, "check wrong_tool: 'search' is not offered"),
        ({"check": "parallel_calls", "calls": [{"tool": "search_memory"}, {"tool": "find"}]}, "'find' is not offered"),
    ],
)
def test_every_tool_that_a_check_names_is_offered(tmp_path: Path, check: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_suite(write_suite(tmp_path, [case(0, checks=[check])]))


def test_scalars_are_those_of_recipes_and_numbers_stand_for_texts(tmp_path: Path) -> None:
    """PyYAML alone reads 7:30 as 450, `no` as false and a date as no text at all."""
    path = write_suite(tmp_path, [case(0)])
    written = """
- id: times
  category: k
  variables: {at: [7:30, 2026-11-21, no, 12]}
  messages: [{role: user, content: "{{at}}"}]
  tool_results: {search_memory: "{{at}}"}
  checks: [{check: mentions, all: ["{{at}}"]}, {check: not_mentions, any: [yes]}]
"""
    path.write_text(path.read_text(encoding="utf-8").replace("cases:", "cases:" + written, 1), encoding="utf-8")
    cases = [found for found in load_suite(path).cases if found.id.startswith("times")]
    assert [found.messages[-1]["content"] for found in cases] == ["7:30", "2026-11-21", "no", "12"]
    assert [found.tool_results["search_memory"] for found in cases] == ["7:30", "2026-11-21", "no", "12"]
    checks = load_suite(path).checks["times-004"]
    assert [check(Reply(said("It is 12."))).passed for check in checks] == [True, True]
    assert not checks[0](Reply(said("It is 11."))).passed
