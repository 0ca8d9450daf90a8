"""BFCL's rules, each on a case written by hand; where BFCL's package is at hand, also against its own checker."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qat.behavior.bfcl import Function, match
from qat.behavior.bfcl.agreement import compare, reference_judge
from qat.behavior.bfcl.mutations import Calls
from qat.behavior.checks import Reply, bind

BOOK = Function(
    name="hotel.book",
    types={
        "city": ("string", None),
        "nights": ("integer", None),
        "price": ("float", None),
        "tags": ("array", "string"),
        "guest": ("dict", None),
    },
    required=["city"],
)
ANSWER: dict[str, Any] = {
    "hotel.book": {
        "city": ["San José", "SJ"],
        "nights": [2],
        "price": [80.0, ""],
        "tags": [["sea view", "quiet"], ""],
        "guest": [{"name": ["Ana"], "age": [30, ""]}, ""],
    }
}


def fault(**arguments: Any) -> str | None:
    return match("simple", [BOOK], [ANSWER], [{"hotel_book": {"city": "SJ", "nights": 2} | arguments}])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"city": "s-j."},  # case and marks
        {"city": "SAN JOSÉ"},
        {"price": 80},  # an integer for a float
        {"tags": ["Sea-View", "QUIET"]},
        {"tags": []},  # an oddity of BFCL: "may be left out" lets the empty list pass
        {"guest": {"name": "ANA"}},
        {"guest": {"age": 30, "name": "Ana"}},
    ],
)
def test_passes(arguments: dict[str, Any]) -> None:
    assert fault(**arguments) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"city": "San Jose"},  # accents count
        {"city": ["SJ"]},
        {"nights": 2.0},  # no float for an integer
        {"nights": True},
        {"nights": "2"},
        {"nights": None},
        {"price": "80"},
        {"tags": ["quiet", "sea view"]},  # order counts
        {"tags": ["sea view"]},
        {"guest": {"age": 30}},
        {"guest": {"name": "Ana", "room": 1}},
        {"guest": {}},
        {"floor": 1},
    ],
)
def test_fails(arguments: dict[str, Any]) -> None:
    assert fault(**arguments) is not None


def test_missing_arguments_are_named() -> None:
    assert match("simple", [BOOK], [ANSWER], [{"hotel_book": {"nights": 2}}]) == "required argument 'city' is missing"
    assert match("simple", [BOOK], [ANSWER], [{"hotel_book": {"city": "SJ"}}]) == "argument 'nights' is missing"


def test_names_are_those_offered() -> None:
    call = {"city": "SJ", "nights": 2}
    assert match("simple", [BOOK], [ANSWER], [{"hotel.book": call}]) == "hotel_book was not called, but hotel.book"


def test_a_variable_is_compared_exactly() -> None:
    answer = {"hotel.book": {"city": ["SJ"], "nights": ["n_nights"]}}
    calls = [{"hotel_book": {"city": "SJ", "nights": value}} for value in ("n_nights", "N_nights", 2)]
    assert [match("simple", [BOOK], [answer], [call]) is None for call in calls] == [True, False, False]


def test_parallel_calls_come_in_any_order_and_each_counts_once() -> None:
    answers = [{"hotel.book": {"city": [city], "nights": [n]}} for city, n in (("Pune", 1), ("Graz", 2))]
    calls: list[Any] = [{"hotel_book": {"city": city, "nights": n}} for city, n in (("Graz", 2), ("Pune", 1))]
    assert match("parallel", [BOOK], answers, calls) is None
    assert match("parallel", [BOOK], answers, [calls[0], calls[0]]) is not None
    assert match("parallel", [BOOK], answers, calls[:1]) == "1 calls, 2 due"
    assert match("parallel", [BOOK], answers, [*calls, calls[0]]) == "3 calls, 2 due"


def test_irrelevance_wants_no_call_and_relevance_any() -> None:
    calls: list[Any] = [{"anything": {}}]
    assert match("irrelevance", [], [], []) is None and match("irrelevance", [], [], calls) is not None
    assert match("relevance", [], [], calls) is None and match("relevance", [], [], []) is not None


def test_the_check_reads_tool_calls() -> None:
    spec = {"kind": "simple", "functions": [BOOK.model_dump()], "answers": [ANSWER]}

    def passed(kind: str, arguments: str) -> bool:
        message = {"role": "assistant", "tool_calls": [{"function": {"name": "hotel_book", "arguments": arguments}}]}
        return bind("bfcl", spec | {"kind": kind})(Reply([message])).passed

    assert passed("simple", '{"city": "SJ", "nights": 2}')
    assert not passed("simple", '{"city": "SJ", "nights": 3}')
    assert not passed("simple", '{"city": "SJ", "nig')
    assert not passed("relevance", '{"city": "SJ", "nig') and passed("irrelevance", '{"city": "SJ", "nig')
    assert not passed("irrelevance", "{}")


def test_types_of_other_languages_are_refused() -> None:
    with pytest.raises(ValueError, match="HashMap"):
        Function(name="f", types={"a": ("HashMap", None)})


@pytest.mark.slow
def test_agrees_with_the_package(real_data: Path) -> None:
    named = os.environ.get("QAT_BFCL_EVAL")
    if named is None:
        pytest.skip("no unpacked wheel of bfcl-eval (set QAT_BFCL_EVAL)")
    result = compare(real_data / "bfcl_v4", ["simple_python", "parallel_multiple"], reference_judge(Path(named)))
    assert result["differing"] == {}
    assert sum(count["both pass"] for count in result["splits"].values()) > 15_000


def test_a_disagreement_is_counted_and_shown(tmp_path: Path) -> None:
    function = {
        "name": "f",
        "parameters": {"type": "dict", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    }
    (tmp_path / "possible_answer").mkdir()
    for folder, entry in (
        (tmp_path, {"id": "x", "function": [function]}),
        (tmp_path / "possible_answer", {"id": "x", "ground_truth": [{"f": {"a": [1]}}]}),
    ):
        (folder / "BFCL_v4_simple_python.json").write_text(json.dumps(entry) + "\n", encoding="utf-8")

    def deaf(functions: list[Any], calls: Calls, answers: list[Any], split: str) -> bool:
        return calls[0]["f"] == {"b": 1}  # raises where there is no call

    result = compare(tmp_path, ["simple_python"], deaf)
    assert result["differing"]["ground truth: only we pass"]["times"] == 1
    assert result["differing"]["no call: we fail, BFCL raises IndexError"]["calls"] == []
    assert result["mutations"]["wrong number"] == {"both fail": 1} and result["ground_truth_failed"] == {}
