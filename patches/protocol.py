"""What a patch is."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, Protocol, runtime_checkable


class Status(StrEnum):
    """What a probe found."""

    NEEDED = "needed"
    NOT_NEEDED = "not_needed"
    APPLIED = "applied"
    CANNOT_TELL = "cannot_tell"


class ProbeResult(NamedTuple):
    """The outcome of a probe.

    Attributes:
        status: `APPLIED` where the defect is absent because this process has the patch on.
        detail: What was observed, in one sentence.
    """

    status: Status
    detail: str


@runtime_checkable
class Patch(Protocol):
    """One defect of a library and its repair.

    Attributes:
        name: The module's name in this package, used in recipes, receipts and commands.
        title: The defect in one line.
        breaks: What goes wrong because of it.
        upstream: Where it stands in the library, or its report.
        affects: The versions in which it was seen.
    """

    name: str
    title: str
    breaks: str
    upstream: str
    affects: str

    def probe(self) -> ProbeResult:
        """Reproduce the defect in a tiny case, in less than two seconds and without side effects."""

    def apply(self) -> None:
        """Put the repair in place in this process; a second call changes nothing."""

    def revert(self) -> None:
        """Take the repair out again; without it, nothing happens."""
