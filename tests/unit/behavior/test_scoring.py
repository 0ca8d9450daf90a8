"""Replies scored by a stub of vLLM that knows a toy model: the prompts sent, the numbers, and servers that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import entropy

from qat.behavior import client, scoring
from qat.behavior.records import divergence_path, read_results
from qat.behavior.runner import run_suite
from qat.behavior.scoring import distributions_path, diverge, measure, record_reference
from qat.behavior.suite import Suite, load_suite
from qat.cli import main
from qat.errors import UserError
from tests.unit.behavior.helpers import block, case, write_suite
from tests.unit.behavior.stub_server import call, completion, serving
from tests.unit.behavior.test_runner import Quiet

VOCABULARY = 64


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSES_S", (0.01,))


def ids(messages: list[dict[str, Any]]) -> list[int]:
    """A "tokenizer": equal messages give equal ids."""
    text = json.dumps(messages, sort_keys=True)
    return [ord(letter) % VOCABULARY for letter in text[-40:]] + [len(messages), len(text) % VOCABULARY]


def logits(context: list[int], arm: float) -> np.ndarray:
    rng = np.random.default_rng(sum(context) + 7 * len(context))
    values = log_softmax(rng.normal(scale=4.0, size=VOCABULARY) + arm * rng.normal(size=VOCABULARY))
    assert isinstance(values, np.ndarray)
    return values


class Toy:
    """Answers chats with a call and a sentence, tokenizes, and gives prompt log probabilities as vLLM does."""

    def __init__(self, arm: float = 0.0) -> None:
        self.arm = arm
        self.chats: list[dict[str, Any]] = []
        self.scored: list[list[int]] = []

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        last = body["messages"][-1]
        if last["role"] == "user" and "remember" in last["content"]:
            answer = completion(None, [call("search_memory", '{"query": "x"}')], "tool_calls")
        else:
            answer = completion("Yes.")
        if body.get("return_token_ids"):
            answer["choices"][0]["token_ids"] = [len(body["messages"]), 5, 9, 2]
        return answer

    def position(self, context: list[int], token: int) -> dict[str, Any]:
        known = logits(context, self.arm)
        listed = {*np.argsort(-known)[: scoring.TOP].tolist(), token}
        return {str(one): {"logprob": float(known[one]), "rank": 1, "decoded_token": "x"} for one in listed}

    def __call__(self, body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        if "add_generation_prompt" in body:
            return 200, {"tokens": ids(body["messages"]), "count": 1}
        if "prompt_logprobs" in body:
            prompt = body["prompt"]
            self.scored.append(prompt)
            listed = [None, *(self.position(prompt[:at], prompt[at]) for at in range(1, len(prompt)))]
            return 200, {"choices": [{"text": "", "prompt_logprobs": listed}]}
        self.chats.append(body)
        return 200, self.reply(body)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """Ten plain cases, one whose tool answers, one of two turns."""
    cases = [case(n) for n in range(10)]
    cases.append(case(10, messages=[{"role": "user", "content": "remember?"}], tool_results={"search_memory": "[]"}))
    cases.append(case(11, messages=[], turns=[{"user": "one"}, {"user": "remember two"}]))
    return load_suite(write_suite(tmp_path, cases))


def asked(suite: Suite, url: str, out: Path, token_ids: bool = True) -> None:
    run_suite(suite, url, "m", out.stem, block(), out, Quiet(), token_ids=token_ids)


def test_every_reply_is_scored_behind_the_prompt_that_it_answered(suite: Suite, tmp_path: Path) -> None:
    toy = Toy()
    with serving(toy) as stub:
        asked(suite, stub.url, tmp_path / "bf16.jsonl")
        found = diverge(suite, tmp_path / "bf16.jsonl", tmp_path / "bf16.jsonl", stub.url, "m", block())
    sent = sorted([*ids(body["messages"]), len(body["messages"]), 5, 9, 2] for body in toy.chats)
    assert len(sent) == 10 + 2 + 2
    assert sorted(toy.scored) == sorted(sent * 2)  # once for the distributions, once against itself
    assert (found.overall.kl, found.overall.top1, found.unscored) == (0.0, 1.0, 0)
    assert (found.overall.tokens, found.overall.cases) == (14 * 4, 12)
    assert json.loads(divergence_path(tmp_path / "bf16.jsonl").read_text()) == found.to_json()
    # What is recorded for scoring is not sent back to the server.
    assert "token_ids" not in json.dumps([body["messages"] for body in toy.chats])


def test_the_numbers_are_those_of_the_full_distributions(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "TOP", VOCABULARY)
    reference, arm, out = Toy(), Toy(arm=0.5), tmp_path / "bf16.jsonl"
    with serving(reference) as stub:
        asked(suite, stub.url, out)
        record_reference(suite, out, stub.url, "m", block(3), Quiet())
    with serving(arm) as stub:
        found = measure(tmp_path / "bf16.jsonl", suite, stub.url, "m", concurrency=3, progress=Quiet())
    contexts = [(prompt[:at], prompt[at]) for prompt in reference.scored for at in range(len(prompt) - 4, len(prompt))]
    full = [entropy(np.exp(logits(c, 0.0)), np.exp(logits(c, 0.5))) for c, _ in contexts]
    same = [np.argmax(logits(c, 0.0)) == np.argmax(logits(c, 0.5)) for c, _ in contexts]
    assert found.overall.kl == pytest.approx(np.mean(full), abs=1e-4)
    assert found.overall.top1 == pytest.approx(np.mean(same)) and 0 < found.overall.top1 < 1
    assert set(found.categories) == {"k0", "k1"}
    assert sum(part.tokens for part in found.categories.values()) == found.overall.tokens


def test_only_the_first_cases_are_scored_where_the_block_says_so(suite: Suite, tmp_path: Path) -> None:
    toy, out = Toy(), tmp_path / "bf16.jsonl"
    with serving(toy) as stub:
        asked(suite, stub.url, out)
        few = block().model_copy(update={"divergence_cases": 3})
        found = diverge(suite, out, out, stub.url, "m", few)
    assert found.overall.cases == 3
    rows = [json.loads(line)["case"] for line in distributions_path(out).read_text().splitlines()[1:]]
    assert sorted(rows) == ["c-000", "c-001", "c-002"]


def test_answers_that_cannot_be_used_are_counted_and_a_failing_server_leaves_no_file(
    suite: Suite, tmp_path: Path
) -> None:
    out = tmp_path / "bf16.jsonl"
    toy = Toy()

    def moody(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]] | None:
        if "prompt_logprobs" in body:
            toy.scored.append(body["prompt"])
            faults: dict[int, tuple[int, dict[str, Any]] | None] = {
                1: (400, {"message": "too long"}),
                2: (200, {"choices": [{"prompt_logprobs": [None, None]}]}),
                3: (200, {"choices": []}),
            }
            if (turn := len(toy.scored)) in faults:
                return faults[turn]
        return toy(body, number)

    with serving(moody) as stub:
        asked(suite, stub.url, out)
        assert record_reference(suite, out, stub.url, "m", block(1), Quiet()) == 3
        assert measure(out, suite, stub.url, "m", concurrency=1, progress=Quiet()).overall.tokens == 11 * 4
    distributions_path(out).unlink()
    with (
        serving(lambda body, n: toy(body, n) if "add_generation_prompt" in body else (400, {"message": "no"})) as stub,
        pytest.raises(UserError, match="Not one reply"),
    ):
        record_reference(suite, out, stub.url, "m", block(2), Quiet())
    assert not [path for path in tmp_path.iterdir() if "distributions" in path.name]


def test_a_server_that_is_no_vllm_and_answers_without_token_ids(suite: Suite, tmp_path: Path) -> None:
    out = tmp_path / "bf16.jsonl"
    plain = Toy()

    def no_vllm(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        if "messages" not in body:
            return 200, {"choices": [{"text": "Yes."}]}
        return 200, plain.reply(body) | {"tokens": [1]}

    with serving(no_vllm) as stub:
        asked(suite, stub.url, out)
        with pytest.raises(UserError, match="no log probabilities of prompts"):
            record_reference(suite, out, stub.url, "m", block(2), Quiet())
        warm = block(2).gate.model_copy(update={"sampling": "warm"})
        with pytest.raises(UserError, match="no replies to score"):
            record_reference(suite, out, stub.url, "m", block(2).model_copy(update={"gate": warm}), Quiet())
        asked(suite, stub.url, tmp_path / "other.jsonl", token_ids=False)
        with pytest.raises(UserError, match="token ids"):
            record_reference(suite, tmp_path / "other.jsonl", stub.url, "m", block(2), Quiet())
    with pytest.raises(UserError, match="no distributions to compare with"):
        measure(tmp_path / "other.jsonl", suite, stub.url, "m", concurrency=2)
    assert all("token_ids" not in message for r in read_results(tmp_path / "other.jsonl").results.values()
               for message in r.produced)  # fmt: skip


def test_the_command_measures_and_compare_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_suite(tmp_path, [case(n) for n in range(12)])
    common = ["--suite", str(path), "--divergence-from", "bf16.jsonl"]
    with serving(Toy()) as stub:
        command = ["test", "--url", stub.url, *common]
        assert main([*command, "--model", "q", "--out", "q.jsonl"]) == 2, "the reference was not asked yet"
        assert not Path("q.jsonl").exists() and "ask its server first" in capsys.readouterr().err
        main([*command, "--model", "bf16", "--out", "bf16.jsonl", "--json"])
    assert json.loads(capsys.readouterr().out)["divergence"]["kl"] == 0.0
    with serving(Toy(arm=0.5)) as stub:
        main(["test", "--url", stub.url, *common, "--model", "q", "--out", "q.jsonl"])
    shown = capsys.readouterr().out.splitlines()
    line = next(line for line in shown if line.startswith("KL to bf16"))
    found = json.loads(Path("q.divergence.json").read_text())["categories"]["k1"]
    assert next(row for row in shown if row.startswith("k1")).split()[3:] == [
        f"{found['kl']:.4f}",
        f"{found['top1']:.3f}",
    ]
    assert "48 tokens of 12 cases" in line
    assert main(["compare", "q.jsonl", "bf16.jsonl"]) == 0
    assert line in capsys.readouterr().out
    assert main(["compare", "bf16.jsonl", "q.jsonl"]) == 0
    assert "KL to" not in capsys.readouterr().out, "measured against another reference"
