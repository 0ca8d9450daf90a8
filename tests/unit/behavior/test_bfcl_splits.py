"""BFCL's files as suites: a small folder of the same form, and a run against a stub server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat.behavior.bfcl import GROUPS, load_bfcl
from qat.behavior.bfcl.splits import offered
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
            "points": {"type": "array", "items": {"type": "tuple", "items": {"type": "float"}}},
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
        "side": {
            "type": "number",
            "format": "float",
            "description": "Length. This is a float type value.",
            "optional": True,
        },
        "points": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
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


def raised(path: Path, splits: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_bfcl(path, splits or ())
    return str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert "no such folder" in raised(tmp_path / "nowhere")
    assert "no data file of BFCL" in raised(tmp_path)
    assert "BFCL_v4_multiple.json" in raised(folder(tmp_path), ["multiple"])
    (tmp_path / "possible_answer" / "BFCL_v4_simple_python.json").unlink()
    text = raised(tmp_path)
    assert "file of BFCL is missing" in text and str(Path("possible_answer", "BFCL_v4_simple_python.json")) in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("simple", "one of simple_python, simple_java, simple_javascript, live_simple"),
        ("java", "one of simple_java, simple_javascript"),
        ("simple_pyton", "one of simple_python"),
        ("multi_turn_base", "simulators of its own"),
        ("memory_kv", "simulators of its own"),
        ("xyz", "one of simple_python, simple_java"),
    ],
)
def test_other_splits_are_refused(tmp_path: Path, name: str, said: str) -> None:
    assert said in raised(folder(tmp_path), [name])


def test_groups_are_those_of_the_package(tmp_path: Path) -> None:
    assert "BFCL_v4_live_simple.json" in raised(folder(tmp_path), ["live"])
    assert set(GROUPS["single_turn"]) == set(GROUPS["live"]) | set(GROUPS["non_live"])
    assert GROUPS["non_python"] == ("simple_java", "simple_javascript") and len(GROUPS["live"]) == 6
    assert len(load_bfcl(tmp_path, ["irrelevance", "irrelevance"]).cases) == 1


@pytest.mark.parametrize(
    ("target", "line", "said"),
    [
        ("", '{"id": "x"', "no JSON"),
        ("", "[" * 100_000, "no JSON"),
        ("", '{"question": []}', "no id"),
        ("", '{"id": "x", "function": []}', "no question"),
        ("", '{"id": "x", "question": [[]], "function": [{"name": "f"}]}', "has no 'parameters'"),
        ("", '{"id": "x", "question": [[]], "function": 7}', "not of the known form"),
        ("", '{"id": "simple_python_0", "question": [[{"role": "user"}]], "function": []}', "messages"),
        ("possible_answer", '{"id": "x"}', "no ground_truth"),
        ("possible_answer", '{"id": "simple_python_0", "ground_truth": []}', "two ground truths"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, target: str, line: str, said: str) -> None:
    path = folder(tmp_path) / target / "BFCL_v4_simple_python.json"
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + line + "\n")  # after two lines and an empty one
    if not target:
        truth = tmp_path / "possible_answer" / path.name
        truth.write_text(truth.read_text() + json.dumps({"id": "x", "ground_truth": TRUTH}) + "\n", encoding="utf-8")
    text = raised(tmp_path)
    assert said in text and f"{path}, line 4" in text


def test_a_case_without_ground_truth_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path) / "possible_answer" / "BFCL_v4_simple_python.json"
    first, _ = path.read_text().splitlines()
    path.write_text(first + "\n", encoding="utf-8")
    text = raised(tmp_path)
    assert "no ground truth" in text and "BFCL_v4_simple_python.json, line 2" in text and str(path) in text
    path.write_text("", encoding="utf-8")
    assert "is empty" in raised(tmp_path)


def test_a_ground_truth_for_another_function_is_named(tmp_path: Path) -> None:
    text = raised(folder(tmp_path, truth=[{"volume.of": {}}]))
    assert "line 1" in text and "calls volume.of; offered: area.of" in text


def test_texts_may_hold_any_line_separator(tmp_path: Path) -> None:
    path = folder(tmp_path) / "BFCL_v4_irrelevance.json"
    path.write_text(path.read_text().replace("q irr", "q \u2028\x85 irr"), encoding="utf-8")
    assert load_bfcl(tmp_path, ["irrelevance"]).cases[0].messages[0]["content"] == "q \u2028\x85 irrelevance_0"


def test_parameters_of_java_and_javascript_are_offered_as_texts() -> None:
    parameters = {
        "type": "dict",
        "properties": {
            "ids": {"type": "ArrayList", "items": {"type": "long"}, "description": "Ids."},
            "ctx": {"type": "any", "description": "Context."},
        },
        "required": ["ids"],
    }
    tool = offered({"name": "A.b", "description": "B.", "parameters": parameters}, "java")
    assert tool["function"]["description"] == "B. Note that the provided function is in Java 8 SDK syntax."
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "ids": {
                "type": "string",
                "description": "Ids. This is Java ArrayList type parameter in string representation. "
                "The list elements are of type long; they are not in string representation.",
            },
            "ctx": {
                "type": "string",
                "description": "Context. This parameter can be of any type of Java object in string representation.",
            },
        },
        "required": ["ids"],
    }
    options = {"type": "dict", "description": "Options.", "properties": {"on": {"type": "Boolean"}}}
    parameters = {"type": "dict", "properties": {"options": options}, "required": []}
    tool = offered({"name": "b", "description": "B.", "parameters": parameters}, "javascript")
    assert tool["function"]["parameters"]["properties"]["options"] == {
        "type": "string",
        "description": "Options. This is JavaScript dict type parameter in string representation. The dictionary "
        'entries have the following schema; they are not in string representation. {"on": {"type": "Boolean"}}',
    }


def test_the_real_files_load(real_data: Path) -> None:
    suite = load_bfcl(real_data / "bfcl_v4", ["parallel", "live_relevance", "non_python"])
    assert len(suite.cases) == 200 + 16 + 99 + 50
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
