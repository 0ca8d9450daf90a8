"""Defects of a library that does not exist."""

from __future__ import annotations

from qat.patches.protocol import Place, ProbeResult, Status


class Fake:
    """A defect that says of itself what it is told to."""

    title, breaks, upstream, affects, repair = "a title", "Silent: x", "a library", "fake 1.0", "a repair"
    libraries = ("no-such-library",)
    place = Place.HERE

    def __init__(self, name: str, status: Status, *, works: bool = True) -> None:
        self.name, self.status, self.works, self.calls = name, status, works, list[str]()

    def probe(self) -> ProbeResult:
        self.calls.append("probe")
        return ProbeResult(self.status, f"seen {self.status}")


class FakePatch(Fake):
    """Exists until `apply`, or for ever."""

    def apply(self) -> None:
        self.calls.append("apply")
        if self.works:
            self.status = Status.APPLIED

    def revert(self) -> None:
        if self.status is Status.APPLIED:
            self.status = Status.NEEDED


class FakeWorkaround(Fake):
    """Stays, and is gone around, or not."""

    def verify(self) -> ProbeResult:
        self.calls.append("verify")
        return ProbeResult(Status.NOT_NEEDED if self.works else Status.NEEDED, "gone around")
