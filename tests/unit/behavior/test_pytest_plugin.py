"""The pytest plugin in a pytest of its own, against the stub server."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from qat.behavior.baseline import judge_against, make_baseline
from qat.behavior.records import read_meta, read_results
from qat.behavior.suite import load_suite
from qat.recipe.schema import GateBlock
from tests.unit.behavior.helpers import case, write_suite
from tests.unit.behavior.stub_server import completion, serving

ROOT = Path(__file__).resolve().parents[3]


def answer(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]] | None:
    """Question 3 is answered wrongly, question 5 is refused."""
    asked = body["messages"][-1]["content"]
    if asked == "question 5":
        return 400, {"error": {"message": "too long"}}
    return 200, completion("Certainly not." if asked == "question 3" else "Oh yes.")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh pytest; without the entry points it is the same whether the package is installed or not."""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-p", "qat.behavior.pytest_plugin", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "test_own.py").write_text("def test_own() -> None: ...\n")
    return write_suite(tmp_path, [case(n, tags=["odd"] if n % 2 else []) for n in range(12)])


def test_one_test_per_case(suite: Path) -> None:
    folder = suite.parent
    with serving(answer) as stub:
        done = run(folder, "--qat-suite", str(suite), "--qat-url", stub.url, "--qat-model", "m", "--strict-markers",
                   "--qat-results", "kept.jsonl", "--junitxml", "out.xml", "-v")  # fmt: skip
        asked = len(stub.bodies)
    assert (done.returncode, asked) == (1, 12), done.stdout + done.stderr
    assert "1 failed, 11 passed, 1 error" in done.stdout  # the folder's own test runs beside them
    assert "qat::small::c-003 FAILED" in done.stdout and "qat::small::c-005 ERROR" in done.stdout
    for line in ("asked:  question 3", "reply:  Certainly not.", "failed: mentions:", "HTTP 400: too long"):
        assert line in done.stdout
    assert "Traceback" not in done.stdout
    cases = list(ElementTree.parse(folder / "out.xml").getroot().iter("testcase"))
    assert [c.get("name") for c in cases if c.find("failure") is not None] == ["c-003"]
    assert {p.get("name") for p in cases[-1].iter("property")} == {"category", "latency_s"}
    results = read_results(folder / "kept.jsonl").results
    assert len(results) == 12
    meta = read_meta(folder / "kept.jsonl")
    assert meta is not None and (meta.model, meta.sha256) == ("m", load_suite(suite).sha256)


def test_only_the_chosen_cases_are_asked(suite: Path) -> None:
    common = ["--qat-suite", str(suite)]
    with serving(answer) as stub:
        common += ["--qat-url", stub.url, "--qat-model", "m"]
        chosen = run(suite.parent, *common, "-k", "c-001 or c-002", "-v")
        assert "2 passed, 11 deselected" in chosen.stdout
        assert sorted(b["messages"][-1]["content"] for b in stub.bodies) == ["question 1", "question 2"]
        assert "6 passed, 7 deselected" in run(suite.parent, *common, "-m", "qat and k0").stdout
        assert "1 error" in run(suite.parent, *common, "-m", "odd", "-k", "c-005").stdout
        before = len(stub.bodies)
        assert "13 tests collected" in run(suite.parent, *common, "--collect-only", "-q").stdout
        assert len(stub.bodies) == before


def test_answers_of_a_run_can_be_judged(suite: Path) -> None:
    with serving(lambda body, number: (200, completion("Yes."))) as stub:
        (suite.parent / "alone").mkdir()
        alone = run(suite.parent / "alone", "--qat-suite", str(suite), "--qat-url", stub.url, "--qat-model", "m")
        assert (alone.returncode, "collected 12 items" in alone.stdout) == (0, True)
        done = run(suite.parent, "--qat-suite", str(suite), "--qat-url", stub.url, "--qat-model", "m", "--qat-results",
                   "kept.jsonl", "-m", "qat")  # fmt: skip
    assert "12 passed, 1 deselected" in done.stdout and done.returncode == 0
    kept = suite.parent / "kept.jsonl"
    gate = GateBlock(candidate="", reference="", pass_floor=0.5, max_drop=0.5)
    assert judge_against(kept, make_baseline("b", kept, load_suite(suite)), gate).verdict == "PASS"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--qat-suite", "annie_tiny"], "need each other"),
        (["--qat-url", "http://127.0.0.1:9"], "need each other"),
        (["--qat-suite", "anie_tiny", "--qat-url", "http://127.0.0.1:9"], "did you mean 'annie_tiny'"),
        (["--qat-suite", "annie_tiny", "--qat-url", "http://127.0.0.1:9"], "does not say which models"),
        (["--qat-suite", "annie_tiny", "--qat-url", "http://127.0.0.1:9", "--qat-results", "x.txt"], "in .jsonl"),
        (["--qat-suite", "annie_tiny", "--qat-url", "http://127.0.0.1:9", "--numprocesses", "2"], "leave -n"),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(tmp_path: Path, arguments: list[str], message: str) -> None:
    # pytest-xdist's option, without pytest-xdist.
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--numprocesses')")
    done = run(tmp_path, *arguments)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_without_a_suite_nothing_changes(suite: Path) -> None:
    done = run(suite.parent)
    assert (done.returncode, "1 passed" in done.stdout) == (0, True)


def test_entry_point_names_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"qat": "qat.behavior.pytest_plugin"}


def test_code_of_the_suite_runs_only_where_it_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "plugin_rules.py").write_text("def polite(reply):\n    return 'rude' not in reply.final\n")
    path = write_suite(tmp_path, [case(0, checks=[{"check": "python", "function": "plugin_rules:polite"}])])
    with serving(answer) as stub:
        command = ["--qat-suite", str(path), "--qat-url", stub.url, "--qat-model", "m"]
        refused = run(tmp_path, *command)
        allowed = run(tmp_path, *command, "--qat-allow-python")
    assert refused.returncode == 4 and "--qat-allow-python" in refused.stderr
    assert allowed.returncode == 0 and "1 passed" in allowed.stdout
