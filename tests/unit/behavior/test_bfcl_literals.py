"""Literals of Java and JavaScript: what BFCL's converters read, their oddities, and texts that never end there."""

from __future__ import annotations

import time
from typing import Any

import pytest

from qat.behavior.bfcl.literals import LONGEST_LITERAL, Language, read_literal


@pytest.mark.parametrize(
    ("declared", "item", "text", "value"),
    [
        ("integer", None, "-123", -123),
        ("integer", None, "12.0", "12.0"),
        ("short", None, "5L", "5L"),
        ("long", None, "9223372036854775807L", 9223372036854775807),
        ("long", None, "5", "5"),
        ("float", None, "3e-3F", 3e-3),
        ("float", None, "3.14", "3.14"),
        ("double", None, "-3.14e2", -3.14e2),
        ("double", None, "3.14f", "3.14f"),
        ("boolean", None, "true", True),
        ("boolean", None, "True", "True"),
        ("char", None, "'a'", "'a'"),
        ("String", None, '"x"', '"x"'),
        ("any", None, "123", "123"),
        ("Array", "integer", "new int[] { 1, 2,3 }", [1, 2, 3]),
        ("Array", "integer", "new int[]{}", []),
        ("Array", "long", "new long[]{1L, 2.0, 3L}", [1, "2.0", 3]),
        ("Array", "String", 'new String[]{"a", "b"}', ['"a"', '"b"']),  # quotes stay
        ("Array", "String", "names", "names"),
        ("ArrayList", "String", 'new ArrayList<>(Arrays.asList("a", "b"))', ["a", "b"]),
        ("ArrayList", "String", 'new ArrayList<>(Arrays.asList("aa, bb"))', ["a", "b"]),  # split at every comma, cut
        ("ArrayList", "any", 'new ArrayList<>(Arrays.asList("a", 1))', ['"a"', "1"]),
        ("ArrayList", "float", "new ArrayList<Float>() {{ add(1.0f); add(2.5f); }}", [1.0, 2.5]),
        ("ArrayList", "char", "new ArrayList<Character>() {{ add('a'); }}", ["a"]),
        ("ArrayList", "integer", "new ArrayList<>()", []),
        ("ArrayList", "integer", "new ArrayList<>() {{ }}", []),
        ("ArrayList", "integer", "new ArrayList<>() {{ add(1);", []),
        ("ArrayList", "integer", "List.of(1, 2)", "List.of(1, 2)"),
        ("HashMap", None, "new HashMap<>()", {}),
        ("HashMap", None, "new HashMap<>() {{ }}", {}),
        (
            "HashMap",
            None,
            'new HashMap<String, Object>() { { put("a", 1); put("b", "x y"); put("c", true); put("d", 2L); } }',
            {"a": 1, "b": "x y", "c": True, "d": 2},
        ),
        ("HashMap", None, 'new HashMap<>() {{ put("a", f(1)); }}', {"a": "f(1"}),
        ("HashMap", None, "Map.of()", "Map.of()"),
    ],
)
def test_java(declared: str, item: str | None, text: str, value: Any) -> None:
    found = read_literal("java", text, declared, item)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("declared", "item", "text", "value"),
    [
        ("String", None, "'x'", "x"),
        ("String", None, "x", "x"),
        ("integer", None, "12.5", "12.5"),
        ("float", None, "3", 3.0),
        ("float", None, "3e2", "3e2"),
        ("Bigint", None, "123n", 123),
        ("Boolean", None, "false", False),
        ("array", "integer", "[1, 2]", [1, 2]),
        ("array", "float", "new Array(4.5, 5)", [4.5, 5.0]),
        ("array", "String", "['a', \"b\", c]", ["a", "b", "c"]),
        ("array", "String", "[]", []),
        ("array", "String", " names ", "names"),
        ("array", "String", "['a'", "['a'"),
        ("array", "array", "[ [1, 2],  [3,4] ]", [[1, 2], [3, 4]]),
        ("array", "array", "new Array([1], ['x'])", [[1], ["x"]]),
        ("array", "array", "[[1], [2]].concat([[3]])", [[1], [2]]),
        ("array", "array", "[[1] x [2]]", [[1], [2]]),
        ("array", "array", "[[1],\n [2]]", [[1], [2]]),
        ("array", "array", "[[1]\n x [2]]", ["[1"]),  # no row goes over a line break
        ("array", "dict", "[{a: 1}, {b: 2}]", [{"a": 1}, {"b": 2}]),
        ("dict", None, "{}", {}),
        ("dict", None, "{'key': 'value', n: 2, on: true}", {"key": "value", "n": 2, "on": True}),
        ("dict", None, '{"m": ["a", "b"], "f": g}', {"m": ["a", "b"], "f": "g"}),
        ("dict", None, "{a: {b: 1}}", {"a": "{b: 1"}),  # ends at the first brace
        ("dict", None, "options", "options"),
    ],
)
def test_javascript(declared: str, item: str | None, text: str, value: Any) -> None:
    found = read_literal("javascript", text, declared, item)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("language", "declared", "text"),
    [
        ("javascript", "array", "[[1],[2]," * 300),  # the package divides it in 2^600 ways
        ("javascript", "array", "[[1]\n" + ",[2]" * 450),
        ("javascript", "dict", "{" + ", " * 900 + "}"),
        ("java", "HashMap", "new HashMap<>(){" + " " * 1900),
        ("java", "HashMap", "new HashMap<>(){{" + 'put("",' * 280 + "}}"),
        ("java", "ArrayList", "new ArrayList<>(){{" + " " * 1900),
    ],
)
def test_degenerate_texts_are_read_in_no_time(language: Language, declared: str, text: str) -> None:
    started = time.process_time()
    read_literal(language, text, declared, "any" if "rray" in declared else None)
    assert time.process_time() - started < 2


def test_a_text_longer_than_any_answer_is_left_as_it_is() -> None:
    text = "[" + "1," * LONGEST_LITERAL + "1]"
    assert read_literal("javascript", text, "array", "integer") is text
