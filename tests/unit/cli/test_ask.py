"""`qat test --url` and `qat suite`: exit codes, files and numbers against a stub server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat.behavior.records import read_results
from qat.behavior.suite import load_suite
from qat.cli import main
from tests.unit.behavior.helpers import case, write_suite
from tests.unit.behavior.stub_server import completion, serving


def yes(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
    return 200, completion("Yes.")


def no(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
    return 200, completion("No.")


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_suite(tmp_path, [case(n) for n in range(60)])


@pytest.mark.parametrize(("answer", "code", "verdict"), [(yes, 0, "PASS"), (no, 1, "FAIL")])
def test_the_whole_suite_gets_a_verdict(
    suite: Path, capsys: pytest.CaptureFixture[str], answer: Any, code: int, verdict: str
) -> None:
    with serving(answer) as stub:
        command = ["test", "--url", stub.url, "--model", "m", "--suite", str(suite), "--n", "2", "--json"]
        assert main(command) == code
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["asked"], found["error_kinds"]) == (verdict, 120, {})
    assert {key.sampling for key in read_results(Path("small.jsonl")).results} == {"greedy", "greedy_2"}


def test_shards_are_merged(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(no) as stub:
        for shard in ("1/2", "2/2"):
            command = ["test", "--url", stub.url, "--model", "m", "--suite", str(suite), "--only", "k1"]
            assert main([*command, "--shard", shard]) == 0
    assert "no verdict" in capsys.readouterr().out
    assert main(["suite", "merge", "all.jsonl", "small.1of2.jsonl", "small.2of2.jsonl"]) == 0
    assert len(read_results(Path("all.jsonl")).results) == 30


def test_suite_check_says_what_include_pins(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suite", "check", str(suite), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["version"], found["sha256"]) == ("1", load_suite(suite).sha256)
    assert found["categories"] == {"k0": 30, "k1": 30}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--only", "k1"], "belong to --url"),
        (["--url", "http://x"], "which suite"),
        (["--url", "http://x", "--power"], "alone"),
        (["--url", "http://x", "--suite", "annie_core", "--set", "a=1"], "--recipe"),
        (["--url", "http://x", "--suite", "annie_core", "--shard", "3/2"], "no shard"),
    ],
)
def test_options_that_do_not_fit(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", *options]) == 2
    assert text in capsys.readouterr().err
