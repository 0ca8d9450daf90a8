"""JSON of strangers: parsed within limits of size, count and depth, with repeated keys remembered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

#: A parsed value takes up to about 100 bytes; a header of 250,000 tensors has two million values, the biggest published
#: tokenizers have three.
MAX_VALUES = 4_000_000
#: Configurations nest less than ten deep.
MAX_DEPTH = 64


class JsonFault(Exception):
    """The text is no JSON."""


class JsonBomb(JsonFault):
    """The text is JSON that would take unreasonable memory or depth to hold."""


class Parsed(NamedTuple):
    """A parsed document.

    Attributes:
        value: The value; of a repeated key the last one counts, as in Python's own parser.
        repeated: The keys that stand twice in one object.
    """

    value: object
    repeated: list[str]


def parse_json(raw: bytes) -> Parsed:
    """Parse one document.

    Raises:
        JsonFault: It is not UTF-8 or no JSON.
        JsonBomb: It holds more than `MAX_VALUES` values or nests deeper than `MAX_DEPTH`.
    """
    if raw.count(b"{") + raw.count(b"[") + raw.count(b",") > MAX_VALUES:
        raise JsonBomb(f"more than {MAX_VALUES} values")
    repeated: list[str] = []

    def collect(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return found

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=collect)
    except RecursionError:
        raise JsonBomb("nested without end") from None
    except ValueError as error:  # no UTF-8, no JSON, or a number of more digits than Python converts
        raise JsonFault(str(error)) from error
    _require_shallow(value)
    return Parsed(value, repeated)


def _require_shallow(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise JsonBomb(f"nested deeper than {MAX_DEPTH}")
