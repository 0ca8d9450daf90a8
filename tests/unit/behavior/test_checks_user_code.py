"""A user's function as a check: what it may return, and that no suite runs code unasked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qat.behavior.checks import CheckError, Reply, bind
from qat.behavior.checks.user_code import allow_user_code
from qat.behavior.suite import SUITE_FOLDER

CODE = """
import pathlib
pathlib.Path(__file__).with_suffix(".ran").touch()
def short(reply, limit=10):
    return len(reply.final) <= limit
def reason(reply):
    return "too loud" if reply.final.isupper() else None
def broken(reply):
    raise KeyError("x")
def strange(reply):
    return 3.5
def empty(reply):
    return ""
def twice(reply):
    words = [word.strip(".,!?।。、،") for word in reply.final.casefold().split()]
    return next((f"{b!r} twice in a row" for a, b in zip(words, words[1:]) if a == b), None)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    name = f"checks_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(CODE, encoding="utf-8")
    return tmp_path


def module(folder: Path) -> str:
    return f"checks_{folder.name}"


def say(text: str) -> Reply:
    return Reply([{"content": text}])


def test_verdicts(folder: Path) -> None:
    with allow_user_code(folder):
        short = bind("python", {"function": f"{module(folder)}:short", "arguments": {"limit": 3}})
        reason = bind("python", {"function": f"{module(folder)}:reason"})
        empty = bind("python", {"function": f"{module(folder)}:empty"})
    assert short(say("yes")).passed
    assert not short(say("yess")).passed
    assert reason(say("yes")) == (True, "")
    assert reason(say("YES")) == (False, "too loud")
    assert empty(say("x")).passed
    assert short.waits


def test_a_function_of_the_users_finds_what_a_reader_finds(folder: Path) -> None:
    """Words that stand twice in a row, in many scripts: the check hands the reply over and the finding back."""
    rows = json.loads((Path(__file__).parent / "verdicts.json").read_text(encoding="utf-8"))["python"]
    with allow_user_code(folder):
        check = bind("python", {"function": f"{module(folder)}:twice"})
    results = [(row, check(say(row["text"]))) for row in rows]
    assert not [row["text"] for row, result in results if result.passed != (row["label"] == "pass")]
    assert all(("twice" in result.detail) != result.passed for _, result in results)


@pytest.mark.parametrize("name", ["broken", "strange"])
def test_a_function_that_cannot_tell_is_an_error(folder: Path, name: str) -> None:
    with allow_user_code(folder):
        check = bind("python", {"function": f"{module(folder)}:{name}"})
    with pytest.raises(CheckError, match=name):
        check(say("x"))


def test_nothing_runs_unless_allowed(folder: Path) -> None:
    with pytest.raises(ValueError, match="not told to run"):
        bind("python", {"function": f"{module(folder)}:short"})
    assert not list(folder.glob("*.ran"))
    with allow_user_code(folder):
        bind("python", {"function": f"{module(folder)}:short"})
        assert str(folder) in sys.path
    assert list(folder.glob("*.ran"))
    assert str(folder) not in sys.path
    with pytest.raises(ValueError, match="not told to run"):
        bind("python", {"function": f"{module(folder)}:short"})


@pytest.mark.parametrize("function", ["os", "a b:c", "nowhere_at_all:f", "json:missing", "json:__doc__"])
def test_what_is_no_function_is_refused_when_the_suite_is_loaded(folder: Path, function: str) -> None:
    with allow_user_code(folder), pytest.raises(ValueError, match="check python"):
        bind("python", {"function": function})


def test_no_shipped_suite_runs_code() -> None:
    assert not [path for path in SUITE_FOLDER.glob("*.yaml") if "check: python" in path.read_text(encoding="utf-8")]
