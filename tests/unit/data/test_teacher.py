from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qat.behavior.suite import load_suite
from qat.data.generate.teacher import generate_with_teacher, load_teacher, quotas
from qat.data.generate.teacher.run import checks_of
from qat.data.generate.teacher.settings import ABOUT
from qat.data.load import load_conversations
from qat.errors import UserError
from tests.unit.behavior.stub_server import call, completion, serving
from tests.unit.data.teaching import annie, by_parts, part_of, persona, scenario, small_suite, teacher


def _log(out: Path) -> list[dict[str, Any]]:
    lines = out.with_name(f"{out.stem}.log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][1:]


def test_quotas_are_filled_with_whole_conversations(tmp_path: Path) -> None:
    out, suite = tmp_path / "t.jsonl", small_suite(tmp_path)
    with serving(by_parts()) as stub:
        settings = teacher(stub.url, price={"input": 1.0, "output": 10.0})
        report = generate_with_teacher(settings, annie(), suite, out, quotas(settings))
    made = load_conversations(out)  # the same reader, with all its faults, as for anybody's data
    assert Counter(each["category"] for each in made) == {"honest_memory": 2, "concise_voice": 2}
    assert report.complete and report.rejected == {} and report.made == report.wanted
    memory = next(each for each in made if each["category"] == "honest_memory")
    assert [message["role"] for message in memory["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert memory["messages"][0]["content"] == annie().system_prompt and memory["tools"] == annie().tools
    assert memory["messages"][2]["tool_calls"][0]["function"]["arguments"]["query"]
    assert memory["messages"][3]["content"] == "[]"  # without the fence that the model put around it
    # Worked out by hand: a memory conversation takes four requests, one of plain talk two.
    assert report.spent.requests == len(stub.bodies) == 2 * 4 + 2 * 2
    assert report.cost == pytest.approx(12 * (100 * 1.0 + 10 * 10.0) / 1e6)
    assert sum(line["spent"]["requests"] for line in _log(out)) == 12


def test_the_persona_is_asked_as_the_served_model_is(tmp_path: Path) -> None:
    with serving(by_parts()) as stub:
        settings = teacher(stub.url, extra={"chat_template_kwargs": {"enable_thinking": False}})
        generate_with_teacher(settings, annie(), small_suite(tmp_path), tmp_path / "t.jsonl", quotas(settings))
    asked = [body for body in stub.bodies if part_of(body) == "persona"]
    assert all(body["messages"][0]["content"] == annie().system_prompt for body in asked)
    assert all(body["tools"] == annie().tools and body["chat_template_kwargs"] for body in asked)
    assert all("tools" not in body for body in stub.bodies if part_of(body) != "persona")
    after = next(body for body in asked if body["messages"][-1]["role"] == "tool")
    arguments = after["messages"][-2]["tool_calls"][0]["function"]["arguments"]
    assert isinstance(arguments, str) and json.loads(arguments)["query"]
    seeds = [body["seed"] for body in stub.bodies]
    assert len(set(seeds)) == len(seeds)


def test_replies_are_held_to_the_suites_demands_and_to_what_their_category_always_asks(tmp_path: Path) -> None:
    checks = checks_of(small_suite(tmp_path))
    manners = {"not_empty", "no_emoji", "max_sentences"}
    assert {name: {check.name for check in found} for name, found in checks.items()} == {
        "": manners,
        "honest_memory": manners | {"calls"},  # `mentions` is of one case only
        "concise_voice": manners | {"no_call"},
    }
    assert all(len(found) == len({check.name for check in found}) for found in checks.values())  # none twice


def test_a_failing_reply_comes_back_with_what_failed(tmp_path: Path) -> None:
    seen: list[str] = []

    def with_emoji_first(body: dict[str, Any], number: int) -> dict[str, Any]:
        if body["messages"][-1]["role"] == "user" and "makes" in body["messages"][-1]["content"]:
            system = body["messages"][0]["content"]
            if "<review>" not in system:
                return completion("It glows 😀.")
            seen.append(system)
        return persona(body, number)

    out = tmp_path / "t.jsonl"
    with serving(by_parts(persona=with_emoji_first)) as stub:
        settings = teacher(stub.url, categories={"concise_voice": {"count": 1}})
        report = generate_with_teacher(settings, annie(), small_suite(tmp_path), out, quotas(settings))
    assert report.complete and report.rejected == {}
    assert len(seen) == 1 and "It glows" in seen[0] and "check no_emoji" in seen[0]
    text = out.read_text(encoding="utf-8")
    assert "review" not in text and "glows" not in text


def test_what_cannot_be_mended_is_rejected_and_counted_by_reason(tmp_path: Path) -> None:
    def stubborn(body: dict[str, Any], number: int) -> dict[str, Any]:
        last = body["messages"][-1]["content"]
        if "makes" in last:
            return completion("One. Two. Three sentences.")
        return completion(None, [call("search_memory", '{"query": 5}')], "tool_calls")

    out = tmp_path / "t.jsonl"
    with serving(by_parts(persona=stubborn)) as stub:
        settings = teacher(stub.url, attempts=1, revisions=1)
        report = generate_with_teacher(settings, annie(), small_suite(tmp_path), out, quotas(settings))
    assert not report.complete and set(report.made.values()) == {0}
    assert report.rejected == {"check max_sentences": 2, "call": 2}
    assert report.attempts == 4 and len(stub.bodies) == 4 * (1 + 2)  # the scenario, the draft and one revision each
    assert out.read_bytes() == b""
    assert any("5 is not of type 'string'" in line["detail"] for line in _log(out))


def test_several_calls_and_several_turns_keep_their_results_apart(tmp_path: Path) -> None:
    """Two calls at once, then a third in the next turn; each tool is told of the results before it."""

    def user(body: dict[str, Any], number: int) -> dict[str, Any]:
        return completion(json.dumps({"turns": ["Keep the code 12 and the code 13.", "Keep 14 too."], "world": "w"}))

    def calling(body: dict[str, Any], number: int) -> dict[str, Any]:
        last = body["messages"][-1]
        if last["role"] == "tool":
            return completion("It is kept.")
        notes = [word.strip(".") for word in last["content"].split() if word.strip(".").isdigit()]
        # A server of one's own may well give every call the same id.
        return completion("", [call("save_note", json.dumps({"text": note})) for note in notes], "tool_calls")

    def noting(body: dict[str, Any], number: int) -> dict[str, Any]:
        return completion("saved " + json.loads(body["messages"][1]["content"])["arguments"]["text"])

    out = tmp_path / "t.jsonl"
    with serving(by_parts(user=user, persona=calling, tool=noting)) as stub:
        settings = teacher(stub.url, categories={"free": {"count": 1, "about": "notes"}})
        report = generate_with_teacher(settings, annie(), small_suite(tmp_path), out, quotas(settings))
    assert report.complete
    (made,) = load_conversations(out)
    ids = [call["id"] for message in made["messages"] for call in message.get("tool_calls", ())]
    results = [(m["tool_call_id"], m["content"]) for m in made["messages"] if m["role"] == "tool"]
    assert len(set(ids)) == 3 and results == list(zip(ids, ["saved 12", "saved 13", "saved 14"], strict=True))
    earlier = [body["messages"][0]["content"] for body in stub.bodies if part_of(body) == "tool"]
    assert [text.count("saved 1") for text in earlier] == [0, 1, 2]


def test_a_call_is_judged_at_once_and_the_text_beside_it_too(tmp_path: Path) -> None:
    """In `concise_voice` no case calls; in `honest_memory` all do, and what stands beside a call is spoken."""

    def announcing(body: dict[str, Any], number: int) -> dict[str, Any]:
        last, system = body["messages"][-1], body["messages"][0]["content"]
        if last["role"] == "tool":
            return completion("I have no memory of that.")
        if "makes" in last["content"] and "check no_call" in system:
            return completion("It is well made.")
        beside = "One moment." if "check no_emoji" in system else "One moment 😀."
        return completion(beside, [call("search_memory", '{"query": "x"}')], "tool_calls")

    out = tmp_path / "t.jsonl"
    with serving(by_parts(persona=announcing)) as stub:
        settings = teacher(
            stub.url, revisions=1, categories={n: {"count": 1} for n in ("honest_memory", "concise_voice")}
        )
        report = generate_with_teacher(settings, annie(), small_suite(tmp_path), out, quotas(settings))
    assert report.complete and report.rejected == {}
    assert report.spent.requests == (1 + 2 + 1 + 1) + (1 + 2)  # one draft of each came back, no tool was asked in vain
    spoken = {each["category"]: [m["content"] for m in each["messages"][2:]] for each in load_conversations(out)}
    assert spoken["concise_voice"] == ["It is well made."]
    assert spoken["honest_memory"] == ["One moment.", "[]", "I have no memory of that."]


def test_calls_without_end_are_stopped(tmp_path: Path) -> None:
    def calling(body: dict[str, Any], number: int) -> dict[str, Any]:
        return completion(None, [call("search_memory", '{"query": "x"}')], "tool_calls")

    with serving(by_parts(persona=calling)) as stub:
        settings = teacher(stub.url, attempts=1, categories={"honest_memory": {"count": 1}})
        report = generate_with_teacher(settings, annie(), small_suite(tmp_path), tmp_path / "t.jsonl", quotas(settings))
    assert report.rejected == {"calls without end": 1}


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ("what did I say about my green bike, from Hassan", "leak"),  # the suite's own, in another dress
        ("Tell me about Malvek!", "leak"),
        ("Why is the sky over the river so blue today?", "repeats"),
    ],
)
def test_no_turn_of_the_suite_and_none_twice(tmp_path: Path, turn: str, reason: str) -> None:
    def always(body: dict[str, Any], number: int) -> dict[str, Any]:
        return completion(json.dumps({"turns": [turn], "world": ""}))

    with serving(by_parts(user=always)) as stub:
        settings = teacher(stub.url, attempts=2, categories={"concise_voice": {"count": 2}})
        out = tmp_path / "t.jsonl"
        report = generate_with_teacher(settings, annie(), small_suite(tmp_path), out, quotas(settings))
    made = 1 if reason == "repeats" else 0
    assert report.rejected == {reason: 4 - made} and report.made["concise_voice"] == made
    assert sum(part_of(body) == "persona" for body in stub.bodies) == made  # nothing was spent on replies


def test_a_killed_run_goes_on_and_pays_nothing_twice(tmp_path: Path) -> None:
    out, suite = tmp_path / "t.jsonl", small_suite(tmp_path)
    with serving(by_parts()) as stub:
        limited = teacher(stub.url, limits={"requests": 5})
        first = generate_with_teacher(limited, annie(), suite, out, quotas(limited))
        assert first.stopped == "limits.requests = 5 is used up" and not first.complete
        before = out.read_bytes()
        assert sum(first.made.values()) == 1 == before.count(b"\n")
        # What a kill leaves: half a conversation, and half a line of the log.
        out.write_bytes(before + b'{"id": "teacher-conc')
        log = out.with_name("t.log.jsonl")
        log.write_bytes(log.read_bytes() + b'{"brief": "ho')
        whole = teacher(stub.url)
        second = generate_with_teacher(whole, annie(), suite, out, quotas(whole))
    assert second.complete and out.read_bytes().startswith(before)
    made = load_conversations(out)
    assert len({each["id"] for each in made}) == 4
    assert second.spent.requests == len(stub.bodies)
    assert [line["outcome"] for line in _log(out)].count("accepted") == 4


def test_a_conversation_whose_log_line_was_lost_is_kept(tmp_path: Path) -> None:
    out, suite = tmp_path / "t.jsonl", small_suite(tmp_path)
    with serving(by_parts()) as stub:
        one = teacher(stub.url, categories={"concise_voice": {"count": 1}})
        generate_with_teacher(one, annie(), suite, out, quotas(one))
        log = out.with_name("t.log.jsonl")
        log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
        requests = len(stub.bodies)
        again = generate_with_teacher(one, annie(), suite, out, quotas(one))
        assert len(stub.bodies) == requests and again.complete and again.attempts == 1


def test_a_file_is_continued_only_for_the_same(tmp_path: Path) -> None:
    out, suite = tmp_path / "t.jsonl", small_suite(tmp_path)
    with serving(by_parts()) as stub:
        one = teacher(stub.url, categories={"concise_voice": {"count": 1}})
        generate_with_teacher(one, annie(), suite, out, quotas(one))
        more = teacher(stub.url, categories={"concise_voice": {"count": 3}})
        assert generate_with_teacher(more, annie(), suite, out, quotas(more)).made == {"concise_voice": 3}
        other = teacher(stub.url, categories={"concise_voice": {"count": 3}}, model="another", temperature=0.1)
        with pytest.raises(UserError, match="changed: model, sampling"):
            generate_with_teacher(other, annie(), suite, out, quotas(other))
        (tmp_path / "mine.jsonl").write_text("{}\n")
        with pytest.raises(UserError, match="not made by a teacher"):
            generate_with_teacher(one, annie(), suite, tmp_path / "mine.jsonl", quotas(one))
    assert (tmp_path / "mine.jsonl").read_text() == "{}\n"


def test_limits_of_tokens_and_cost_hold_across_calls(tmp_path: Path) -> None:
    suite = small_suite(tmp_path)
    with serving(by_parts()) as stub:
        for limit, requests in (({"tokens": 330}, 3), ({"cost": 0.0004}, 2)):
            out = tmp_path / f"{requests}.jsonl"
            settings = teacher(stub.url, limits=limit, price={"input": 1.0, "output": 10.0})
            before = len(stub.bodies)
            for _ in range(2):  # the second call finds the limit used up and asks nothing
                report = generate_with_teacher(settings, annie(), suite, out, quotas(settings))
                assert report.stopped and report.spent.requests == requests == len(stub.bodies) - before


def test_requests_are_spaced_and_bounded(tmp_path: Path) -> None:
    with serving(by_parts()) as stub:
        settings = teacher(stub.url, requests_per_minute=1200, concurrency=3)
        started = time.monotonic()
        generate_with_teacher(settings, annie(), small_suite(tmp_path), tmp_path / "t.jsonl", quotas(settings))
        seconds = time.monotonic() - started
    assert seconds >= (len(stub.bodies) - 1) * 60 / 1200
    assert stub.most_at_once <= 3


def test_the_key_comes_from_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "teacher.yaml"
    path.write_text("url: http://127.0.0.1:9\nmodel: m\napi_key: sk-1\ncategories: {concise_voice: {count: 1}}\n")
    with pytest.raises(UserError, match="keys stand in no file"):
        load_teacher(path)
    with pytest.raises(ValueError, match="no name or password"):
        teacher("http://me:secret@127.0.0.1:9")
    settings = teacher("http://127.0.0.1:9", key_env="QAT_TEACHER_KEY")
    monkeypatch.delenv("QAT_TEACHER_KEY", raising=False)
    with pytest.raises(UserError, match="not in the environment"):
        generate_with_teacher(settings, annie(), small_suite(tmp_path), tmp_path / "t.jsonl", quotas(settings))


def test_settings_name_all_faults_at_once(tmp_path: Path) -> None:
    path = tmp_path / "teacher.yaml"
    path.write_text("url: ftp://x\nmodel: ''\ncategories: {mine: {count: 0}}\nlimits: {cost: -1}\nextra: {seed: 4}\n")
    with pytest.raises(UserError) as caught:
        load_teacher(path)
    for key in ("url:", "model:", "categories.mine.count:", "limits.cost:", "extra: seed cannot"):
        assert key in str(caught.value)
    path.write_text("url: http://x\nmodel: m\ncategories: {mine: {count: 1}}\n")
    with pytest.raises(UserError, match=r"categories\.mine: about is missing"):
        load_teacher(path)
    path.write_text("url: http://x\nmodel: m\ncategories: {direct_action: {count: 1}}\nlimits: {cost: 1}\n")
    with pytest.raises(UserError, match="needs price"):
        load_teacher(path)


def test_the_scenario_knows_what_was_written_before(tmp_path: Path) -> None:
    with serving(by_parts()) as stub:
        settings = teacher(stub.url, categories={"concise_voice": {"count": 3}})
        generate_with_teacher(settings, annie(), small_suite(tmp_path), tmp_path / "t.jsonl", quotas(settings))
    asked = [body["messages"][0]["content"] for body in stub.bodies if part_of(body) == "user"]
    first = json.loads(scenario(stub.bodies[0], 0)["choices"][0]["message"]["content"])["turns"][0]
    assert first not in asked[0] and first in asked[1] and first in asked[2]


def test_the_documented_teacher_makes_what_the_large_recipes_want(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    path = tmp_path / "teacher.yaml"
    path.write_text(page.split("```yaml\n# teacher.yaml")[1].split("```")[0], encoding="utf-8")
    settings = load_teacher(path)
    categories = {case.category for case in load_suite("annie_core").cases}
    assert set(settings.categories) == categories == set(ABOUT)
    assert sum(brief.count for brief in quotas(settings)) == 1000
