"""A teacher that misbehaves: each fault is counted under its name, and what was accepted stays."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
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
