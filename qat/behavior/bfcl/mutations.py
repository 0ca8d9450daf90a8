"""Answers to a BFCL case, right and wrong ones, made from its ground truth: what the matching is compared on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Calls = list[dict[str, dict[str, Any]]]
"""Calls as BFCL writes them."""

_TEXTS: dict[str, Callable[[str], str]] = {
    "upper case": str.upper,
    "title case": str.title,
    "marks added": lambda text: "-".join(text) + "./",
    "blank added": lambda text: f" {text} ",
    "marks removed": lambda text: "".join(char for char in text if char not in " ,./-_*^"),
    "quotes swapped": lambda text: text.replace("'", '"') + '"',
    "exclamation mark": lambda text: text + "!",
    "accent added": lambda text: text + "é",
    "cut": lambda text: text[:-1],
}
_LISTS: dict[str, Callable[[list[Any]], object]] = {
    "list reversed": lambda items: items[::-1],
    "list item dropped": lambda items: items[:-1],
    "list item doubled": lambda items: items + items[-1:],
    "list emptied": lambda items: [],
    "list item of another type": lambda items: [*items[:-1], ["x"]],
    "list items as text": lambda items: [str(item) for item in items],
    "list for its item": lambda items: items[0] if items else [],
}
_MAPPINGS: dict[str, Callable[[dict[str, Any]], object]] = {
    "key dropped": lambda mapping: dict(list(mapping.items())[1:]),
    "key added": lambda mapping: mapping | {"unknown_key": 1},
    "keys reversed": lambda mapping: dict(reversed(mapping.items())),
    "value in mapping wrong": lambda mapping: mapping | {key: "wrong value" for key in list(mapping)[:1]},
    "mapping emptied": lambda mapping: {},
}
_OTHER_TYPES: tuple[object, ...] = (None, True, 7, 7.5, "text", ["text"], [], {"a": 1}, {})


def concrete(value: Any) -> Any:
    """An allowed value as a model would give it.

    The keys of a mapping, and of mappings in a list, hold lists of allowed values: the first is taken, and the key left
    out where that is `""`. What lies deeper is compared as it stands.
    """
    if isinstance(value, Mapping):
        return {key: allowed[0] for key, allowed in value.items() if allowed[0] != ""}
    return (
        [concrete(item) if isinstance(item, Mapping) else item for item in value] if isinstance(value, list) else value
    )


def right_calls(answers: Sequence[Mapping[str, Mapping[str, list[Any]]]], named: Callable[[str], str]) -> Calls:
    """The ground truth as calls: the first value of every argument, those that may be left out given where known."""
    made: Calls = []
    for answer in answers:
        name, allowed = next(iter(answer.items()))
        given = {key: [one for one in values if one != ""] for key, values in allowed.items()}
        made.append({named(name): {key: concrete(values[0]) for key, values in given.items() if values}})
    return made


def mutations(
    answers: Sequence[Mapping[str, Mapping[str, list[Any]]]], named: Callable[[str], str]
) -> Iterator[tuple[str, Calls]]:
    """Pairs of (what was done, calls), the untouched ground truth first.

    Args:
        answers: Ground truth of the case.
        named: Gives a function's name as it is offered.
    """
    right = right_calls(answers, named)
    yield "ground truth", right
    empty = [{key: "" for key, values in next(iter(answer.values())).items() if values == [""]} for answer in answers]
    yield "empty texts given", [{n: a | e for n, a in call.items()} for call, e in zip(right, empty, strict=True)]
    yield "no call", []
    yield "call doubled", [*right, copy.deepcopy(right[-1])]
    if len(right) > 1:
        yield "calls reversed", right[::-1]
        yield "call dropped", right[1:]
        yield "first call twice", [right[0], *right[:-1]]
    for place, answer in enumerate(answers):
        for label, call in _call_mutations(next(iter(answer.items())), right[place], named):
            yield label, [*right[:place], call, *right[place + 1 :]]


def _call_mutations(
    answer: tuple[str, Mapping[str, list[Any]]], call: dict[str, dict[str, Any]], named: Callable[[str], str]
) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    dotted, allowed = answer
    name, given = named(dotted), call[named(dotted)]
    yield "other function", {name + "_other": given}
    yield "name in upper case", {name.upper(): given}
    if dotted != name:
        yield "name with its dot", {dotted: given}
    yield "no arguments", {name: {}}
    yield "unknown argument", {name: given | {"unknown_argument": 1}}
    yield "arguments reversed", {name: dict(reversed(given.items()))}
    optional = {key for key, values in allowed.items() if "" in values}
    yield "optional arguments left out", {name: {key: one for key, one in given.items() if key not in optional}}
    for key, values in allowed.items():
        if key in given:
            left = {other: one for other, one in given.items() if other != key}
            yield ("optional argument left out" if key in optional else "argument left out"), {name: left}
            yield "argument renamed", {name: left | {key + "_": given[key]}}
            for label, value in _value_mutations(given[key]):
                yield label, {name: given | {key: value}}
        for other_value in values:
            yield "another allowed value", {name: given | {key: concrete(other_value)}}


def _value_mutations(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool):
        yield "wrong truth value", not value
        yield "truth value as text", str(value)
        yield "truth value as number", int(value)
    elif isinstance(value, int | float):
        yield "wrong number", value + 1
        yield "number as text", str(value)
        yield "integer for float or back", int(value) if isinstance(value, float) else float(value)
        yield "number a little off", value + 1e-9
        yield "sign turned", -value
    elif isinstance(value, str):
        yield "wrong text", "wrong value"
        yield "text in a list", [value]
        for label, change in _TEXTS.items():
            yield label, change(value)
    elif isinstance(value, list):
        for label, of_list in _LISTS.items():
            yield label, of_list(value)
        for place, item in enumerate(value):
            for label, changed in _value_mutations(item):
                yield f"in a list: {label}", [*value[:place], changed, *value[place + 1 :]]
    elif isinstance(value, dict):
        for label, of_mapping in _MAPPINGS.items():
            yield label, of_mapping(value)
        for key, item in value.items():
            for label, changed in _value_mutations(item):
                yield f"in a mapping: {label}", value | {key: changed}
    for other in _OTHER_TYPES:
        if type(other) is not type(value):
            yield "other type", other
