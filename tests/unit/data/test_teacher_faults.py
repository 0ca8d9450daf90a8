"""A teacher that misbehaves: each fault is counted under its name, and what was accepted stays."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from qat.data.generate.teacher import TeacherReport, client, generate_with_teacher, quotas
from qat.errors import UserError
from tests.unit.behavior.raw_server import Piece, message, sending, whole
from tests.unit.behavior.stub_server import call, completion, serving
from tests.unit.data.teaching import annie, by_parts, part_of, persona, small_suite, teacher


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSES_S", (0.0, 0.0))


def _run(tmp_path: Path, url: str, **more: Any) -> TeacherReport:
    settings = teacher(url, **{"attempts": 1, "categories": {"concise_voice": {"count": 2}}, **more})
    return generate_with_teacher(settings, annie(), small_suite(tmp_path), tmp_path / "t.jsonl", quotas(settings))


def _raw(tmp_path: Path, bad: Sequence[Piece], **more: Any) -> tuple[TeacherReport, int]:
    """The persona's first reply is `bad`, everything else is well; the report and the requests made."""
    spoilt = []

    def prepared(body: dict[str, Any], number: int) -> Sequence[Piece]:
        if part_of(body) == "persona" and not spoilt:
            spoilt.append(number)
            return bad
        return [whole(json.dumps(by_parts()(body, number)[1]).encode())]

    with sending(prepared) as (url, bodies):
        return _run(tmp_path, url, **more), len(bodies)


BIG = "word " * 200_000
HUGE = whole(b'{"choices": [{"message": {"content": "' + b"a" * (17 << 20))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([whole(b"not json at all")], "answer: not JSON"),
        ([whole(b'{"choices": [{"message": {"content": "\xff\xfe"}}]}')], "answer: not UTF-8"),
        ([whole(b'{"choices": [{"message": {"content": "\\ud83d"}}]}')], "answer: not Unicode"),
        ([whole(b'{"choices": []}')], "answer: no chat completion"),
        ([whole(b"[1, 2]")], "answer: no chat completion"),
        ([message(7)], "answer: no chat completion"),
        ([message([{"type": "text", "text": "hi"}])], "answer: no chat completion"),
        ([HUGE, b""], "answer: too large"),
        ([b"HTTP/1.1 400 Bad\r\ncontent-length: 4\r\n\r\noops"], "answer: HTTP 400"),
        ([b"HTTP/1.1 302 Found\r\nlocation: http://elsewhere/\r\ncontent-length: 0\r\n\r\n"], "answer: HTTP 302"),
        ([message(None)], "empty"),
        ([message("  \n ")], "empty"),
        ([message(BIG)], "too long"),
        ([message(None, tool_calls=[call("search_memory", '{"query": "x')])], "call"),
        ([message(None, tool_calls=[call("search_memory", '["x"]')])], "call"),
        ([message(None, tool_calls=[call("open_door", "{}")])], "call"),
        ([message(None, tool_calls="search_memory")], "answer: no chat completion"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_used_is_named_and_the_rest_goes_on(tmp_path: Path, bad: Sequence[Piece], reason: str) -> None:
    report, _ = _raw(tmp_path, bad, revisions=0)
    assert report.rejected == {reason: 1}
    assert report.made == {"concise_voice": 1}  # the other of the two
    assert (tmp_path / "t.jsonl").read_bytes().count(b"\n") == 1


def test_null_and_broken_calls_are_mended_by_a_revision(tmp_path: Path) -> None:
    for bad in (message(None), message(None, tool_calls=[call("search_memory", '{"query": "x')])):
        folder = tmp_path / str(len(bad))
        folder.mkdir()
        report, _ = _raw(folder, [bad], revisions=1)
        assert report.complete and report.rejected == {}


def test_a_stream_that_closes_midway_is_asked_again(tmp_path: Path) -> None:
    torn = b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n" + b'{"choices": [{"mess'
    report, requests = _raw(tmp_path, [torn, b""])
    assert report.complete and report.rejected == {}
    assert requests == 2 * 2 + 1
    assert report.spent.requests == 4  # only answers are counted


def test_a_server_that_always_closes_midway(tmp_path: Path) -> None:
    with sending(lambda body, number: [b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", b""]) as (url, bodies):
        report = _run(tmp_path, url)
    assert report.rejected == {"answer: connection": 2} and len(bodies) == 2 * 3


def test_a_slow_server_is_not_asked_twice(tmp_path: Path) -> None:
    """Silent, and dripping for ever: neither is waited for beyond the limit of a whole answer."""
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"
    for number, slow in enumerate(([8.0], [head, *[b" ", 0.1] * 80])):
        folder = tmp_path / str(number)
        folder.mkdir()
        started = time.monotonic()
        report, requests = _raw(folder, slow, timeout_s=0.4)
        assert report.rejected == {"answer: timeout": 1} and report.made == {"concise_voice": 1}
        assert requests == 4 and time.monotonic() - started < 6


def test_a_busy_server_is_waited_for_as_long_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted)
    for header, pause in (
        (b"retry-after: 17\r\n", 17),
        (b"retry-after: 9999\r\n", 120),
        (b"", 0),
        (b"retry-after: x\r\n", 0),
    ):
        folder = tmp_path / str(len(waited))
        folder.mkdir()
        busy = b"HTTP/1.1 429 Slow down\r\n" + header + b"content-length: 0\r\n\r\n"
        report, requests = _raw(folder, [busy])
        assert report.complete and requests == 5 and waited[-1] == pause


def test_a_date_to_come_back_at(monkeypatch: pytest.MonkeyPatch) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    assert 37 <= (client._seconds(soon) or 0) <= 40
    assert client._seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0  # long past
    assert client._seconds("Fri, 31 Dec 2100 23:59:59 GMT") == client.LONGEST_PAUSE_S
    assert client._seconds("soon") is None and client._seconds(None) is None


@pytest.mark.parametrize("status", [b"500 Oops", b"503 Busy", b"529 Overloaded", b"429 Slow"])
def test_a_server_that_fails_for_a_while_and_one_that_fails_for_ever(tmp_path: Path, status: bytes) -> None:
    bad = b"HTTP/1.1 " + status + b"\r\ncontent-length: 3\r\n\r\nbad"
    report, requests = _raw(tmp_path, [bad])
    assert report.complete and report.rejected == {} and requests == 5 and report.spent.requests == 4
    (tmp_path / "b").mkdir()
    with sending(lambda body, number: [bad]) as (url, bodies):
        report = _run(tmp_path / "b", url)
    assert report.rejected == {f"answer: HTTP {status[:3].decode()}": 2} and len(bodies) == 2 * 3
    assert report.spent.requests == 0 and (tmp_path / "b" / "t.jsonl").read_bytes() == b""


THOUGHTS = '<think>\nThe user {wants} a number. I say {"turns": 5}.\n</think>\n\n'


@pytest.mark.parametrize("opening", ["<think>", ""], ids=["tagged", "opened by the template"])
def test_thinking_before_an_answer_is_dropped_in_every_part(tmp_path: Path, opening: str) -> None:
    """As a thinking model behind a server without a reasoning parser answers."""

    def thinking(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        status, answer = by_parts()(body, number)
        said = answer["choices"][0]["message"]
        if said["content"]:
            said["content"] = opening + THOUGHTS.removeprefix("<think>") + said["content"]
        return status, answer

    with serving(thinking) as stub:
        report = _run(tmp_path, stub.url, categories={"concise_voice": {"count": 1}, "honest_memory": {"count": 1}})
    assert report.complete and report.rejected == {}
    text = (tmp_path / "t.jsonl").read_text(encoding="utf-8")
    assert "think" not in text and "wants" not in text and '"[]"' in text


@pytest.mark.parametrize("said", ["<think>\nFive, or six", "It is five. <think>or six?</think> Five."])
def test_thinking_without_end_or_in_the_middle_is_refused(tmp_path: Path, said: str) -> None:
    def open_ended(body: dict[str, Any], number: int) -> dict[str, Any]:
        return completion(said) if number == 1 else persona(body, number)

    with serving(by_parts(persona=open_ended)) as stub:
        report = _run(tmp_path, stub.url)
    assert report.rejected == {"thinking": 1} and report.made == {"concise_voice": 1}


def test_another_language_is_handed_back_and_a_user_of_another_refused(tmp_path: Path) -> None:
    german = "Das ist eine sehr gute Frage, und ich weiß nicht, was ich dazu sagen soll."

    def abroad(body: dict[str, Any], number: int) -> dict[str, Any]:
        return persona(body, number) if "<review>" in body["messages"][0]["content"] else completion(german)

    categories = {"concise_voice": {"count": 1}}
    with serving(by_parts(persona=abroad)) as stub:
        report = _run(tmp_path, stub.url, languages=["en", "kn"], categories=categories)
    assert report.complete and report.spent.requests == 3 and german not in (tmp_path / "t.jsonl").read_text("utf-8")
    for name, part in (("a", {"persona": lambda body, number: completion(german)}), ("b", {"user": _german_user})):
        (tmp_path / name).mkdir()
        with serving(by_parts(**part)) as stub:
            report = _run(tmp_path / name, stub.url, languages=["en", "kn"], categories=categories)
        assert report.rejected == {"language": 1}
    (tmp_path / "c").mkdir()
    with serving(by_parts(persona=lambda body, number: completion("ಹೌದು, ಅದು ತುಂಬಾ ಚೆನ್ನಾಗಿದೆ."))) as stub:
        assert _run(tmp_path / "c", stub.url, languages=["en", "kn"], categories=categories).complete
    with pytest.raises(ValueError, match="klingon is not known"):
        teacher("http://127.0.0.1:9", languages=["klingon"])


def _german_user(body: dict[str, Any], number: int) -> dict[str, Any]:
    return completion(json.dumps({"turns": ["Was ist das für ein Tier und wo lebt es denn?"], "world": ""}))


def test_a_teacher_that_says_the_same_again_is_told_so(tmp_path: Path) -> None:
    """Two may say it; the third is asked for other words, and rejected where there are none."""
    phrase = "I could not find anything about that in my notes."
    reviews: list[str] = []

    def worn(body: dict[str, Any], number: int) -> dict[str, Any]:
        system = body["messages"][0]["content"]
        reviews.extend([system] if "<review>" in system else [])
        return completion(phrase)

    def mended(body: dict[str, Any], number: int) -> dict[str, Any]:
        return completion("Nothing there, sorry to say." if "<review>" in body["messages"][0]["content"] else phrase)

    more = {"alike": 2, "categories": {"concise_voice": {"count": 4}}, "revisions": 1}
    with serving(by_parts(persona=worn)) as stub:
        report = _run(tmp_path, stub.url, **more)
        assert report.rejected == {"one phrase": 2} and report.made == {"concise_voice": 2}
        assert len(reviews) == 2 and "2 earlier replies say nearly this" in reviews[0]
        # What is on disk counts for the next call too.
        again = _run(tmp_path, stub.url, **more, attempts=2)
        assert again.rejected == {"one phrase": 6} and again.made == {"concise_voice": 2}
    (tmp_path / "b").mkdir()
    with serving(by_parts(persona=mended)) as stub:
        assert _run(tmp_path / "b", stub.url, **more).complete


def test_nobody_there(tmp_path: Path) -> None:
    with sending(lambda body, number: []) as (url, _):
        pass
    with pytest.raises(UserError, match="does not answer") as caught:
        _run(tmp_path, url)
    assert "what was accepted so far is kept" in str(caught.value)


def test_a_server_that_goes_away_leaves_what_was_accepted(tmp_path: Path) -> None:
    with serving(by_parts()) as stub:
        good = teacher(stub.url, categories={"concise_voice": {"count": 1}})
        suite, out = small_suite(tmp_path), tmp_path / "t.jsonl"
        generate_with_teacher(good, annie(), suite, out, quotas(good))
        kept = out.read_bytes()
        url = stub.url
    gone = teacher(url, categories={"concise_voice": {"count": 3}})
    with pytest.raises(UserError, match="does not answer"):
        generate_with_teacher(gone, annie(), suite, out, quotas(gone))
    assert out.read_bytes() == kept


def test_a_refused_key_ends_the_run_and_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    refusal = b"HTTP/1.1 401 No\r\ncontent-length: 22\r\n\r\nwrong: sk-very-secret!"
    with sending(lambda body, number: [refusal]) as (url, bodies), pytest.raises(UserError) as caught:
        _run(tmp_path, url, key_env="SOME_KEY")
    assert len(bodies) == 1 and "HTTP 401" in str(caught.value) and "secret" not in str(caught.value)
    assert b"secret" not in (tmp_path / "t.log.jsonl").read_bytes()


def test_a_teacher_that_never_answers_readably_ends_the_run(tmp_path: Path) -> None:
    with sending(lambda body, number: [whole(b"<html>")]) as (url, bodies), pytest.raises(UserError) as caught:
        _run(tmp_path, url, categories={"concise_voice": {"count": 50}})
    assert "8 conversations in a row" in str(caught.value) and len(bodies) == 8


def test_token_limits_need_a_server_that_counts(tmp_path: Path) -> None:
    with (
        sending(lambda body, number: [message("hello")]) as (url, _),
        pytest.raises(UserError, match=r"limits\.requests"),
    ):
        _run(tmp_path, url, limits={"tokens": 1000})


def test_nonsense_instead_of_a_scenario_or_a_tools_result(tmp_path: Path) -> None:
    answers = iter(["I would rather not.", '{"turns": "hello"}', '{"turns": []}', json.dumps({"turns": ["x" * 601]})])
    with serving(by_parts(user=lambda body, number: completion(next(answers)))) as stub:
        report = _run(tmp_path, stub.url, categories={"concise_voice": {"count": 4}})
    assert report.rejected == {"scenario": 4}
    (tmp_path / "b").mkdir()
    with serving(by_parts(tool=lambda body, number: completion("``` \n```"))) as stub:
        report = _run(tmp_path / "b", stub.url, categories={"honest_memory": {"count": 1}})
    assert report.rejected == {"tool result": 1}


def test_an_answer_cut_by_the_length_limit_is_no_reply(tmp_path: Path) -> None:
    def cut(body: dict[str, Any], number: int) -> dict[str, Any]:
        return completion("It is very", finish="length") if number == 1 else persona(body, number)

    with serving(by_parts(persona=cut)) as stub:
        report = _run(tmp_path, stub.url, revisions=0)
    assert report.rejected == {"cut": 1} and report.made == {"concise_voice": 1}
