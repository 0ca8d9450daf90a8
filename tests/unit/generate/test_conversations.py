"""Generated conversations and cases: deterministic, distinct, balanced, and with nothing in common."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest

from qat.behavior.checks import bind
from qat.data.duplicates import find_leaks
from qat.data.generate import CATEGORIES, cases, conversations
from qat.data.generate import lexicon as lex
from qat.data.load import load_conversations, save_conversations
from qat.data.schema import Conversation, Persona, argument_faults, load_persona
from qat.errors import UserError


@pytest.fixture(scope="module")
def persona() -> Persona:
    return load_persona("annie_tiny")


@pytest.fixture(scope="module")
def training(persona: Persona) -> list[dict[str, Any]]:
    return conversations(persona, 999, 11)


@pytest.fixture(scope="module")
def held_out(persona: Persona) -> list[dict[str, Any]]:
    return cases(persona, 1000, 101)


def user_turns(records: list[dict[str, Any]]) -> list[str]:
    return [m["content"] for r in records for m in r["messages"] if m["role"] == "user"]


def words(records: list[dict[str, Any]]) -> set[str]:
    text = json.dumps([m for r in records for m in r["messages"][1:]])
    return set(re.findall(r"\w+", text))


def test_the_same_seed_gives_the_same_records_and_another_seed_does_not(persona: Persona) -> None:
    assert conversations(persona, 60, 3) == conversations(persona, 60, 3)
    assert conversations(persona, 60, 3) != conversations(persona, 60, 4)
    assert cases(persona, 60, 3) == cases(persona, 60, 3)


def test_joined_conversations_are_the_single_ones_in_a_row(persona: Persona, tmp_path: Path) -> None:
    """Nothing is lost, doubled or worded differently; every record is a conversation like any other."""
    single, joined = conversations(persona, 23, 3), conversations(persona, 23, 3, joined=5)
    assert len(joined) == 5
    in_order = sorted(single, key=lambda record: int(record["id"][-5:]))
    for record in joined:
        first = int(record["id"][-5:])
        said = [m["content"] for one in in_order[first : first + 5] for m in one["messages"][1:]]
        assert [m["content"] for m in record["messages"]] == [persona.system_prompt, *said]
        calls = [call["id"] for m in record["messages"] for call in m.get("tool_calls", ())]
        assert len(set(calls)) == len(calls)
    path = tmp_path / "joined.jsonl"
    save_conversations(path, cast("list[Conversation]", joined))
    assert len(load_conversations(path)) == 5


def test_ten_categories_in_even_numbers(training: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    for records in (training, held_out):
        counts = Counter(r["category"] for r in records)
        assert set(counts) == set(CATEGORIES) and max(counts.values()) - min(counts.values()) <= 1


def test_user_turns_are_distinct(training: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    for records in (training, held_out):
        turns = user_turns(records)
        assert len(set(turns)) >= 0.95 * len(turns)
    assert len({json.dumps(c["messages"]) for c in held_out}) == 1000


@pytest.mark.parametrize("seed", [1, 2, 3, 5, 11, 21])
def test_no_user_turn_is_shared_with_the_cases(persona: Persona, held_out: list[dict[str, Any]], seed: int) -> None:
    assert find_leaks(conversations(persona, 999, seed), held_out) == []


def test_held_out_conversations_share_no_user_turn_with_training(
    persona: Persona, training: list[dict[str, Any]]
) -> None:
    other = conversations(persona, 300, 11, held_out=True)
    assert find_leaks(training, other) == []
    assert conversations(persona, 300, 11) != other


def test_no_person_and_no_town_is_shared(training: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    in_training, in_cases = words(training), words(held_out)
    names = set(lex.PEOPLE) | set(lex.TOWNS)
    assert len(names & in_training) > 100 and len(names & in_cases) > 100
    # Answers may name the other half (a mayor, somebody's town); questions do not.
    asked_training = set(re.findall(r"\w+", " ".join(user_turns(training))))
    asked_cases = set(re.findall(r"\w+", " ".join(user_turns(held_out))))
    assert not (asked_training & asked_cases & names)


def test_records_survive_the_loader_and_its_checks(training: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    save_conversations(path, cast("list[Conversation]", training))
    assert load_conversations(path) == training


def test_every_call_fits_its_tool(training: list[dict[str, Any]], persona: Persona) -> None:
    calls = [c["function"] for r in training for m in r["messages"] for c in m.get("tool_calls", ())]
    assert {c["name"] for c in calls} == {t["function"]["name"] for t in persona.tools}
    for call in calls:
        assert argument_faults(call["name"], call["arguments"], persona.tools) == []


def test_every_check_of_every_case_is_known(held_out: list[dict[str, Any]]) -> None:
    for case in held_out:
        for check in case["checks"]:
            bind(check["check"], {k: v for k, v in check.items() if k != "check"})


def test_a_case_never_holds_its_own_answer(held_out: list[dict[str, Any]]) -> None:
    for case in held_out:
        assert case["messages"][-1]["role"] in {"user", "tool"}
        if case["category"] in {"concise_voice", "kannada_culture", "no_emoji_no_markdown"}:
            asked = case["messages"][-1]["content"]
            wanted = [w for c in case["checks"] if c["check"] == "mentions" for w in c["all"]]
            assert wanted and not any(re.search(rf"\b{w}\b", asked) for w in wanted), case["id"]


def test_a_persona_without_the_needed_facts_is_refused() -> None:
    with pytest.raises(UserError, match="facts about the user") as fault:
        conversations(Persona("other", "You are Other.", [], {"name": "X"}), 10, 1)
    assert "qat data generate other.jsonl" in fault.value.remedy and "--set data.source=other" in fault.value.remedy


def test_a_grammar_that_is_used_up_says_so(persona: Persona, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lex, "MOODS", ["I had a long day"])
    monkeypatch.setattr(lex, "MOOD_TAILS", ["today"])
    with pytest.raises(UserError, match="'no_followup_questions' has no further distinct turns"):
        conversations(persona, 600, 1)
