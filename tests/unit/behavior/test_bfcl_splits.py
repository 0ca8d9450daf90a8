"""BFCL's files as suites: a small folder of the same form, and a run against a stub server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat.behavior.bfcl import load_bfcl
from qat.behavior.records import read_results
from qat.behavior.runner import run_suite
from qat.cli import main
from qat.data.schema import tool_faults
from qat.errors import UserError
from tests.unit.behavior.helpers import block
from tests.unit.behavior.stub_server import call, completion, serving

FUNCTION = {
    "name": "area.of",
    "description": "Area.",
    "parameters": {
        "type": "dict",
        "properties": {
            "side": {"type": "float", "description": "Length.", "optional": True},
            "points": {"type": "array", "items": {"type": "tuple", "items": {"type": "float"}}, "required": False},
            "unit": {"type": "any"},
        },
        "required": ["side"],
    },
}
TRUTH = [{"area.of": {"side": [2.0], "points": ["", [[1.0]]], "unit": ["", "m"]}}]


def folder(path: Path, functions: list[dict[str, Any]] | None = None, truth: Any = TRUTH) -> Path:
    def write(target: Path, entries: list[dict[str, Any]]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")

    def entry(name: str) -> dict[str, Any]:
        question = [[{"role": "user", "content": f"q {name}"}]]
        return {"id": name, "question": question, "function": functions or [FUNCTION]}

    write(path / "BFCL_v4_simple_python.json", [entry(f"simple_python_{n}") for n in range(2)])
    truths = [{"id": f"simple_python_{n}", "ground_truth": truth} for n in range(2)]
    write(path / "possible_answer" / "BFCL_v4_simple_python.json", truths)
    write(path / "BFCL_v4_irrelevance.json", [entry("irrelevance_0")])
    return path


def test_tools_are_those_of_openai(tmp_path: Path) -> None:
    case = load_bfcl(folder(tmp_path)).cases[0]
    assert case.tools is not None and tool_faults(case.tools) == []
    function = case.tools[0]["function"]
    assert function["name"] == "area_of"
    assert function["description"] == "Area. Note that the provided function is in Python 3 syntax."
    assert function["parameters"]["properties"] == {
        "side": {"type": "number", "format": "float", "description": "Length. This is a float type value."},
        "points": {
            "type": "array",
            "items": {
                "type": "array",
                "items": {"type": "number", "format": "float", "description": " This is a float type value."},
            },
        },
        "unit": {"type": "string"},
    }


def test_a_run_is_judged_by_split(tmp_path: Path) -> None:
    suite = load_bfcl(folder(tmp_path))

    def answer(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        right = body["messages"][-1]["content"] != "q simple_python_1"
        return 200, completion(None, [call("area_of", '{"side": 2}' if right else '{"side": 3}')], "tool_calls")

    with serving(answer) as stub:
        run_suite(suite, stub.url, "m", "m", block(), tmp_path / "out.jsonl")
    results = read_results(tmp_path / "out.jsonl").results.values()
    assert {result.case: result.passed for result in results} == {
        "simple_python_0": True,
        "simple_python_1": False,
        "irrelevance_0": False,
    }
    assert {result.category for result in results} == {"simple_python", "irrelevance"}


def test_splits_are_chosen_and_hashed(tmp_path: Path) -> None:
    whole, part = load_bfcl(folder(tmp_path)), load_bfcl(tmp_path, ["irrelevance"])
    assert [case.category for case in part.cases] == ["irrelevance"]
    assert len(whole.cases) == 3 and whole.sha256 != part.sha256 == load_bfcl(tmp_path, ["irrelevance"]).sha256


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data file of BFCL"):
        load_bfcl(tmp_path)
    with pytest.raises(UserError, match="no such split"):
        load_bfcl(folder(tmp_path), ["simple_java"])
    with pytest.raises(UserError, match="cannot be read"):
        load_bfcl(tmp_path, ["multiple"])
    with pytest.raises(UserError, match="not of the known form"):
        load_bfcl(folder(tmp_path, [{"name": "no parameters"}]))
    (folder(tmp_path) / "possible_answer" / "BFCL_v4_simple_python.json").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="no ground truth"):
        load_bfcl(tmp_path)
    (tmp_path / "BFCL_v4_simple_python.json").write_text('{"id": 1', encoding="utf-8")
    with pytest.raises(UserError, match="no JSON"):
        load_bfcl(tmp_path)


def test_the_real_files_load(real_data: Path) -> None:
    suite = load_bfcl(real_data / "bfcl_v4", ["parallel", "live_relevance"])
    assert len(suite.cases) == 216
    assert all(tool_faults(case.tools) == [] for case in suite.cases)


def test_the_commands_print_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        return 200, completion("{}")

    common = ["--model", "m", "--json", "--out"]
    with serving(answer) as stub:
        data = ["--data", str(folder(tmp_path))]
        assert main(["eval", "bfcl", "--url", stub.url, *data, *common, str(tmp_path / "a.jsonl")]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {name: (one["passed"], one["n"]) for name, one in found["rates"].items()} == {
            "simple_python": (0, 2),
            "irrelevance": (1, 1),
            "all": (1, 3),
        }
        more = ["--per-domain", "2", "--only", "job", *common, str(tmp_path / "b.jsonl")]
        assert main(["eval", "extraction", "--url", stub.url, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["asked"] == 2 and list(found["rates"]) == ["job"]
    assert found["fields"]["job.title"]["missed"] == 2 and found["fields"]["all"]["found"] == 0
