"""The registry's way: probe, repair where needed, look again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qat.errors import UserError
from qat.patches import registry
from qat.patches.protocol import Defect, ProbeResult, Status
from tests.unit.patches.fakes import Fake, FakePatch, FakeWorkaround


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Defect]:
    """A registry without the package's own defects, and a cache of its own."""
    defects: dict[str, Defect] = {}
    monkeypatch.setattr(registry, "_DEFECTS", defects)
    monkeypatch.setattr(registry, "_HANDLED", {})
    monkeypatch.setattr(registry.pkgutil, "iter_modules", lambda _: [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return defects


def test_only_what_is_needed_is_repaired() -> None:
    needed, fine, unclear = (
        FakePatch("a", Status.NEEDED),
        FakePatch("b", Status.NOT_NEEDED),
        FakePatch("c", Status.CANNOT_TELL),
    )
    around = FakeWorkaround("d", Status.NEEDED)
    for fake in (needed, fine, unclear, around):
        registry.register(fake)
    done = registry.ensure("a", "b", "c", "d")
    assert [(entry["name"], entry["before"], entry["after"]) for entry in done] == [
        ("a", "needed", "applied"),
        ("b", "not_needed", "not_needed"),
        ("c", "cannot_tell", "cannot_tell"),
        ("d", "needed", "avoided"),
    ]
    assert needed.calls == ["probe", "apply", "probe"]
    assert fine.calls == unclear.calls == ["probe"]
    assert around.calls == ["probe", "verify"]
    assert json.loads(json.dumps(done)) == done
    assert done[0]["versions"] == "no-such-library absent"


def test_what_is_known_is_not_looked_for_again() -> None:
    """But a patch is looked at every time, and so is what could not be told."""
    needed, fine, unclear = (
        FakePatch("a", Status.NEEDED),
        FakePatch("b", Status.NOT_NEEDED),
        FakePatch("c", Status.CANNOT_TELL),
    )
    around = FakeWorkaround("d", Status.NEEDED)
    for fake in (needed, fine, unclear, around):
        registry.register(fake)
    first = registry.ensure("a", "b", "c", "d")
    for fake in (needed, fine, unclear, around):
        fake.calls.clear()
    needed.revert()  # a new process
    assert registry.ensure("a", "b", "c", "d") == first
    assert registry.handled() == first
    assert needed.calls == ["apply", "probe"]
    assert fine.calls == around.calls == []
    assert unclear.calls == ["probe"]


def test_what_is_gone_around_is_not_looked_for() -> None:
    one, two = FakePatch("one", Status.NEEDED), FakeWorkaround("two", Status.NOT_NEEDED)
    registry.register(one)
    registry.register(two)
    registry.ensure("two")
    two.calls.clear()
    records = [(entry["before"], entry["after"]) for entry in registry.avoided("one", "two")]
    assert records == [("unknown", "avoided"), ("not_needed", "avoided")]
    assert one.calls == two.calls == []


def test_a_repair_that_does_not_help_is_an_error() -> None:
    registry.register(FakePatch("a", Status.NEEDED, works=False))
    registry.register(FakeWorkaround("b", Status.NEEDED, works=False))
    for name in ("a", "b"):
        with pytest.raises(registry.PatchFailedError, match=f"{name}: the repair is in place"):
            registry.ensure(name)


def test_names() -> None:
    registry.register(FakePatch("fused", Status.NOT_NEEDED))
    with pytest.raises(UserError, match="Did you mean 'fused'"):
        registry.ensure("fuse")
    with pytest.raises(ValueError, match="two defects"):
        registry.register(FakePatch("fused", Status.NOT_NEEDED))


def test_a_defect_is_a_patch_or_a_workaround() -> None:
    class Both(FakePatch):
        def verify(self) -> ProbeResult:
            return self.probe()

    for fake in (Both("b", Status.NEEDED), Fake("neither", Status.NEEDED)):
        with pytest.raises(TypeError, match="either"):
            registry.register(fake)


def test_listing_loads_no_torch() -> None:
    code = "import sys; from qat.patches.registry import all_defects; all_defects(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "False"
