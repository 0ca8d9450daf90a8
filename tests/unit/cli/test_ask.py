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


def test_code_of_a_suite_runs_only_where_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "my_rules.py").write_text(
        "def short(reply, most):\n    import my_words\n    return len(reply.final) <= my_words.LIMIT\n"
    )
    (folder / "my_words.py").write_text("LIMIT = 4\n")
    checks = [{"check": "python", "function": "my_rules:short", "arguments": {"most": 4}}]
    path = write_suite(folder, [case(n, checks=checks) for n in range(12)])
    assert main(["suite", "check", str(path)]) == 2
    assert "--allow-python" in capsys.readouterr().err
    assert main(["suite", "check", str(path), "--allow-python"]) == 0
    with serving(yes) as stub:
        command = ["test", "--url", stub.url, "--model", "m", "--suite", str(path)]
        assert main(command) == 2
        main([*command, "--allow-python"])
    assert "12 of 12 passed, 0 ended in an error" in capsys.readouterr().out


def test_suites_of_eval_go_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    answers = tmp_path / "data" / "possible_answer"
    answers.mkdir(parents=True)
    tool = {"name": "f", "description": "d", "parameters": {"type": "dict", "properties": {}, "required": []}}
    question = {"id": "simple_python_0", "question": [[{"role": "user", "content": "q"}]], "function": [tool]}
    truth = {"id": "simple_python_0", "ground_truth": [{"f": {}}]}
    (tmp_path / "data" / "BFCL_v4_simple_python.json").write_text(json.dumps(question) + "\n")
    (answers / "BFCL_v4_simple_python.json").write_text(json.dumps(truth) + "\n")
    assert main(["suite", "check", "bfcl:data"]) == 0
    assert "simple_python 1" in capsys.readouterr().out
    with serving(yes) as stub:
        assert main(["test", "--url", stub.url, "--model", "m", "--suite", "extraction", "--only", "recipe"]) == 0
    assert main(["test", "--url", "http://x", "--suite", "extractions"]) == 2
    assert "extraction, bfcl:FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(("share", "code", "verdict"), [(0, 0, "PASS"), (2, 3, "INCONCLUSIVE"), (1, 3, "INCONCLUSIVE")])
def test_errors_are_counted_and_never_pass(
    suite: Path, capsys: pytest.CaptureFixture[str], share: int, code: int, verdict: str
) -> None:
    """Every `share`-th question is refused, the others are answered well."""

    def refusing(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        asked = int(body["messages"][-1]["content"].split()[1])
        return (400, {"message": "too long"}) if share and asked % share == 0 else yes(body, number)

    with serving(refusing) as stub:
        command = ["test", "--url", stub.url, "--model", "m", "--suite", str(suite), "--json"]
        assert main(command) == code
    found = json.loads(capsys.readouterr().out)
    refused = 60 // share if share else 0
    assert (found["verdict"], found["errors"]) == (verdict, refused)
    assert found["error_kinds"] == ({"HTTP 400": refused} if refused else {})


def test_what_failed_is_told_by_category_and_check(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def mixed(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        asked = int(body["messages"][-1]["content"].split()[1])
        return 200, completion("Yes." if asked % 2 else "No 🙂." if asked < 4 else "No.")

    with serving(mixed) as stub:
        command = ["test", "--url", stub.url, "--model", "m", "--suite", str(suite)]
        assert main([*command, "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        main(command)
    assert found["categories"] == {"k0": {"passed": 0, "n": 30}, "k1": {"passed": 30, "n": 30}}
    assert {name: entry["answers"] for name, entry in found["failed_checks"].items()} == {"mentions": 30, "no_emoji": 2}
    assert found["failed_checks"]["no_emoji"]["case"] == "c-000"
    shown = capsys.readouterr().out
    assert "failed     no_emoji: 2, as in c-000:" in shown and shown.index("mentions: 30") < shown.index("no_emoji: 2")
