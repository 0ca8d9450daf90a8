"""The client and servers that misbehave: what is read, what is tried again, and how each fault is named."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from qat.behavior import answers, client
from qat.behavior.answers import AnsweredBy, BadAnswer
from qat.behavior.client import ChatClient
from qat.errors import UserError
from tests.unit.behavior.raw_server import STREAM_END, STREAM_HEAD, chunk, event, message, sending, whole


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(client, "ANSWER_TIMEOUT_S", 0.3)


def chat(url: str, stream: bool = False, times: int = 1) -> AnsweredBy:
    async def ask() -> AnsweredBy:
        async with ChatClient(url, "m", 32, 1, stream) as asked:
            for _ in range(times):
                answer = await asked.chat([{"role": "user", "content": "hi"}], [], 0.0, 1.0, 5)
            return answer

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (whole(b'{"choices": [{"message": {"content": "caf\xe9"}}]}'), "not UTF-8: byte 41"),
        (whole(b'{"choices": [{"message": {"content": "\\ud83d"}}]}'), "not Unicode: half of a surrogate"),
        (whole(b"<html>gateway</html>"), "not JSON: <html>"),
        (whole(b"[" * 100_000), "not JSON"),
        (whole(b""), "not JSON"),
        (whole(b'{"hello": 1}'), "no chat completion: {"),
        (whole(b"[]"), "no chat completion"),
        (whole(b'{"choices": []}'), "no chat completion"),
        (whole(b'{"choices": [{"message": null}]}'), "no chat completion"),
        (message(7), "no chat completion: the content is a number"),
        (message([{"type": "text"}]), "no chat completion: the content is a list"),
        (message(None, tool_calls={"a": 1}), "no chat completion: tool_calls"),
        (message(None, tool_calls=[{"function": {"arguments": "{}"}}]), "no chat completion: tool_calls"),
        (b"HTTP/1.1 422 X\r\ncontent-length: 3\r\n\r\nbad", "HTTP 422: bad"),
    ],
)
def test_an_answer_that_cannot_be_read_is_named_and_not_asked_again(sent: bytes, kind: str) -> None:
    with sending(lambda body, n: [sent]) as (url, bodies), pytest.raises(BadAnswer) as fault:
        chat(url)
    assert str(fault.value).startswith(kind)
    assert len(bodies) == 1


def test_whole_characters_written_as_escapes_are_text() -> None:
    with sending(lambda body, n: [whole(rb'{"choices": [{"message": {"content": "\ud83d\ude00"}}]}')]) as (url, _):
        assert chat(url).message["content"] == "😀"


@pytest.mark.parametrize(
    ("content", "more"),
    [
        (None, {}),
        ("", {}),
        ("x" * 1_000_000, {}),
        (None, {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}]}),
    ],
)
def test_what_a_model_may_do_wrong_passes_through(content: str | None, more: dict[str, Any]) -> None:
    with sending(lambda body, n: [message(content, **more)]) as (url, _):
        answer = chat(url)
    assert answer.message == {"role": "assistant", "content": content, "finish_reason": "stop", **more}
    assert answer.first_token_s is None


def test_an_endless_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_ANSWER_BYTES", 1 << 20)
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", 1 << 20)
    with sending(lambda body, n: [message("x" * 3_000_000)]) as (url, _), pytest.raises(BadAnswer, match="too large"):
        chat(url)


@pytest.mark.parametrize(
    "pieces",
    [
        [2.0, message("late")],  # silent from the start
        [message("late")[:60], 2.0],  # silent in the middle
    ],
)
def test_silence_is_a_timeout_and_not_asked_again(pieces: list[bytes | float]) -> None:
    with sending(lambda body, n: pieces) as (url, bodies), pytest.raises(BadAnswer, match=r"^timeout: .* 0\.3 s"):
        chat(url)
    assert len(bodies) == 1


def test_dripping_bytes_end_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "DEADLINE_S", 0.4)
    drip = [piece for byte in message("slow") for piece in (bytes([byte]), 0.05)]
    with sending(lambda body, n: drip) as (url, _), pytest.raises(BadAnswer, match=r"^timeout: .* 0\.4 s"):
        chat(url)


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_closes_in_the_middle_is_tried_again(stream: bool) -> None:
    good = STREAM_HEAD + event({"content": "Yes."}, "stop") + STREAM_END if stream else message("Yes.")
    torn = good[: len(good) // 2]
    with sending(lambda body, n: [good] if n == 2 else [torn, b""]) as (url, bodies):
        assert chat(url, stream).message["content"] == "Yes."
    assert len(bodies) == 3
    with sending(lambda body, n: [torn, b""]) as (url, bodies), pytest.raises(BadAnswer, match=r"^connection: "):
        chat(url, stream)
    assert len(bodies) == 4


def test_nobody_listens() -> None:
    with pytest.raises(UserError, match="does not answer"):
        chat("http://127.0.0.1:9")


def test_a_stream_is_put_together_and_timed() -> None:
    def call(index: int, name: str | None, arguments: str) -> dict[str, Any]:
        function = {"arguments": arguments} | ({"name": name} if name else {})
        return {"tool_calls": [{"index": index, "function": function} | ({"id": f"c{index}"} if name else {})]}

    events = [
        event({"role": "assistant", "content": ""}), 0.1, event({"reasoning_content": "Hm."}), 0.1,
        event({"content": "ನಮ"}), event({"content": "ಸ್ಕಾರ"}), event(call(1, "b", "")), event(call(0, "a", '{"x"')),
        event(call(0, None, ": 1}")), event(call(1, None, "{}")), event({}, "tool_calls"),
        chunk(b'data: {"choices": [], "usage": {"completion_tokens": 9}}\n\n'),
    ]  # fmt: skip
    with sending(lambda body, n: [STREAM_HEAD, *events, STREAM_END]) as (url, bodies):
        answer = chat(url, stream=True)
    assert answer.message == {
        "role": "assistant", "content": "ನಮಸ್ಕಾರ", "reasoning_content": "Hm.", "finish_reason": "tool_calls",
        "tool_calls": [
            {"id": "c0", "type": "function", "function": {"name": "a", "arguments": '{"x": 1}'}},
            {"id": "c1", "type": "function", "function": {"name": "b", "arguments": "{}"}},
        ],
    }  # fmt: skip
    assert answer.completion_tokens == 9
    assert answer.first_token_s is not None
    assert 0.1 <= answer.first_token_s < 0.2 <= answer.seconds
    assert (bodies[0]["stream"], bodies[0]["stream_options"], bodies[0]["seed"]) == (True, {"include_usage": True}, 5)


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_are_asked_for_and_kept(stream: bool) -> None:
    pieces = [
        chunk(b'data: {"choices": [{"delta": {"content": "a"}, "token_ids": [5, 9]}]}\n\n'),
        chunk(b'data: {"choices": [{"delta": {"content": "b"}, "token_ids": [2], "finish_reason": "stop"}]}\n\n'),
    ]
    body = {"choices": [{"message": {"content": "ab"}, "finish_reason": "stop", "token_ids": [5, 9, 2]}]}
    sent = [STREAM_HEAD, *pieces, STREAM_END] if stream else [whole(json.dumps(body).encode())]

    async def ask(url: str) -> AnsweredBy:
        async with ChatClient(url, "m", 32, 1, stream, token_ids=True) as asked:
            return await asked.chat([{"role": "user", "content": "hi"}], [], 0.0, 1.0, 5)

    with sending(lambda body, n: sent) as (url, bodies):
        answer = asyncio.run(ask(url))
        assert bodies[0]["return_token_ids"] is True
        chat(url, stream)
    assert "return_token_ids" not in bodies[1], "other servers may refuse it"
    expected = {"role": "assistant", "content": "ab", "finish_reason": "stop", "token_ids": [5, 9, 2]}
    assert answer.message == expected


def test_events_torn_anywhere_read_the_same() -> None:
    text = b"".join(
        b"data: " + json.dumps({"choices": [{"delta": {"content": piece}}]}, ensure_ascii=False).encode() + b"\r\n\r\n"
        for piece in ("a", "😀", "ಕ")
    )
    for size in range(1, 12):
        answer = answers.StreamedAnswer()
        for start in range(0, len(text), size):
            answer.feed(text[start : start + size])
        assert answer.result() is None
        answer.feed(b"data: [DONE]\n")
        result = answer.result()
        assert result is not None
        assert result[0]["content"] == "a😀ಕ"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b'data: {"error": {"message": "out of memory"}}\n\n', "error in the stream: .*out of memory"),
        (b"data: {oh\n\n", "not JSON"),
        (b'data: {"choices": [{"delta": {"content": "caf\xe9"}}]}\n\n', "not UTF-8"),
        (b'data: {"choices": [{"delta": {"tool_calls": [{"function": {}}]}}]}\n\n', "no chat completion"),
        (b'data: {"choices": [{"delta": {"content": 7}, "finish_reason": "stop"}]}\n\n', "no chat completion"),
    ],
)
def test_a_stream_that_cannot_be_read_is_named(data: bytes, kind: str) -> None:
    with (
        sending(lambda body, n: [STREAM_HEAD, chunk(data), STREAM_END]) as (url, bodies),
        pytest.raises(BadAnswer, match=f"^{kind}"),
    ):
        chat(url, stream=True)
    assert len(bodies) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_is_kept(stream: bool) -> None:
    good = STREAM_HEAD + event({"content": "Yes."}, "stop") + STREAM_END if stream else message("Yes.")
    with sending(lambda body, n: [good]) as (url, bodies):
        chat(url, stream, times=3)
    assert [body["connection"] for body in bodies] == [1, 1, 1]


def test_the_model_is_the_servers_first() -> None:
    with sending(lambda body, n: [whole(b'{"data": [{"id": "annie"}, {"id": "other"}]}')]) as (url, _):
        assert client.first_model(f"{url}/v1/") == "annie"
    with sending(lambda body, n: [whole(b'{"data": []}')]) as (url, _), pytest.raises(UserError, match="which models"):
        client.first_model(url)
