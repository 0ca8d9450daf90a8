"""The runner against servers that misbehave: errors are counted by kind and apart from failures."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qat.behavior import client
from qat.behavior.records import read_meta, read_results
from qat.behavior.runner import RunSummary, run_suite
from qat.behavior.suite import load_suite
from qat.errors import UserError
from tests.unit.behavior.helpers import block, case, small_suite, write_suite
from tests.unit.behavior.raw_server import STREAM_END, STREAM_HEAD, event, message, sending, whole
from tests.unit.behavior.test_runner import Quiet, question


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(client, "ANSWER_TIMEOUT_S", 0.3)


def number(body: dict[str, Any]) -> int:
    return int(question(body).split()[1])


DEEP_CALL = [{"id": "1", "type": "function", "function": {"name": "search_memory", "arguments": "[" * 100_000}}]
BROKEN_CALL = [{"id": "1", "type": "function", "function": {"name": "search_memory", "arguments": '{"query": '}}]
SENT: list[list[bytes | float]] = [
    [message("Yes.")],
    [message("No.")],
    [message("yes " * 250_000)],
    [whole(b'{"choices": [{"message": {"content": "\xff"}}]}')],
    [message(None)],
    [message("Yes.", tool_calls=BROKEN_CALL)],
    [message("Yes.")[:70], b""],
    [1.0],
    [b"HTTP/1.1 400 X\r\ncontent-length: 8\r\n\r\ntoo long"],
    [b"HTTP/1.1 500 X\r\ncontent-length: 4\r\n\r\noops"],
    [whole(b"{}")],
    [message("Yes.", tool_calls=DEEP_CALL)],
]


def test_every_fault_is_counted_by_its_kind_and_apart_from_failures(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, len(SENT))
    started = time.monotonic()
    with sending(lambda body, n: SENT[number(body)]) as (url, bodies):
        summary = run_suite(suite, url, "m", "new", block(concurrency=3), tmp_path / "new.jsonl", Quiet())
    assert time.monotonic() - started < 20  # the reply of a megabyte holds nobody up
    assert summary.errors == 6
    assert summary.error_kinds == dict.fromkeys(
        ("not UTF-8", "connection", "timeout", "HTTP 400", "HTTP 500", "no chat completion"), 1
    )
    assert summary.malformed == {"null content": 1, "broken arguments": 2}
    results = {key.case: result for key, result in read_results(tmp_path / "new.jsonl").results.items()}
    failed = [name for name, result in results.items() if result.failed_checks]
    assert failed == [name for name in results if name in ("c-001", "c-004")]
    assert all(not (r.error and (r.passed or r.failed_checks)) for r in results.values())
    asked = [number(body) for body in bodies]
    assert [asked.count(n) for n in range(len(SENT))] == [1, 1, 1, 1, 1, 1, 4, 1, 1, 4, 1, 1]


def ask(folder: Path, checks: list[dict[str, Any]], send: Callable[..., Any], **more: Any) -> RunSummary:
    suite = load_suite(write_suite(folder, [case(0, checks=checks)]))
    with sending(send) as (url, _):
        return run_suite(suite, url, "m", "new", block(), folder / "new.jsonl", Quiet(), **more)


def streamed(body: dict[str, Any], n: int) -> list[bytes | float]:
    assert body["stream"] is True
    return [STREAM_HEAD, 0.15, event({"content": "Yes."}), event({}, "stop"), STREAM_END]


@pytest.mark.parametrize(("seconds", "passed"), [(0.1, 0), (5.0, 1)])
def test_a_check_of_the_first_token_makes_the_run_stream(tmp_path: Path, seconds: float, passed: int) -> None:
    summary = ask(tmp_path, [{"check": "max_first_token", "seconds": seconds}], streamed)
    assert (summary.passed, summary.errors) == (passed, 0)
    (result,) = read_results(tmp_path / "new.jsonl").results.values()
    assert result.first_token_s is not None
    assert 0.15 <= result.first_token_s <= result.latency_s
    meta = read_meta(tmp_path / "new.jsonl")
    assert meta is not None
    assert meta.stream


def test_a_check_that_cannot_judge_is_an_error(tmp_path: Path) -> None:
    checks = [{"check": "max_first_token", "seconds": 1}, {"check": "mentions", "any": ["nothing like it"]}]
    summary = ask(tmp_path, checks, lambda body, n: [message("Yes.")], stream=False)
    assert (summary.passed, summary.errors, list(summary.error_kinds)) == (0, 1, ["check max_first_token"])
    (result,) = read_results(tmp_path / "new.jsonl").results.values()
    assert result.failed_checks == []
    assert result.produced[0]["content"] == "Yes."


def test_streamed_and_whole_answers_are_not_mixed(tmp_path: Path) -> None:
    checks = [{"check": "mentions", "any": ["yes"]}]
    ask(tmp_path, checks, lambda body, n: [message("Yes.")])
    with pytest.raises(UserError, match="another stream"):
        ask(tmp_path, checks, streamed, stream=True)


def test_time_lost_to_failed_tries_is_not_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSES_S", (0.5,))
    checks = [{"check": "max_latency", "seconds": 0.4}]
    summary = ask(tmp_path, checks, lambda body, n: [message("Yes.")] if n else [b""])
    assert (summary.requests, summary.passed) == (2, 1)


@pytest.mark.parametrize(("depth", "error"), [(90, None), (200, "no chat completion"), (300, "no chat completion")])
def test_arguments_as_nested_objects_spoil_no_result_file(tmp_path: Path, depth: int, error: str | None) -> None:
    """Servers that send objects in the place of texts; a result nested 200 deep could be written and not be read."""
    nested = '{"function": {"name": "f", "arguments": {"a": ' + "[" * depth + "]" * depth + "}}}"
    body = '{"choices": [{"message": {"content": null, "tool_calls": [' + nested + "]}}]}"
    ask(tmp_path, [{"check": "not_empty"}], lambda body_, n: [whole(body.encode())])
    (result,) = read_results(tmp_path / "new.jsonl").results.values()
    assert result.error_kind == error
