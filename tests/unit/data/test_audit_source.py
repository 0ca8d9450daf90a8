"""The audit of a file, without rows: what needs no tokenizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from qat.behavior.demands import Demands
from qat.data.audit import AuditReport, Settings, audit_source, stream
from qat.data.audit.findings import SHOWN, Groups, Place
from qat.data.audit.replies import recorded_replies
from qat.data.audit.summary import bins, spread
from qat.data.records import Source
from qat.data.schema import Persona

DEMANDS = Demands(
    ("mine",),
    (("no_emoji", "{}"), ("max_sentences", '{"n": 2}')),
    (),
    (("case-1", "How hot is it in Mysuru 0?"), ("case-2", "Fine")),
    (("case-3", "The market of Malvek opens at six on Tuesday."), ("case-4", "Yes, it is.")),
)


@pytest.fixture
def persona(weather_tool: dict[str, Any]) -> Persona:
    return Persona("annie", "You are Annie.", [weather_tool], {})


@pytest.fixture
def records(tool_conversation: dict[str, Any]) -> list[dict[str, Any]]:
    """Forty sound records with different turns, calls and answers."""
    made = []
    for number in range(40):
        each = copy.deepcopy(tool_conversation)
        each["id"] = f"c{number}"
        each["messages"][1]["content"] = f"Tell {number * 7919} of the weather in place {number * 104729}"
        each["messages"][2]["tool_calls"][0]["function"]["arguments"]["city"] = f"Town {number * 611953}"
        each["messages"][4]["content"] = f"It is {number * 1299709} degrees."
        each["messages"][5]["content"] = f"Good to hear {number * 15485863}"
        made.append(each)
    return made


@pytest.fixture
def run(tmp_path: Path, persona: Persona) -> Any:
    def audit_them(lines: list[Any], workers: int = 0, **options: Any) -> AuditReport:
        path = tmp_path / "set.jsonl"
        text = (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
        path.write_text("".join(f"{line}\n" for line in text), "utf-8")
        settings = Settings(persona, 600, None, **{"demands": DEMANDS, **options})
        return audit_source(Source(path), settings, workers=workers)

    return audit_them


def codes(report: AuditReport) -> dict[str, tuple[str, int]]:
    return {finding.code: (finding.severity, finding.count) for finding in report.findings}


def test_sound_data_has_no_findings(run: Any, records: list[Any]) -> None:
    report = run(records)
    assert report.findings == []
    numbers = report.numbers
    assert json.loads(json.dumps(report.to_json())) == report.to_json()
    assert numbers["conversations"] == 40 and numbers["records"] == {"read": 40, "unsound": 0}
    assert numbers["source"]["form"] == "openai"
    # By hand: each conversation has two replies (the call and its answer are one) and two user turns.
    assert (numbers["replies"]["total"], numbers["replies"]["failing"]) == (80, 0)
    assert numbers["user_turns"]["total"] == numbers["user_turns"]["distinct"] == 80
    assert numbers["replies"]["words"] == {"min": 2, "median": 3.0, "p95": 4, "max": 4}
    assert "tokens" not in numbers


def test_unsound_lines_are_faults_with_their_number(run: Any, records: list[Any]) -> None:
    records[3] = "{not json"
    records[7]["messages"][0]["role"] = "boss"
    report = run(records)
    assert codes(report)["schema"] == ("fault", 2)
    assert [place for place, _ in report.findings[0].examples] == ["line 4", "line 8"]
    assert report.numbers["records"] == {"read": 40, "unsound": 2} and report.numbers["conversations"] == 38


def test_a_second_conversation_of_an_id_is_a_fault(run: Any, records: list[Any]) -> None:
    records[9]["id"] = "c2"
    assert codes(run(records))["id"] == ("fault", 1)
    assert "line 10" in run(records).faults[0] and "as line 3" in run(records).faults[0]


def test_a_reply_that_the_suite_forbids_is_refused_unless_accepted(run: Any, records: list[Any]) -> None:
    records[4]["messages"][4]["content"] = "It is hot 😀"
    records[5]["messages"][6]["content"] = "Yes. Maybe. Perhaps."
    report = run(records)
    assert codes(report) == {"no_emoji": ("fault", 1), "max_sentences": ("fault", 1)}
    assert any("line 5 (c4): messages[2] emoji 😀" in fault for fault in report.faults)
    assert any("line 6 (c5): messages[6] 3 sentences, at most 2" in fault for fault in report.faults)
    assert report.numbers["replies"]["by_check"] == {"no_emoji": 1, "max_sentences": 1}
    accepted = run(records, accept=frozenset(("no_emoji",)))
    assert codes(accepted) == {"max_sentences": ("fault", 1), "no_emoji": ("accepted", 1)}
    assert len(accepted.faults) == 1


def test_the_suites_questions_must_not_stand_in_the_data(run: Any, records: list[Any]) -> None:
    records[0]["messages"][1]["content"] = "how hot is it in MYSURU 0"
    records[1]["messages"][1]["content"] = "How hot is it in Mysuru 01?"
    records[2]["messages"][5]["content"] = "Fine"  # one word: everybody says that
    long = "Could you please tell me how hot it is going to be in the old town of Mysuru tomorrow evening"
    records[3]["messages"][1]["content"] = f"{long}s?"
    report = run(records, demands=DEMANDS._replace(turns=(*DEMANDS.turns, ("case-5", f"{long}?"))))
    assert codes(report) == {"leak": ("fault", 1), "near_leak": ("warning", 2)}
    assert "line 1 (c0): 'how hot is it in MYSURU 0' is case case-1" in report.faults[0]


def test_a_question_in_a_script_without_spaces_is_found_too(run: Any, records: list[Any]) -> None:
    asked = "明天早上迈索尔老城区的天气会怎么样"
    records[0]["messages"][1]["content"] = f"{asked}？"
    report = run(records, demands=DEMANDS._replace(turns=(*DEMANDS.turns, ("case-6", asked))))
    assert "leak" in codes(report) and "is case case-6" in report.faults[0]


def test_the_suites_reference_answers_are_looked_for(run: Any, records: list[Any]) -> None:
    said = [
        "The market of Malvek opens at six on TUESDAY!",
        "Oh, the market of Malvek opens at six on Tuesday.",
        "Yes, it is.",
    ]
    for record, text in zip(records, said, strict=False):
        record["messages"][6]["content"] = text
    report = run(records)
    assert codes(report) == {"reference_leak": ("warning", 2)}  # the third is everybody's
    details = [detail for _, detail in report.findings[0].examples]
    assert details[0] == "messages[6] is like the reference of case case-3 (1.00)" and "case-3 (0.9" in details[1]
    assert codes(run(records, demands=DEMANDS._replace(references=()))) == {}


def test_conversations_that_nearly_repeat_an_earlier_one(run: Any, records: list[Any]) -> None:
    for number in range(3):
        twin = copy.deepcopy(records[number])
        twin["id"], twin["messages"][1]["content"] = f"t{number}", f"Oh, {twin['messages'][1]['content']}"
        twin["messages"][2]["tool_calls"][0]["id"] = twin["messages"][3]["tool_call_id"] = "other"
        records.append(twin)
    report = run(records)
    assert codes(report) == {"near_repeated": ("warning", 3)}
    (found,) = report.findings
    assert "3 conversations (7.0%)" in found.message
    assert sorted(place for place, _ in found.examples) == ["line 41", "line 42", "line 43"]
    assert {detail.partition(" to ")[2] for _, detail in found.examples} == {"line 1", "line 2", "line 3"}
    numbers = report.numbers["repetition"]["conversations"]
    assert (numbers["total"], numbers["distinct"], numbers["near"], numbers["again"]) == (43, 43, 6, 3)
    assert codes(run([*records, *({**each, "id": f"x{each['id']}"} for each in records[3:30])])) == {
        "repeated": ("warning", 27), "repeated_turns": ("warning", 57), "near_repeated": ("warning", 30)
    }  # fmt: skip


def test_a_teacher_that_has_fallen_into_one_phrase(run: Any, records: list[Any]) -> None:
    for number, record in enumerate(records):
        record["messages"][6]["content"] = f"Reply {number * 7919} has words of its own {number * 104729}."
    for number in range(10):
        records[number]["messages"][6]["content"] = (
            "I could not find anything about that in my notes" + ".!"[number % 2]
        )
    records[3]["messages"][6]["content"] = "I could not find anything about this in my notes."
    for number in range(20, 35):
        records[number]["messages"][6]["content"] = "It is done."
    report = run(records)
    assert codes(report) == {"repeated_replies": ("warning", 10)}
    assert report.findings[0].message == "10 of 80 replies (12.5%) say nearly the same"
    assert report.findings[0].examples == (("10 times", "i could not find anything about that in my notes"),)
    records[5]["messages"][6]["content"] = "Nine are few enough."
    assert codes(run(records)) == {}


def test_prompts_and_tools_are_compared_byte_by_byte(run: Any, records: list[Any]) -> None:
    for number in (1, 2):
        records[number]["messages"][0]["content"] = "You are Annie. "
    records[3]["tools"][0]["function"]["description"] = "Other."
    report = run(records)
    assert codes(report) == {"system_prompt": ("fault", 2), "tools": ("fault", 1)}
    assert "-'You are Annie.'" in report.faults[0] and "+'You are Annie. '" in report.faults[0]
    assert "changed get_weather" in report.faults[1]
    assert report.numbers["system_prompt"] == {"equal": 38, "different": 2, "variants": 2}


def test_repeated_conversations_are_named(run: Any, records: list[Any]) -> None:
    records[20] = {**records[10], "id": "twin", "category": "other"}
    report = run(records)
    assert codes(report)["repeated"] == ("warning", 1)
    repeated = next(finding for finding in report.findings if finding.code == "repeated")
    assert repeated.examples == (("line 21", "as line 11"),)
    assert report.numbers["user_turns"]["distinct"] == 78
    assert "near_repeated" not in codes(report)  # word for word is said already


def test_two_processes_find_what_one_does(run: Any, records: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    many = []
    for copy_number in range(8):
        for each in records:
            again = copy.deepcopy(each)
            again["id"] = f"{copy_number}-{each['id']}"
            again["messages"][1]["content"] += f" {copy_number}"
            many.append(again)
    many[200]["messages"][4]["content"] = "😀"
    many[10]["messages"][4]["content"] = "😀"
    monkeypatch.setattr(stream, "_PIECE", 16)  # twenty pieces, more than are ahead at a time
    alone, together = run(many), run(many, workers=2)
    assert together.to_json() == alone.to_json()
    assert [place for place, _ in together.findings[0].examples] == ["line 11 (0-c10)", "line 201 (5-c0)"]


def test_groups_keep_the_first_examples_and_every_count() -> None:
    first, second = Groups(), Groups()
    for number in range(30):
        (first if number < 15 else second).add("x", Place(0, number, str(number)), str(number))
    for number in range(100):
        second.add("y", Place(0, number, ""), "detail", subject=f"variant {number}")
    first.merge(second)
    group = first["x", ""]
    assert (group.count, group.conversations) == (30, 30)
    assert [example.detail for example in group.examples] == [str(number) for number in range(SHOWN)]
    variants = [group for (code, _), group in first.items() if code == "y"]
    assert len(variants) <= 21 and sum(group.count for group in variants) == 100


def test_recorded_replies_by_hand(tool_conversation: dict[str, Any]) -> None:
    first, second = recorded_replies(tool_conversation["messages"])
    messages = tool_conversation["messages"]
    assert (first.start, first.produced, first.context) == (2, [messages[2], messages[4]], messages[:2])
    assert first.tool_results == ["31 degrees"]
    assert (second.start, second.produced, second.context) == (6, [messages[6]], messages[:6])


@pytest.mark.parametrize("values", [[5], [1, 2], [3, 3, 3, 9], list(range(100)), [0] * 19 + [7]])
def test_spread_against_sorting(values: list[int]) -> None:
    import statistics

    histogram = {value: values.count(value) for value in values}
    ordered = sorted(values)
    p95 = ordered[-(-95 * len(values) // 100) - 1]
    assert spread(histogram) == {"min": ordered[0], "median": statistics.median(values), "p95": p95, "max": ordered[-1]}
    assert sum(each["count"] for each in bins(histogram)) == len(values)
    assert all(each["from"] <= each["to"] for each in bins(histogram)) and len(bins(histogram)) <= 16
