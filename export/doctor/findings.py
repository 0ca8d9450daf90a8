"""What the doctor says: one record per fault, the same whoever found it."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from itertools import islice
from typing import NamedTuple

_EXAMPLES = 3
_SHOWN_CHARACTERS = 400


class Severity(StrEnum):
    """How much a finding weighs.

    Attributes:
        ERROR: A server cannot load the checkpoint, or answers with another network than the one that was trained.
        WARNING: It loads, and something in it is likely wrong or lost.
        NOTE: Worth knowing; a checkpoint with notes only is clean.
    """

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Finding(NamedTuple):
    """One fault of a checkpoint.

    Attributes:
        code: Name of the kind of fault, as docs/doctor.md lists it.
        severity: How much it weighs.
        place: File, configuration key or tensor.
        problem: What was observed.
        consequence: What follows at loading or serving time.
        remedy: What to do about it.
    """

    code: str
    severity: Severity
    place: str
    problem: str
    consequence: str
    remedy: str


def printable(text: str) -> str:
    """Make text of an untrusted file safe to print: control characters and lone surrogates escaped, long text cut."""
    safe = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[: _SHOWN_CHARACTERS + 1])
    return safe if len(text) <= _SHOWN_CHARACTERS else f"{safe[:_SHOWN_CHARACTERS]}…"


def cleaned(finding: Finding) -> Finding:
    """The finding with every text safe to print; place and problem may quote an untrusted file."""
    code, severity, *texts = finding
    return Finding(code, severity, *map(printable, texts))


def examples(names: Iterable[str]) -> str:
    """Shorten a list for a message: `a, b, c, … (128 in all)`."""
    listed = list(names)
    shown = ", ".join(islice(listed, _EXAMPLES))
    return shown if len(listed) <= _EXAMPLES else f"{shown}, … ({len(listed)} in all)"
