r"""Many concrete cases from one written case: variables, and combinations of their values drawn with a seed.

    - id: weather                      # becomes weather-001, weather-002, …
      variables:
        city: [Mysuru, Hassan]         # these values
        hour: {range: [1, 12]}         # whole numbers, both ends included; `step` where it is not 1
        sum: [{ask: two plus two, answer: "4"}, …]         # values that belong together: {{sum.ask}}, {{sum.answer}}
        name: {lines: names.txt}       # one value a line, beside the suite file
      count: 10                        # so many combinations, drawn with `seed`; absent: every one
      seed: 3
      messages: [{role: user, content: "How is the weather in {{city}} at {{hour}}?"}]

`{{name}}` stands for a value in any text of the case; a text that is nothing but `{{hour}}` becomes the value itself, a
number stays a number. `\{{` stands for plain braces. The suite's own `variables` are known to every case, and count
only where the case uses them.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import regex

MAX_COMBINATIONS = 10_000
"""The most cases that one written case may become."""
_PLACE = regex.compile(r"(\\?)\{\{\s*([^{}]*?)\s*\}\}")
_NAME = regex.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEYS = ("variables", "count", "seed")


def expand(
    entry: Mapping[str, Any], shared: Mapping[str, Any], folder: Path
) -> tuple[list[dict[str, Any]], list[tuple[tuple[str | int, ...], str]]]:
    """The concrete cases of one written case.

    Args:
        entry: The case as written.
        shared: Variables of the suite.
        folder: Where files of values lie.

    Returns:
        The cases, and the faults found as (key path in the case, problem); no cases where there are faults.
    """
    body = {key: value for key, value in entry.items() if key not in _KEYS}
    own = entry.get("variables") or {}
    if not isinstance(own, Mapping):
        return [], [(("variables",), "not a mapping of names to values")]
    used = dict(_references(body, ()))
    faults: list[tuple[tuple[str | int, ...], str]] = []
    for place, path in used.items():
        name = place.split(".")[0]
        if name not in own and name not in shared:
            near = difflib.get_close_matches(name, [*own, *shared], n=1)
            known = f"did you mean {near[0]!r}?" if near else f"known: {', '.join([*own, *shared]) or 'none'}"
            faults.append((path, f"no variable is named {name!r}; {known}"))
    names = {place.split(".")[0] for place in used}
    faults += [(("variables", name), f"{name!r} is used nowhere in the case") for name in own if name not in names]
    values: dict[str, Sequence[Any]] = {}
    for name in (name for name in [*own, *(n for n in shared if n not in own)] if name in names):
        try:
            values[name] = _values(name, own.get(name, shared.get(name)), folder)
        except ValueError as error:
            faults.append((("variables", name), str(error)))
    if not faults:
        faults += [(path, problem) for place, path in used.items() if (problem := _field_fault(place, values))]
    count, seed = entry.get("count"), entry.get("seed", 0)
    total = math.prod(len(found) for found in values.values())
    faults += _count_faults(count, seed, total, bool(values))
    if faults:
        return [], faults
    if not values:
        return [_fill(body, {})], []
    made = []
    identity = str(entry.get("id") or "case")
    for number, index in enumerate(_drawn(total, total if count is None else count, f"{seed}:{identity}", count), 1):
        case = _fill(body, _combination(values, index))
        if "id" in case:
            case["id"] = str(case["id"]) if _PLACE.search(identity) else f"{identity}-{number:03d}"
        made.append(case)
    return made, []


def _count_faults(count: object, seed: object, total: int, varies: bool) -> Iterator[tuple[tuple[str], str]]:
    if type(seed) is not int:
        yield ("seed",), f"{seed!r} is no whole number"
    if count is None:
        if total > MAX_COMBINATIONS:
            yield ("variables",), f"{total:,} combinations; give `count`, at most {MAX_COMBINATIONS:,}"
    elif type(count) is not int or not 1 <= count <= MAX_COMBINATIONS:
        yield ("count",), f"{count!r} is no whole number from 1 to {MAX_COMBINATIONS:,}"
    elif not varies:
        yield ("count",), "the case has no variables to draw"
    elif count > total:
        yield ("count",), f"{count} cases of {total} combinations"


def _values(name: str, written: object, folder: Path) -> Sequence[Any]:
    """The values of a variable.

    Raises:
        ValueError: Neither a list nor a generator.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name: letters, digits and _")
    if isinstance(written, list) and written:
        return written
    if isinstance(written, Mapping) and set(written) in ({"range"}, {"range", "step"}):
        ends, step = written["range"], written.get("step", 1)
        whole = isinstance(ends, list) and len(ends) == 2 and all(type(end) is int for end in (*ends, step))
        if not whole or step < 1 or ends[0] > ends[1]:
            raise ValueError("range takes [first, last] of whole numbers, first <= last, and a step from 1")
        return range(ends[0], ends[1] + 1, step)
    if isinstance(written, Mapping) and set(written) == {"lines"}:
        path = folder / str(written["lines"])
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if lines:
            return lines
        raise ValueError(f"{path} holds no values")
    raise ValueError("give a list of values, {range: [first, last]} or {lines: file}")


def _references(value: object, path: tuple[str | int, ...]) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """Every placeholder in the texts of a tree, with where it stands; keys of mappings are texts too."""
    if isinstance(value, str):
        for slash, place in _PLACE.findall(value):
            if not slash:
                yield place, path
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _references(key, path)
            yield from _references(inner, (*path, key))
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _references(inner, (*path, position))


def _field_fault(place: str, values: Mapping[str, Sequence[Any]]) -> str | None:
    name, dot, key = place.partition(".")
    for value in values[name]:
        if dot and not (isinstance(value, Mapping) and key in value):
            return f"{name!r} has a value without {key!r}: {value!r}"
        if not dot and isinstance(value, Mapping | list):
            return f"{name!r} has values of several fields; name one, as {{{{{name}.field}}}}"
    return None


def _drawn(total: int, count: int, seed: str, wanted: int | None) -> Iterator[int]:
    """`count` different numbers below `total`: all in order, or drawn by SHA-256 of seed and draw.

    A hash and not `random`: its sequence is the same in every version of Python, so a suite's hash is too. A larger
    count goes on where the smaller one ended.
    """
    if wanted is None:
        yield from range(total)
        return
    seen: set[int] = set()
    draw = 0
    while len(seen) < count:
        index = int.from_bytes(hashlib.sha256(f"{seed}:{draw}".encode()).digest()) % total
        draw += 1
        if index not in seen:
            seen.add(index)
            yield index


def _combination(values: Mapping[str, Sequence[Any]], index: int) -> dict[str, Any]:
    """Combination number `index`; the last variable changes fastest."""
    chosen = {}
    for name in reversed(list(values)):
        index, place = divmod(index, len(values[name]))
        chosen[name] = values[name][place]
    return chosen


def _fill(value: Any, chosen: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {_fill(key, chosen): _fill(inner, chosen) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, chosen) for inner in value]
    if not isinstance(value, str) or "{{" not in value:
        return value
    whole = _PLACE.fullmatch(value)
    if whole and not whole[1]:
        return _value(whole[2], chosen)
    return _PLACE.sub(lambda m: m[0][1:] if m[1] else str(_value(m[2], chosen)), value)


def _value(place: str, chosen: Mapping[str, Any]) -> Any:
    name, _, key = place.partition(".")
    return chosen[name][key] if key else chosen[name]
