"""BFCL's rules, each on a case written by hand; `test_bfcl_agreement` holds them against the package's own."""

from __future__ import annotations

from typing import Any

import pytest

from qat.behavior.bfcl import Function, match
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


def test_arguments_that_are_no_text_are_no_call() -> None:
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": ""}}]}
    spec = {"functions": [{"name": "now", "types": {}}], "answers": [{"now": {}}]}
    assert not bind("bfcl", spec | {"kind": "simple"})(Reply([message])).passed
    assert bind("bfcl", {"kind": "irrelevance"})(Reply([message])).passed
    message["tool_calls"] = [{"function": {"name": "now", "arguments": "{}"}}]
    assert bind("bfcl", spec | {"kind": "simple"})(Reply([message])).passed


@pytest.mark.parametrize("depth", [400, 985, 990, 995, 100_000])
def test_arguments_nested_too_deeply_fail(depth: int) -> None:
    arguments = '{"city": ' + "[" * depth + "]" * depth + "}"
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "hotel_book", "arguments": arguments}}]}
    spec = {"functions": [BOOK.model_dump()], "answers": [ANSWER]}
    assert not bind("bfcl", spec | {"kind": "simple"})(Reply([message])).passed
    assert len(bind("bfcl", spec | {"kind": "simple"})(Reply([message])).detail) < 500


def test_a_number_too_large_for_a_float_fails() -> None:
    assert fault(price=10**400) is not None


JAVA = Function(
    name="Pool.run",
    types={"ids": ("ArrayList", "long"), "delay": ("long", None), "meta": ("HashMap", None), "who": ("any", None)},
    required=["delay"],
    language="java",
)
JAVA_ANSWER: dict[str, Any] = {
    "Pool.run": {"ids": [[101, 202], ""], "delay": [5], "meta": [{"kind": ["fast"], "n": [2]}, ""], "who": ["self", ""]}
}


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ({}, True),
        ({"delay": "5"}, False),  # no long of Java
        ({"delay": 5}, False),  # a number of JSON, not a text
        ({"ids": "new ArrayList<>(Arrays.asList(101L, 202L))"}, True),
        ({"ids": "new ArrayList<Long>() {{ add(101L); add(202L); }}"}, True),
        ({"ids": "new ArrayList<>(Arrays.asList(202L, 101L))"}, False),
        ({"ids": "[101, 202]"}, False),
        ({"ids": [101, 202]}, False),
        ({"meta": 'new HashMap<String, Object>() {{ put("n", 2); put("kind", "FAST"); }}'}, True),
        ({"meta": 'new HashMap<String, Object>() {{ put("n", "2"); put("kind", "fast"); }}'}, False),
        ({"who": "Self"}, True),
        ({"who": '"self"'}, False),  # quotes within the text count
    ],
)
def test_java_arguments_are_texts_of_literals(arguments: dict[str, Any], right: bool) -> None:
    call = {"Pool_run": {"delay": "5L"} | arguments}
    assert (match("simple", [JAVA], [JAVA_ANSWER], [call]) is None) is right


def test_types_are_those_of_the_language() -> None:
    with pytest.raises(ValueError, match="no type 'HashMap' of python"):
        Function(name="f", types={"a": ("HashMap", None)})
    with pytest.raises(ValueError, match="no type 'Set' of java"):
        Function(name="f", types={"a": ("Set", None)}, language="java")
    with pytest.raises(ValueError, match="only there"):
        Function(name="f", types={"a": ("ArrayList", None)}, language="java")


@pytest.mark.parametrize(
    ("kind", "answers", "problem"),
    [
        ("simple", [], "0 calls"),
        ("multiple", [ANSWER, ANSWER], "2 calls"),
        ("parallel", [{"other": {}}], "calls other; offered: hotel.book"),
        ("parallel", [{}], "calls nothing"),
    ],
)
def test_a_ground_truth_that_cannot_be_judged_is_refused(kind: str, answers: list[Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        bind("bfcl", {"kind": kind, "functions": [BOOK.model_dump()], "answers": answers})
