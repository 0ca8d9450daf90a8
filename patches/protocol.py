"""What a defect is, and the two ways qat deals with one: a patch in the process, or another way around it."""

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
        status: `NEEDED` where the defect was reproduced, `APPLIED` where it is absent because this process has the
            patch on, `CANNOT_TELL` where a library is missing or the case cannot occur on this machine.
        detail: What was observed, the evidence, in one sentence.
    """

    status: Status
    detail: str


class Place(StrEnum):
    """Where a probe must run."""

    HERE = "here"
    ENGINE = "engine"
    GPU = "gpu"


@runtime_checkable
class Defect(Protocol):
    """One defect of a library; class attributes of one class per module.

    Attributes:
        name: The module's name in this package, used in receipts and commands.
        title: The defect in one line.
        breaks: The exact error text in quotes, or `Silent: ` and what is then wrong.
        upstream: Where it stands in the library, or its report (`owner/repo#number`).
        affects: The versions in which it was seen.
        repair: What qat does about it, and what somebody who trains with something else should do.
    """

    name: str
    title: str
    breaks: str
    upstream: str
    affects: str
    repair: str

    @property
    def libraries(self) -> tuple[str, ...]:
        """Distributions whose versions decide the result."""

    @property
    def place(self) -> Place:
        """Where the probe runs: this process, vLLM's environment, or a GPU."""

    def probe(self) -> ProbeResult:
        """Reproduce the defect in a tiny case: two seconds at most after the imports, and no side effects."""


@runtime_checkable
class Patch(Defect, Protocol):
    """A defect that is repaired inside the process."""

    def apply(self) -> None:
        """Put the repair in place in this process; a second call changes nothing."""

    def revert(self) -> None:
        """Take the repair out again; without it, nothing happens."""


@runtime_checkable
class Workaround(Defect, Protocol):
    """A defect that leaves nothing to patch: qat goes another way, with code of its own, a flag or a check."""

    def verify(self) -> ProbeResult:
        """Take the probe's case qat's way: `NOT_NEEDED` where the defect is gone there, `NEEDED` where it is not."""
