"""What the text of a Java or JavaScript argument stands for, as the type converters of BFCL's package read it.

In the Java and JavaScript splits every argument is a text that holds source code: `5L`, `{method: 'GET'}`,
`new ArrayList<>(Arrays.asList(1, 2))`. The package reads it with regular expressions, not with a parser, and so does
this module: elements are split at every comma, a mapping ends at its first brace, the elements of a Java array of
strings keep their quotes, and what cannot be read stays a text, as the name of a variable does. Where an expression of
the package tries every way to divide a text that fails, for seconds or for ever, the same is found here in another way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

Language = Literal["python", "java", "javascript"]

TYPES: dict[Language, dict[str, type]] = {
    "python": {
        "string": str,
        "integer": int,
        "float": float,
        "boolean": bool,
        "array": list,
        "tuple": list,
        "dict": dict,
        "any": str,
    },
    "java": {
        "byte": int,
        "short": int,
        "integer": int,
        "long": int,
        "float": float,
        "double": float,
        "boolean": bool,
        "char": str,
        "String": str,
        "Array": list,
        "ArrayList": list,
        "HashMap": dict,
        "any": str,
    },
    "javascript": {
        "String": str,
        "integer": int,
        "float": float,
        "Bigint": int,
        "Boolean": bool,
        "array": list,
        "dict": dict,
        "any": str,
    },
}
"""BFCL's names of types that its package can match, to the type of the value that they stand for."""

WITH_ITEMS = frozenset({"array", "tuple", "Array", "ArrayList"})
"""Types that name that of their items."""

LONGEST_LITERAL = 2_000
"""Characters; the longest literal of the ground truth has 162. A longer text is taken as it
stands; no shorter one has more digits than Python reads as a number."""

_WHOLE = re.compile(r"(-?\d+)$")
_Number = tuple[re.Pattern[str], Callable[[str], int | float]]
_NUMBERS: dict[Language, dict[str, _Number]] = {
    "java": {
        "byte": (_WHOLE, int),
        "short": (_WHOLE, int),
        "integer": (_WHOLE, int),
        "long": (re.compile(r"(-?\d+)[lL]$"), int),
        "float": (re.compile(r"(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)[fF]$"), float),
        "double": (re.compile(r"(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)$"), float),
    },
    "javascript": {
        "integer": (_WHOLE, int),
        "float": (re.compile(r"(-?\d+(?:\.\d+)?)$"), float),
        "Bigint": (re.compile(r"(-?\d+)n$"), int),
    },
}
_TRUTH = {"true": True, "false": False}


def read_literal(language: Language, text: str, declared: str, item: str | None = None) -> Any:
    """The value of an argument's text; the text itself where it is no literal of the declared type.

    Args:
        language: `java` or `javascript`.
        text: As the model gave it.
        declared: Key of `TYPES[language]`.
        item: That of the items, of a type in `WITH_ITEMS`.
    """
    if len(text) > LONGEST_LITERAL:
        return text
    return (_java if language == "java" else _javascript)(text, declared, item)


def _scalar(language: Language, text: str, declared: str) -> Any:
    if declared in _NUMBERS[language]:
        pattern, number = _NUMBERS[language][declared]
        found = pattern.match(text)
        return text if found is None else number(found[1])
    return _TRUTH.get(text, text) if declared in ("boolean", "Boolean") else text


def _untyped(text: str, quotes: str) -> Any:
    """A value inside a mapping, whose type nobody declares."""
    if text in _TRUTH:
        return _TRUTH[text]
    if any(text.startswith(quote) and text.endswith(quote) for quote in quotes):
        return text[1:-1]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


# Java

_NEW_ARRAY = re.compile(r"new\s+\w+\[\]\s*\{(.*?)\}")
_AS_LIST = re.compile(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)")
_NEW_LIST = re.compile(r"new\s+ArrayList<\w*>\(\)")
_ADDING = re.compile(_NEW_LIST.pattern + r"\s*\{\{\s*")
_ADD = re.compile(r"add\((.+?)\)")
_NEW_MAP = re.compile(r"new\s+HashMap<.*?>\s*\(\)")
_PUTTING = re.compile(_NEW_MAP.pattern + r"\s*\{\s*\{?\s*", re.DOTALL)
_PUT = re.compile(r"put\(\"(.*?)\",\s*(.*?)\)")


def _java(text: str, declared: str, item: str | None = None) -> Any:
    if declared == "Array":
        found = _NEW_ARRAY.search(text)
        if found is None:
            return text
        return [_java_item(part, item) for part in map(str.strip, found[1].split(",")) if part]
    if declared == "ArrayList":
        parts = _list_parts(text)
        if parts is None:
            return text
        if item in ("char", "String"):
            return [part[1:-1] for part in parts]
        return [_java_item(part, item) for part in parts]
    return _hash_map(text) if declared == "HashMap" else _scalar("java", text, declared)


def _list_parts(text: str) -> list[str] | None:
    if found := _AS_LIST.search(text):
        return [part.strip() for part in found[1].split(",")]
    if found := _ADDING.search(text):
        end = text.find("}}", found.end() + 1)
        return [] if end < 0 else [part.strip() for part in _ADD.findall(text[found.end() : end])]
    return [] if _NEW_LIST.search(text) else None


def _hash_map(text: str) -> Any:
    found = _PUTTING.search(text)
    end = -1 if found is None else text.find("}", found.end())
    if found is not None and end >= 0:
        return {key: _java_item(value.strip(), None) for key, value in _PUT.findall(text[found.end() : end])}
    return {} if _NEW_MAP.search(text) else text


def _java_item(text: str, item: str | None) -> Any:
    if item is not None:
        return _java(text, item)
    for declared in ("long", "float"):
        if (number := _scalar("java", text, declared)) is not text:
            return number
    return _untyped(text, '"')


# JavaScript

_OPENING = re.compile(r"(?:\[|new\s+Array\()\s*\[")
_ARRAY = re.compile(r"\[(.*?)\]|new\s+Array\((.*?)\)")
_OBJECT = re.compile(r"\{(.*?)\}")
_PAIR = re.compile(r"([^:]+):\s*(.*?)(?:,\s*(?=[^,]+:)|$)")
_BETWEEN = re.compile(r"\s*,\s*\[")


def _javascript(text: str, declared: str, item: str | None = None) -> Any:
    if declared == "String":
        return text[1:-1] if any(text.startswith(quote) and text.endswith(quote) for quote in "\"'") else text
    if declared == "array":
        return _array(text.strip(), item)
    return _object(text.strip()) if declared == "dict" else _scalar("javascript", text, declared)


def _array(text: str, item: str | None = None) -> Any:
    end = _end_of_rows(text)
    if end is not None:
        first, *others = re.findall(r"\[(.*?)\]", text[:end])
        rows = [first.strip().removeprefix("["), *others]
        return [[_untyped(part.strip(), "\"'") for part in row.split(",")] for row in rows]
    found = _ARRAY.match(text)
    if found is None:
        return text
    inside = (found[1] if found[1] is not None else found[2]).strip()
    parts = [part.strip() for part in inside.split(",")] if inside else []
    return [_untyped(part, "\"'") if item is None else _javascript(part, item) for part in parts]


def _end_of_rows(text: str) -> int | None:
    r"""Where an array of arrays ends; None where the text does not begin with one.

    The package asks `\[\s*\[.*?\]\s*(,\s*\[.*?\]\s*)*\]` (or the same within `new Array(…)`), which tries every way to
    divide the text into rows before it gives up. Here the ends are found from right to left: a row may end at a bracket
    where the whole ends after it, or where a comma and a row follow whose own end is known.
    """
    opening = _OPENING.match(text)
    if opening is None:
        return None
    closing = re.compile(r"\s*\]" if text[0] == "[" else r"\s*\)")
    ends: dict[int, int] = {}

    def first(start: int) -> int | None:
        stop = text.find("\n", start)
        return next((ends[at] for at in reversed(ends) if start <= at and not 0 <= stop < at), None)

    for bracket in reversed([at for at in range(opening.end(), len(text)) if text[at] == "]"]):
        following = _BETWEEN.match(text, bracket + 1)
        end = None if following is None else first(following.end())
        if end is None and (closed := closing.match(text, bracket + 1)):
            end = closed.end()
        if end is not None:
            ends[bracket] = end
    return first(opening.end())


def _object(text: str) -> Any:
    found = _OBJECT.match(text)
    if found is None:
        return text
    made = {}
    for key, value in ((key.strip(), value.strip()) for key, value in _PAIR.findall(found[1])):
        is_array = value.startswith("[") and value.endswith("]")
        made[key.strip("'\"")] = _array(value) if is_array else _untyped(value.strip("'\"").strip(), "'\"")
    return made
