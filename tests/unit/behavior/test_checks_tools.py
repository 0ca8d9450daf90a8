"""Hand-labelled tool calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qat.behavior.checks import Reply, bind


def _tool(name: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


TOOLS = [
    _tool("search_memory", {"query": {"type": "string"}, "limit": {"type": "integer"}}, ["query"]),
    _tool("set_reminder", {"text": {"type": "string"}, "time": {"type": "string"}}, ["text", "time"]),
]


def called(*calls: tuple[str, object]) -> Reply:
    made = [
        {"id": "1", "function": {"name": n, "arguments": a if isinstance(a, str) else json.dumps(a)}} for n, a in calls
    ]
    return Reply([{"role": "assistant", "content": None, "tool_calls": made}], tools=TOOLS)


BIKE = called(("search_memory", {"query": "My red Bike", "limit": 3}))

CALLS = [
    (BIKE, {"tool": "search_memory"}, True),
    (BIKE, {"tool": "search_memory", "arguments": {"query": {"contains": "bike"}}}, True),
    (BIKE, {"tool": "search_memory", "arguments": {"query": {"contains": ["red", "bike"]}}}, True),
    (BIKE, {"tool": "search_memory", "arguments": {"query": {"contains": ["red", "car"]}}}, False),
    (BIKE, {"tool": "search_memory", "arguments": {"query": "my red bike"}}, True),
    (BIKE, {"tool": "search_memory", "arguments": {"query": {"equals": "my red bike", "ignore_case": False}}}, False),
    (BIKE, {"tool": "search_memory", "arguments": {"query": {"any_of": ["car", "my red bike!"]}}}, True),
    (BIKE, {"tool": "search_memory", "arguments": {"query": {"any_of": ["car"]}}}, False),
    (BIKE, {"tool": "search_memory", "arguments": {"query": {"regex": "^my .* bike$"}}}, True),
    (BIKE, {"tool": "search_memory", "arguments": {"query": {"regex": "^bike"}}}, False),
    (BIKE, {"tool": "search_memory", "arguments": {"limit": 3}}, True),
    (BIKE, {"tool": "search_memory", "arguments": {"limit": 4}}, False),
    (BIKE, {"tool": "search_memory", "arguments": {"limit": True}}, False),
    (called(("search_memory", {"query": "b", "limit": 1})),
     {"tool": "search_memory", "arguments": {"limit": True}}, False),
    (BIKE, {"tool": "search_memory", "arguments": {"place": "x"}}, False),
    (BIKE, {"tool": "set_reminder"}, False),
    (called(), {"tool": "search_memory"}, False),
    (called(("search_memory", {"limit": 3})), {"tool": "search_memory"}, False),  # the schema requires query
    (called(("search_memory", {"query": 7})), {"tool": "search_memory"}, False),  # the schema wants a string
    (called(("search_memory", '{"query": "bike"')), {"tool": "search_memory"}, False),  # cut JSON
    (called(("search_memory", '["bike"]')), {"tool": "search_memory"}, False),
    (called(("search_memory", {"query": "car"}), ("search_memory", {"query": "bike"})),
     {"tool": "search_memory", "arguments": {"query": "bike"}}, True),
    (called(("search_memory", {"query": "ಬೈಕ್"})),
     {"tool": "search_memory", "arguments": {"query": {"contains": "ಬೈಕ್"}}}, True),
    (called(("set_reminder", {"text": "Call Kavya", "time": "7:30 PM"})),
     {"tool": "set_reminder", "arguments": {"time": {"contains": "7:30 pm"}, "text": {"contains": "kavya"}}}, True),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "params", "passes"), CALLS)
def test_calls(reply: Reply, params: dict[str, Any], passes: bool) -> None:
    assert bind("calls", params)(reply).passed is passes


NO_CALL = [
    (called(), {}, True),
    (Reply([{"content": "Hi."}]), {}, True),
    (Reply([{"content": "Hi.", "tool_calls": None}]), {}, True),
    (BIKE, {}, False),
    (BIKE, {"tools": ["set_reminder"]}, True),
    (BIKE, {"tools": ["search_memory"]}, False),
    (BIKE, {"tools": ["set_reminder", "search_memory"]}, False),
    (called(("unknown", {})), {}, False),
    (called(("search_memory", "nonsense")), {}, False),
    (Reply([{"content": "", "tool_calls": []}]), {}, True),
    (Reply([BIKE.produced[0], {"content": "It is red."}]), {}, False),
    (Reply([{"content": "search_memory(query)"}]), {}, True),  # text is no call; no_tool_leak sees it
]


@pytest.mark.parametrize(("reply", "params", "passes"), NO_CALL)
def test_no_call(reply: Reply, params: dict[str, Any], passes: bool) -> None:
    assert bind("no_call", params)(reply).passed is passes


WRONG_TOOL = [
    (called(), {}, True),
    (BIKE, {}, True),
    (BIKE, {"allowed": ["search_memory"]}, True),
    (BIKE, {"allowed": ["set_reminder"]}, False),
    (BIKE, {"allowed": []}, False),
    (called(("web_search", {"query": "x"})), {}, False),
    (called(("Search_Memory", {"query": "x"})), {}, False),
    (called(("search_memory", {})), {}, False),
    (called(("search_memory", {"query": "x", "color": "red"})), {}, False),
    (called(("search_memory", "x")), {}, False),
    (called(("search_memory", {"query": "x"}), ("fly", {})), {}, False),
    (called(("search_memory", {"query": "x"}), ("set_reminder", {"text": "a", "time": "b"})), {}, True),
]


@pytest.mark.parametrize(("reply", "params", "passes"), WRONG_TOOL)
def test_wrong_tool(reply: Reply, params: dict[str, Any], passes: bool) -> None:
    assert bind("wrong_tool", params)(reply).passed is passes


def test_arguments_may_be_a_mapping() -> None:
    """Some servers return them parsed."""
    message = {"content": "", "tool_calls": [{"function": {"name": "search_memory", "arguments": {"query": "bike"}}}]}
    assert bind("calls", {"tool": "search_memory", "arguments": {"query": "bike"}})(
        Reply([message], tools=TOOLS)
    ).passed


def test_the_detail_says_what_was_called() -> None:
    assert "called: search_memory" in bind("calls", {"tool": "set_reminder"})(BIKE).detail
