"""The runner against a stub server: what is asked, what is kept, what happens when the server misbehaves or dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qat.behavior import client, runner
from qat.behavior.conversation import MAX_TOOL_ROUNDS
from qat.behavior.records import CaseResult, read_results
from qat.behavior.runner import repeated, run_suite
from qat.behavior.suite import load_suite
from qat.errors import UserError
from tests.unit.behavior.helpers import TOOLS, block, case, small_suite, write_suite
from tests.unit.behavior.stub_server import call, completion, serving


class Quiet:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def update(self, completed: int, note: str = "") -> None:
        self.steps.append(completed)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01, 0.01))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question(body: dict[str, Any]) -> str:
    return next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user")


def yes(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
    return 200, completion("Yes.")


def test_every_case_sampling_and_seed_is_asked_once(tmp_path: Path) -> None:
    suite = small_suite(tmp_path)
    samplings = [
        {"name": "greedy", "temperature": 0.0, "top_p": 1.0, "seeds": [0]},
        {"name": "warm", "temperature": 0.7, "top_p": 0.95, "seeds": [1, 2], "limit": 5},
    ]
    bar = Quiet()
    with serving(yes) as stub:
        summary = run_suite(suite, stub.url + "/v1", "m", "new", block(sampling=samplings), tmp_path / "new.jsonl", bar)
    asked = Counter((question(b), b["temperature"], b["top_p"], b["seed"]) for b in stub.bodies)
    wanted = {(f"question {n}", 0.0, 1.0, 0) for n in range(20)} | {
        (f"question {n}", 0.7, 0.95, s) for n in range(5) for s in (1, 2)
    }
    assert set(asked) == wanted
    assert set(asked.values()) == {1}
    assert (summary.asked, summary.resumed, summary.passed, summary.requests, summary.completion_tokens) == (
        30,
        0,
        30,
        30,
        210,
    )
    assert bar.steps == sorted(bar.steps)
    assert (bar.steps[0], bar.steps[-1]) == (0, 30)
    body = stub.bodies[0]
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert (body["model"], body["max_tokens"], body["tools"]) == ("m", 32, TOOLS)
    assert body["messages"][0] == {"role": "system", "content": "You are P."}


def test_results_hold_what_the_contract_says(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, count=1)
    with serving(lambda body, n: (200, completion("No 😊"))) as stub:
        run_suite(suite, stub.url, "m", "new", block(), tmp_path / "b" / "new.jsonl", Quiet())
    (line,) = lines(tmp_path / "b" / "new.jsonl")
    assert line.pop("latency_s") >= 0
    assert line == {
        "case": "c-000", "category": "k0", "arm": "new", "sampling": "greedy", "seed": 0,
        "produced": [{"role": "assistant", "content": "No 😊", "finish_reason": "stop"}],
        "passed": False,
        "failed_checks": [
            {"check": "mentions", "detail": "mentions none of 'yes'"},
            {"check": "no_emoji", "detail": "emoji 😊 (U+1F60A)"},
        ],
        "completion_tokens": 7, "first_token_s": None, "error": None,
    }  # fmt: skip


def test_connections_are_kept_and_bounded(tmp_path: Path) -> None:
    with serving(yes) as stub:
        run_suite(
            small_suite(tmp_path, 60), stub.url, "m", "new", block(concurrency=5), tmp_path / "new.jsonl", Quiet()
        )
    assert stub.connections <= 5
    assert 2 <= stub.most_at_once <= 5


def tool_case(number: int, **more: Any) -> dict[str, Any]:
    return case(number, tool_results={"search_memory": "[]"}, **more)


def test_scripted_results_are_fed(tmp_path: Path) -> None:
    checks = [
        {"check": "calls", "tool": "search_memory", "arguments": {"query": {"contains": "bike"}}},
        {"check": "mentions", "any": ["nothing"]},
    ]
    suite = load_suite(write_suite(tmp_path, [tool_case(0, checks=checks)]))

    def answer(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        if body["messages"][-1]["role"] == "tool":
            return 200, completion("I have nothing.")
        return 200, completion(None, [call("search_memory", '{"query": "bike"}')], "tool_calls")

    with serving(answer) as stub:
        summary = run_suite(suite, stub.url, "m", "new", block(), tmp_path / "new.jsonl", Quiet())
    assert (summary.passed, summary.requests, summary.completion_tokens) == (1, 2, 14)
    assert stub.bodies[1]["messages"][-2:] == [
        {"role": "assistant", "content": None, "tool_calls": [call("search_memory", '{"query": "bike"}')]},
        {"role": "tool", "tool_call_id": "id_search_memory", "content": "[]"},
    ]
    assert [m["content"] for m in lines(tmp_path / "new.jsonl")[0]["produced"]] == [None, "I have nothing."]


@pytest.mark.parametrize(
    ("name", "arguments", "requests"),
    [
        ("search_memory", '{"query": "x"}', MAX_TOOL_ROUNDS + 1),  # calls for ever: stopped after the last round
        ("search_memory", '{"query": ', 1),  # arguments that no template could render back
        ("other", "{}", 1),  # no scripted result
    ],
)
def test_a_conversation_ends_where_it_cannot_go_on(tmp_path: Path, name: str, arguments: str, requests: int) -> None:
    suite = load_suite(write_suite(tmp_path, [tool_case(0)]))
    with serving(lambda body, n: (200, completion("", [call(name, arguments)]))) as stub:
        summary = run_suite(suite, stub.url, "m", "new", block(), tmp_path / "new.jsonl", Quiet())
    assert (summary.requests, summary.passed, summary.errors) == (requests, 0, 0)


def test_wrong_answers_are_never_asked_again_and_server_faults_are(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    def answer(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]] | None:
        seen[question(body)] += 1
        turn = seen[question(body)]
        if question(body) == "question 1" and turn == 1:
            return 503, {"error": {"message": "busy"}}
        if question(body) == "question 2" and turn <= 2:
            return None
        return 200, completion("No.")

    with serving(answer) as stub:
        summary = run_suite(small_suite(tmp_path, 4), stub.url, "m", "new", block(), tmp_path / "new.jsonl", Quiet())
    assert seen == {"question 0": 1, "question 1": 2, "question 2": 3, "question 3": 1}
    assert (summary.asked, summary.passed, summary.errors) == (4, 0, 0)


def test_a_refused_case_is_an_error_and_no_answer_and_is_asked_again_next_time(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, 3)
    out = tmp_path / "new.jsonl"

    def refuse(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        return (400, {"error": {"message": "too long"}}) if question(body) == "question 1" else yes(body, number)

    with serving(refuse) as stub:
        summary = run_suite(suite, stub.url, "m", "new", block(), out, Quiet())
    assert (summary.passed, summary.errors) == (2, 1)
    assert [r.error for r in read_results(out).results.values() if r.error] == ["HTTP 400: too long"]
    with serving(yes) as stub:
        summary = run_suite(suite, stub.url, "m", "new", block(), out, Quiet())
    assert [question(b) for b in stub.bodies] == ["question 1"]
    assert (summary.asked, summary.resumed, summary.passed, summary.errors) == (1, 2, 3, 0)


def test_a_dying_server_loses_nothing(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, 40)
    out = tmp_path / "new.jsonl"

    def dying(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]] | None:
        return yes(body, number) if number < 17 else None

    with serving(dying) as stub, pytest.raises(UserError, match="20 questions in a row got no answer") as fault:
        run_suite(suite, stub.url, "m", "new", block(), out, Quiet())
    assert "answers so far are kept" in str(fault.value)
    assert "connection: " in str(fault.value)
    assert [line["error"] is None for line in lines(out)][:17] == [True] * 17
    assert sum(line["error"] is None for line in lines(out)) == 17
    with serving(yes) as stub:
        summary = run_suite(suite, stub.url, "m", "new", block(), out, Quiet())
    assert (summary.asked, summary.resumed, summary.passed, summary.errors) == (23, 17, 40, 0)
    answered = Counter(line["case"] for line in lines(out) if line["error"] is None)
    assert len(answered) == 40
    assert set(answered.values()) == {1}


def test_no_server_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not answer"):
        run_suite(small_suite(tmp_path, 2), "http://127.0.0.1:9", "m", "new", block(), tmp_path / "new.jsonl", Quiet())


@pytest.mark.parametrize("status", [401, 404])
def test_an_unknown_model_stops_at_once(tmp_path: Path, status: int) -> None:
    with (
        serving(lambda b, n: (status, {"error": {"message": "The model m does not exist."}})) as stub,
        pytest.raises(UserError) as fault,
    ):
        run_suite(
            small_suite(tmp_path, 30), stub.url, "m", "new", block(concurrency=2), tmp_path / "new.jsonl", Quiet()
        )
    assert "does not exist" in str(fault.value)
    assert len(stub.bodies) <= 4


def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(content: bytes) -> tuple[dict[str, Any], int]:
        raise ZeroDivisionError

    monkeypatch.setattr(client, "read_answer", broken)
    with serving(yes) as stub, pytest.raises(ExceptionGroup) as fault:
        run_suite(small_suite(tmp_path, 3), stub.url, "m", "new", block(), tmp_path / "new.jsonl", Quiet())
    assert fault.value.split(ZeroDivisionError)[0] is not None


def test_repeats_are_samplings_of_their_own(tmp_path: Path) -> None:
    samplings = [{"name": "warm", "temperature": 0.7, "top_p": 0.9, "seeds": [3, 4], "limit": 2}]
    asked = repeated(block(sampling=samplings), 3)
    with serving(yes) as stub:
        summary = run_suite(small_suite(tmp_path, 5), stub.url, "m", "new", asked, tmp_path / "new.jsonl", Quiet())
    assert summary.asked == 12
    keys = {(line["case"], line["sampling"], line["seed"]) for line in lines(tmp_path / "new.jsonl")}
    assert keys == {(f"c-{c:03d}", s, seed) for c in range(2) for s in ("warm", "warm_2", "warm_3") for seed in (3, 4)}
    assert {(b["temperature"], b["top_p"]) for b in stub.bodies} == {(0.7, 0.9)}
    with pytest.raises(UserError, match="name of another sampling"):
        repeated(block(sampling=[{"name": "a"}, {"name": "a_2"}]), 2)


def test_what_is_reported_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = tmp_path / "new.jsonl", []
    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.01)
        real(descriptor)

    class Watching(Quiet):
        def update(self, completed: int, note: str = "") -> None:
            seen.append((completed, out.read_bytes().count(b"\n") if out.is_file() else 0))

    monkeypatch.setattr(os, "fsync", slow)
    with serving(yes) as stub:
        run_suite(small_suite(tmp_path, 60), stub.url, "m", "new", block(), out, Watching())
    assert seen[-1] == (60, 60)
    assert all(reported <= there for reported, there in seen)


def test_errors_and_answers_that_alternate_do_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MAX_ERRORS_IN_A_ROW", 3)

    def shaky(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        return yes(body, number) if int(question(body).split()[1]) % 3 == 0 else (200, {"hello": 1})

    with serving(shaky) as stub:
        summary = run_suite(
            small_suite(tmp_path, 30), stub.url, "m", "new", block(concurrency=1), tmp_path / "new.jsonl", Quiet()
        )
    assert (summary.passed, summary.errors, summary.error_kinds) == (10, 20, {"no chat completion": 20})


def test_a_torn_last_line_is_dropped_and_asked_again(tmp_path: Path) -> None:
    suite, out = small_suite(tmp_path, 6), tmp_path / "new.jsonl"
    with serving(yes) as stub:
        run_suite(suite, stub.url, "m", "new", block(), out, Quiet())
        whole = out.read_bytes()
        torn = whole.splitlines()[-1]
        out.write_bytes(whole[:-30])
        summary = run_suite(suite, stub.url, "m", "new", block(), out, Quiet())
    assert summary.asked == 1
    assert {line["case"] for line in lines(out)} == {f"c-{n:03d}" for n in range(6)}
    assert len(lines(out)) == 6
    assert json.loads(torn)["case"] == lines(out)[-1]["case"]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    suite, out = small_suite(tmp_path, 6), tmp_path / "new.jsonl"
    with serving(yes) as stub:
        run_suite(suite, stub.url, "m", "new", block(), out, Quiet())
        content = out.read_bytes().splitlines(keepends=True)
        content[2] = b'{"case": 1}\n'
        out.write_bytes(b"".join(content))
        with pytest.raises(UserError, match="line 3"):
            run_suite(suite, stub.url, "m", "new", block(), out, Quiet())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": "other"}, "another model"),
        ({"arm": "other"}, "another arm"),
        ({"suite": 7}, "another suite content"),
        ({"temperature": 0.5}, "other settings"),
    ],
)
def test_results_made_otherwise_are_not_continued(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    out = tmp_path / "new.jsonl"
    with serving(yes) as stub:
        run_suite(small_suite(tmp_path, 6), stub.url, "m", "new", block(), out, Quiet())
        before = out.read_bytes()
        sampling = [{"name": "greedy", "temperature": change.get("temperature", 0.0), "top_p": 1.0, "seeds": [0]}]
        with pytest.raises(UserError, match=text):
            run_suite(
                small_suite(tmp_path, change.get("suite", 6)), stub.url,
                change.get("model", "m"), change.get("arm", "new"),
                block(sampling=sampling), out, Quiet(),
            )  # fmt: skip
    assert out.read_bytes() == before


def test_a_full_disk_is_said_and_the_results_before_it_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = os.write, []

    def full(descriptor: int, content: Any) -> int:
        if b'"sampling"' in bytes(content):
            written.append(1)
            if len(written) > 3:
                raise OSError(28, "No space left on device")
        return real(descriptor, content)

    monkeypatch.setattr(os, "write", full)
    with serving(yes) as stub, pytest.raises(UserError, match=r"(?i)disk is full"):
        run_suite(
            small_suite(tmp_path, 200), stub.url, "m", "new", block(concurrency=1), tmp_path / "new.jsonl", Quiet()
        )
    assert len(lines(tmp_path / "new.jsonl")) >= 3


PROGRAM = """
import sys
from pathlib import Path
from qat.behavior.runner import run_suite
from qat.behavior.suite import load_suite
from tests.unit.behavior.helpers import block
print("go", flush=True)
run_suite(load_suite(sys.argv[1]), sys.argv[2], "m", "new", block(), Path(sys.argv[3]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_runner_goes_on_where_it_was(tmp_path: Path, how: signal.Signals) -> None:
    suite_file = write_suite(tmp_path, [case(n) for n in range(300)])
    out = tmp_path / "new.jsonl"

    def slow(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        time.sleep(0.004)
        return yes(body, number)

    with serving(slow) as stub:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(suite_file), stub.url, str(out)],
            cwd=Path(__file__).resolve().parents[3], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while (len(stub.bodies) < 60) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(how)
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()
        kept = read_results(out).results
        answered_before = len(stub.bodies)
        assert 60 - 2 * 4 - 20 <= len(kept) <= answered_before
        summary = run_suite(load_suite(suite_file), stub.url, "m", "new", block(concurrency=16), out, Quiet())
    assert summary.resumed == len(kept)
    assert summary.passed == 300
    assert all(isinstance(r, CaseResult) for r in read_results(out).results.values())
    assert len(lines(out)) == 300


def _free_stub() -> tuple[subprocess.Popen[bytes], str]:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("stub_server.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}"


def test_five_hundred_questions_a_second_of_cpu(tmp_path: Path) -> None:
    """1,000 generated cases with all their checks, best of three.

    CPU time of the runner's own process counts, so that a busy machine does not fail it.
    """
    suite = load_suite("annie_tiny_full")
    process, url = _free_stub()
    rates = []
    try:
        for turn in range(3):
            wall, cpu = time.monotonic(), time.process_time()
            summary = run_suite(suite, url, "m", "new", block(concurrency=16), tmp_path / f"{turn}.jsonl", Quiet())
            wall, cpu = time.monotonic() - wall, time.process_time() - cpu
            assert summary.asked == 1000
            rates.append(summary.requests / cpu)
            print(f"{summary.requests} requests: {summary.requests / wall:.0f} a second, {rates[-1]:.0f} a CPU second")
            if rates[-1] >= 500:
                break
    finally:
        process.communicate(b"", timeout=10)
    assert max(rates) >= 500
