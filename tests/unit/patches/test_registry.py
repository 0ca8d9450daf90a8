"""The registry's way: probe, apply where needed, probe again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from qat.errors import UserError
from qat.patches import registry
from qat.patches.protocol import Patch, ProbeResult, Status


class Fake:
    """A defect that exists until `apply`, or for ever."""

    title = breaks = upstream = "-"
    affects = "fake 1.0"

    def __init__(self, name: str, status: Status, *, works: bool = True) -> None:
        self.name, self.status, self.works, self.calls = name, status, works, list[str]()

    def probe(self) -> ProbeResult:
        self.calls.append("probe")
        return ProbeResult(self.status, "seen")

    def apply(self) -> None:
        self.calls.append("apply")
        if self.works:
            self.status = Status.APPLIED

    def revert(self) -> None:
        self.status = Status.NEEDED


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Patch]]:
    patches: dict[str, Patch] = {}
    monkeypatch.setattr(registry, "_PATCHES", patches)
    monkeypatch.setattr(registry.pkgutil, "iter_modules", lambda _: [])
    yield patches


def test_only_what_is_needed_is_applied(fakes: dict[str, Patch]) -> None:
    needed, fine, unclear = Fake("a", Status.NEEDED), Fake("b", Status.NOT_NEEDED), Fake("c", Status.CANNOT_TELL)
    for fake in (needed, fine, unclear):
        registry.register(fake)
    done = registry.ensure()
    assert [(entry["name"], entry["before"], entry["after"]) for entry in done] == [
        ("a", "needed", "applied"),
        ("b", "not_needed", "not_needed"),
        ("c", "cannot_tell", "cannot_tell"),
    ]
    assert needed.calls == ["probe", "apply", "probe"]
    assert fine.calls == unclear.calls == ["probe"]
    assert json.loads(json.dumps(done)) == done
    assert registry.ensure("a")[0]["before"] == "applied"
    assert needed.calls.count("apply") == 1


def test_a_patch_that_repairs_nothing_is_an_error(fakes: dict[str, Patch]) -> None:
    registry.register(Fake("a", Status.NEEDED, works=False))
    with pytest.raises(registry.PatchFailedError, match="a was applied"):
        registry.ensure("a")


def test_names(fakes: dict[str, Patch]) -> None:
    registry.register(Fake("a", Status.NOT_NEEDED))
    with pytest.raises(UserError, match="no such patch"):
        registry.ensure("b")
    with pytest.raises(ValueError, match="two patches"):
        registry.register(Fake("a", Status.NOT_NEEDED))


def test_every_file_of_the_package_is_one_documented_patch() -> None:
    patches = registry.all_patches()
    assert len(patches) >= 4
    for patch in patches:
        assert isinstance(patch, Patch)
        assert type(patch).__module__ == f"qat.patches.{patch.name}"
        for text in (patch.title, patch.breaks, patch.upstream, patch.affects):
            assert len(text) > 10


def test_listing_patches_loads_no_torch() -> None:
    code = "import sys; from qat.patches.registry import all_patches; all_patches(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "False"
