"""Looking at defects in processes of their own, and the commands that show what was found."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qat.cli import main
from qat.patches import check, registry
from qat.patches.protocol import Defect, ProbeResult, Status
from tests.unit.patches.fakes import Fake, FakePatch, FakeWorkaround

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Defect]:
    """A registry of five, looked at in forks of this process."""
    monkeypatch.setattr(registry, "_DEFECTS", {})
    monkeypatch.setattr(registry.pkgutil, "iter_modules", lambda _: [])
    found: list[Any] = [
        FakePatch("gone", Status.NOT_NEEDED),
        FakePatch("patched", Status.NEEDED),
        FakePatch("unclear", Status.CANNOT_TELL),
        FakeWorkaround("way_around", Status.NEEDED),
    ]
    for fake in found:
        registry.register(fake)

    def look(defects: list[Defect]) -> Iterator[check.Checked]:
        for defect in defects:
            yield check._take(defect, check._in_a_fork(defect))

    monkeypatch.setattr(check, "look", look)
    return found


def one(fake: Any) -> check.Checked:
    return check._take(fake, check._in_a_fork(fake))


def test_what_is_found_and_what_it_came_to(fakes: list[Any]) -> None:
    found = [one(fake) for fake in fakes]
    assert [(checked.status, checked.outcome) for checked in found] == [
        (Status.NOT_NEEDED, ""),
        (Status.NEEDED, "applied"),
        (Status.CANNOT_TELL, ""),
        (Status.NEEDED, "avoided"),
    ]
    assert found[1].evidence == "seen needed" and found[1].repaired == "seen applied"
    assert all(fake.calls == [] for fake in fakes), "nothing of it happened in this process"
    assert [check.recall(fake) for fake in fakes] == [
        checked._replace(remembered=True, seconds=round(checked.seconds, 3)) for checked in found
    ]


def test_a_training_remembers_less_than_a_listing_needs(fakes: list[Any]) -> None:
    """`ensure` keeps the probe of a patch; whether the patch holds was looked at in that process only."""
    registry.ensure("gone", "patched")
    gone, patched, *_ = fakes
    assert check.recall(patched) is None
    known = check.recall(gone)
    assert known is not None and known.status is Status.NOT_NEEDED


def test_a_repair_that_does_not_help() -> None:
    for fake in (FakePatch("a", Status.NEEDED, works=False), FakeWorkaround("b", Status.NEEDED, works=False)):
        checked = one(fake)
        assert checked.failed and checked.outcome == "fails" and checked.status is Status.NEEDED


class Raises(FakePatch):
    def probe(self) -> ProbeResult:
        raise RuntimeError("the library changed")


class Dies(FakePatch):
    def probe(self) -> ProbeResult:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Hangs(FakePatch):
    def probe(self) -> ProbeResult:
        time.sleep(60)
        raise AssertionError


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Raises, "RuntimeError: the library changed"), (Dies, "died with code -9"), (Hangs, "no answer within 0.3 s")],
)
def test_a_look_without_result_fails_and_is_not_remembered(
    kind: type[Fake], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "TIMEOUT_S", 0.3)
    fake: Any = kind("a", Status.NEEDED)
    checked = one(fake)
    assert checked.failed and said in checked.repaired
    assert check.recall(fake) is None


def test_the_real_thing_in_a_process_of_its_own() -> None:
    """Without torch, so that it is quick; the order is the one asked for."""
    defects = registry.find("chat_template_string_arguments", "mamba_ssm_kernels_without_build")
    found = list(check.look(defects))
    assert [checked.name for checked in found] == [defect.name for defect in defects]
    assert found[0].outcome == "avoided" and not any(checked.failed for checked in found)
    assert [check.recall(defect) is not None for defect in defects] == [True, True]


def test_a_process_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.sys, "executable", "/bin/false")
    (found,) = check.look(registry.find("chat_template_string_arguments"))
    assert found.failed and "the checking process died" in found.repaired


def test_list(fakes: list[Any], capsys: Capture) -> None:
    assert main(["patches", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["status"], row["outcome"], row["remembered"]) for row in rows] == [
        ("gone", "not_needed", "", False),
        ("patched", "needed", "applied", False),
        ("unclear", "cannot_tell", "", False),
        ("way_around", "needed", "avoided", False),
    ]
    assert rows[0]["versions"] == {"no-such-library": "absent"} and rows[0]["breaks"] == "Silent: x"
    assert main(["patches", "list"]) == 0
    out = capsys.readouterr().out
    assert "seen needed" not in out and "1 applied, 1 avoided, 1 cannot tell, 1 not needed" in out
    assert main(["patches", "list", "--evidence"]) == 0
    assert "seen needed\n  applied: seen applied" in capsys.readouterr().out


def test_check(fakes: list[Any], capsys: Capture) -> None:
    assert main(["patches", "check", "patched", "--json"]) == 0
    assert [row["remembered"] for row in json.loads(capsys.readouterr().out)] == [False]
    assert main(["patches", "check", "patched", "--json"]) == 0
    assert [row["remembered"] for row in json.loads(capsys.readouterr().out)] == [True]
    assert main(["patches", "check", "patched", "--json", "--no-cache"]) == 0
    assert [row["remembered"] for row in json.loads(capsys.readouterr().out)] == [False]
    assert main(["patches", "check"]) == 0  # what cannot be told is no failure
    registry.register(FakePatch("broken", Status.NEEDED, works=False))
    capsys.readouterr()
    assert main(["patches", "check"]) == 1
    assert "1 fails" in capsys.readouterr().out


def test_explain(fakes: list[Any], capsys: Capture) -> None:
    assert main(["patches", "explain", "patched", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["repair"] == "a repair" and about["place"] == "here" and about["installed"]
    assert main(["patches", "explain", "patchd"]) == 2
    assert "Did you mean 'patched'" in capsys.readouterr().err


def test_a_listing_that_is_remembered_needs_no_torch() -> None:
    """Nor a process of its own: that is what the memory is for."""
    import subprocess
    import sys

    code = (
        "import sys; from qat.patches import cache, check, registry;"
        "d = registry.find('chat_template_string_arguments')[0];"
        "r = cache.Remembered(cache.ProbeResult(cache.Status.NOT_NEEDED, 'x'), 0.1);"
        "cache.remember(d, 'probe', r); from qat.cli import main;"
        "code = main(['patches', 'check', d.name]); print('torch' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "known" in done.stdout and done.stdout.strip().endswith("False")
