"""Checks held against a reader: the sheet shows what the check saw, and the figures are those of statsmodels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.inter_rater import cohens_kappa

from qat.behavior.labelling import compare_with_reader, read_sheet
from qat.cli import main
from qat.errors import UserError
from tests.unit.behavior.helpers import case, write_suite
from tests.unit.behavior.stub_server import call, completion, serving
from tests.unit.behavior.test_checks_judge import judge_server, says

Line = dict[str, Any]


def by_length(body: dict[str, Any]) -> tuple[int, str]:
    """A judge that passes a short first line (calls follow it), and babbles about the one that says "odd"."""
    reply = json.loads(body["messages"][1]["content"])["reply"].partition("\n")[0]
    if "odd" in reply:
        return says("I cannot say.")
    return says(f"Long or short.\nVERDICT: {'PASS' if len(reply) < 12 else 'FAIL'}")


def talkative(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
    """Calls the memory once, then speaks; the length of the reply is that of the last digit asked for."""
    if body["messages"][-1]["role"] == "user":
        return 200, completion(None, [call("search_memory", '{"query": "x"}')], "tool_calls")
    asked = next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user")
    return 200, completion("very " * int(asked[-1]) + ("odd" if asked.endswith("9") else "good"))


@pytest.fixture
def sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Line]]:
    """Forty replies, two rounds each, of which every second case has the judge; drawn from two passes."""
    monkeypatch.chdir(tmp_path)
    with judge_server(by_length) as (url, _), serving(talkative) as stub:
        judge = {"check": "judge", "url": url, "model": "j", "criterion": "is brief"}
        checks = [{"check": "not_empty"}, judge]
        cases = [case(n, checks=checks[: 1 + n % 2], tool_results={"search_memory": "tea"}) for n in range(40)]
        suite = write_suite(tmp_path, cases)
        arguments = ["--url", stub.url, "--model", "m", "--suite", str(suite), "--n", "2"]
        main(["test", *arguments, "--out", "a.jsonl"])
        assert main(["suite", "label", "a.jsonl", "sheet.jsonl", "--suite", str(suite), "--n", "25"]) == 0
    path = tmp_path / "sheet.jsonl"
    return path, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_sheet_holds_what_the_judge_saw(sheet: tuple[Path, list[Line]]) -> None:
    """Sixteen of the twenty cases with a judge have a verdict; every case is drawn once before any is drawn twice."""
    _, lines = sheet
    assert len(lines) == 25
    cases = [line["id"].split("/")[0] for line in lines]
    assert all(int(name[-1]) % 2 and not name.endswith("9") for name in cases)
    assert len(set(cases[:16])) == 16 and len(set(cases)) == 16
    line = lines[0]
    assert list(line["labels"].items()) == [("judge", None)] and list(line)[-1] == "labels"
    assert [message["role"] for message in line["context"]["messages"]] == ["system", "user"]
    assert line["context"]["tool_results"] == ["tea"]
    assert [bool(message.get("tool_calls")) for message in line["produced"]] == [True, False]
    assert line["produced"][1]["content"].endswith("good")
    assert line["params"]["judge"]["criterion"] == "is brief"


def test_figures_against_statsmodels(sheet: tuple[Path, list[Line]], capsys: pytest.CaptureFixture[str]) -> None:
    """The reader fails replies of three words and more, the judge those of twelve letters and more."""
    path, lines = sheet
    table = np.zeros((2, 2), int)
    for number, line in enumerate(lines):
        if number >= 22:
            continue
        words = len(line["produced"][-1]["content"].split())
        line["labels"]["judge"] = "fail" if words >= 5 else "pass"
        table[int(len(line["produced"][-1]["content"]) >= 12)][int(words >= 5)] += 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    capsys.readouterr()
    with judge_server(by_length) as (url, _):
        assert main(["suite", "agree", str(path), "--url", url, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    judge = found["checks"]["judge"]
    kappa = cohens_kappa(table)
    assert table[1][0] > 0, "the two must differ somewhere"
    assert (found["open"], judge["n"], judge["errors"]) == (3, 22, {})
    assert judge["equal"]["value"] == pytest.approx(np.trace(table) / 22)
    assert judge["kappa"] == pytest.approx(kappa.kappa)
    assert judge["kappa_interval"]["low"] == pytest.approx(kappa.kappa - 1.959964 * kappa.std_kappa)
    assert judge["precision"]["value"] == pytest.approx(table[1][1] / table[1].sum())
    assert len(judge["false_alarms"]) == table[1][0] and judge["missed"] == []


def record(identity: str, text: str, label: str | None, url: str) -> Line:
    return {
        "id": identity, "source": "s", "licence": "", "context": {"messages": [{"role": "user", "content": "?"}]},
        "produced": [{"content": text}], "params": {"judge": {"url": url, "model": "j", "criterion": "is brief"}},
        "labels": {"judge": label},
    }  # fmt: skip


def write(folder: Path, lines: list[Line]) -> Path:
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_nonsense_of_the_judge_is_in_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with judge_server(by_length) as (url, _):
        texts = [("a", "fine", "pass"), ("b", "far too long a reply", "fail"), ("c", "odd", "pass")]
        path = write(tmp_path, [record(*entry, url) for entry in texts])
        assert main(["suite", "agree", str(path)]) == 0
        found = compare_with_reader(read_sheet(path).records)["judge"]
    told = capsys.readouterr().out
    assert "could not judge c: the judge wrote no verdict" in told
    assert (found.quality.n, found.equal.value, list(found.errors)) == (2, 1.0, ["c"])
    # All of two verdicts are equal: kappa is 1, and how far it may lie from there is not known.
    assert found.agreement is not None and (found.agreement.kappa, found.agreement.interval) == (1.0, None)


def test_no_figure_where_the_judge_is_away(tmp_path: Path) -> None:
    path = write(tmp_path, [record("a", "fine", "pass", "http://127.0.0.1:9")])
    found = compare_with_reader(read_sheet(path).records)["judge"]
    assert (found.agreement, found.equal.value, found.quality.n, len(found.errors)) == (None, None, 0, 1)


def test_line_breaks_of_texts_and_empty_lines_end_no_line(tmp_path: Path) -> None:
    """JSON allows U+2028 and U+0085 inside texts, and sheets are written without escapes."""
    path = tmp_path / "labels.jsonl"
    text = json.dumps(record("a", "one\u2028two\u0085three", "pass", "http://h"), ensure_ascii=False)
    path.write_text(f"{text}\n\n", encoding="utf-8")
    (found,) = read_sheet(path).records
    assert found.reply.final == "one\u2028two\u0085three"


def test_another_judge_where_no_label_is_of_a_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, [record("a", "x", None, "http://h") | {"labels": {"no_emoji": "pass"}}])
    assert main(["suite", "agree", str(path)]) == 0
    assert main(["suite", "agree", str(path), "--model", "other"]) == 2
    assert "labels are of no_emoji" in capsys.readouterr().err


@pytest.mark.parametrize("label", ["maybe", True, 1])
def test_labels_that_are_none(tmp_path: Path, label: Any) -> None:
    path = write(tmp_path, [record("a", "x", "pass", "http://h"), record("b", "x", label, "http://h")])
    with pytest.raises(UserError, match="line 2"):
        read_sheet(path)


def test_what_cannot_be_drawn_or_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    suite = write_suite(tmp_path, [case(n) for n in range(3)])
    with serving(lambda body, number: (200, completion("Yes."))) as stub:
        main(["test", "--url", stub.url, "--model", "m", "--suite", str(suite), "--out", "a.jsonl"])
    assert main(["suite", "label", "a.jsonl", "s.jsonl", "--suite", str(suite)]) == 2, "no case has a judge"
    assert main(["suite", "label", "a.jsonl", "s.jsonl", "--suite", str(suite), "--check", "no_emoji"]) == 0
    assert main(["suite", "label", "a.jsonl", "s.jsonl", "--suite", str(suite), "--check", "no_emoji"]) == 2, "kept"
    assert main(["suite", "agree", "s.jsonl"]) == 2, "nothing is labelled"
    bad = record("a", "x", "pass", "no address")
    with pytest.raises(UserError, match="cannot judge"):
        compare_with_reader(read_sheet(write(tmp_path, [bad])).records)
