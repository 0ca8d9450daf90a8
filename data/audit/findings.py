"""What an audit finds: counted everywhere, shown where it came first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Severity = Literal["fault", "warning", "accepted"]

SHOWN = 20
"""Examples kept of one finding."""
_VARIANTS = 20
"""Findings of one code that are told apart; what comes later is counted under its code alone."""


class Place(NamedTuple):
    """Where a conversation stands: file of the source, line or row, and its id."""

    file: int
    number: int
    id: str


class Example(NamedTuple):
    """One place of a finding, and what stands there."""

    place: Place
    detail: str


@dataclass
class Group:
    """Everything found of one code and subject.

    Attributes:
        count: How often.
        conversations: In how many conversations.
        about: What all of them have in common, such as a difference; empty where the examples say it.
        examples: The first ones.
        last: The conversation that was counted last.
    """

    count: int = 0
    conversations: int = 0
    about: str = ""
    examples: list[Example] = field(default_factory=list)
    last: Place | None = None


class Groups(dict[tuple[str, str], Group]):
    """Findings by code and subject: a variant of the system prompt, a failed check."""

    def add(self, code: str, place: Place, detail: str = "", *, subject: str = "", about: str = "") -> None:
        """Count one finding."""
        key = (code, subject)
        if key not in self and sum(other == code for other, _ in self) >= _VARIANTS:
            key, detail, about = (code, ""), detail or about.partition("\n")[0], ""
        group = self.setdefault(key, Group(about=about))
        group.count += 1
        group.conversations += group.last != place
        group.last = place
        if len(group.examples) < SHOWN:
            group.examples.append(Example(place, detail))

    def merge(self, other: Groups) -> None:
        """Take over what was found in later conversations."""
        for key, group in other.items():
            mine = self.get(key)
            if mine is None and sum(code == key[0] for code, _ in self) >= _VARIANTS:
                mine = self.setdefault((key[0], ""), Group())
            if mine is None:
                self[key] = group
                continue
            mine.count += group.count
            mine.conversations += group.conversations
            mine.examples += group.examples[: SHOWN - len(mine.examples)]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        code: Short name, by which it can be accepted.
        severity: A fault forbids training; an accepted one does not.
        count: How often.
        message: What was found, in words.
        examples: Place and detail of the first ones.
    """

    code: str
    severity: Severity
    count: int
    message: str
    examples: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """The message and a few of the examples, one a line."""
        shown = [f"  {place}: {detail}" if detail else f"  {place}" for place, detail in self.examples[:5]]
        if self.examples and self.count > len(shown):
            shown.append(f"  … and {self.count - len(shown)} more")
        return "\n".join([self.message, *shown])

    def to_json(self) -> dict[str, Any]:
        """The finding as a jsonable mapping."""
        examples = [{"place": place, "detail": detail} for place, detail in self.examples]
        return {**vars(self), "examples": examples}


@dataclass
class AuditReport:
    """The findings; `faults` forbid training, `warnings` do not, `numbers` hold the rest (jsonable)."""

    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """Every fault in words."""
        return [str(finding) for finding in self.findings if finding.severity == "fault"]

    @property
    def warnings(self) -> list[str]:
        """Every warning and every accepted fault in words."""
        return [str(finding) for finding in self.findings if finding.severity != "fault"]

    def to_json(self) -> dict[str, Any]:
        """The whole report as one jsonable mapping: `faults`, `warnings`, `findings` and the keys of `numbers`."""
        found = [finding.to_json() for finding in self.findings]
        return {"faults": self.faults, "warnings": self.warnings, "findings": found, **self.numbers}


Show = Callable[[Place], str]
"""Says a place in words."""
