"""What is remembered of a probe, and what makes it forgotten."""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path

import pytest

from qat.patches import cache
from qat.patches.cache import Remembered
from qat.patches.protocol import ProbeResult, Status
from tests.unit.patches.fakes import FakePatch

SEEN = Remembered(ProbeResult(Status.NEEDED, "seen"), 0.5)


@pytest.fixture(autouse=True)
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (cache._version, cache._torch_build, cache._machine, cache._source_digest):
        cached.cache_clear()
    return tmp_path / "qat" / "probes.json"


def test_remembered_by_defect_and_kind(file: Path) -> None:
    one, two = FakePatch("one", Status.NEEDED), FakePatch("two", Status.NEEDED)
    assert cache.recall(one, "probe") is None
    cache.remember(one, "probe", SEEN)
    assert cache.recall(one, "probe") == SEEN
    assert cache.recall(one, "repair") is None and cache.recall(two, "probe") is None
    assert file.parent == cache.cache_file().parent and json.loads(file.read_text())["format"] == 1


def test_an_applied_patch_is_a_fact_of_one_process(file: Path) -> None:
    defect = FakePatch("one", Status.NEEDED)
    applied = Remembered(ProbeResult(Status.APPLIED, "on"), 0.1)
    cache.remember(defect, "probe", applied)
    assert cache.recall(defect, "probe") is None
    cache.remember(defect, "repair", applied)
    assert cache.recall(defect, "repair") == applied


@pytest.mark.parametrize("what", ["version", "python", "torch", "processor", "gpu", "source"])
def test_another_stack_asks_again(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    defect = FakePatch("one", Status.NEEDED)
    cache.remember(defect, "probe", SEEN)
    machine = cache._machine()
    changes = {
        "version": ("_version", lambda library, paths: "2.0"),
        "torch": ("_torch_build", lambda paths: "another"),
        "processor": ("_machine", lambda: {**machine, "cpu": "another"}),
        "gpu": ("_machine", lambda: {**machine, "gpus": ["another"]}),
        "source": ("_source_digest", lambda module, with_plugin: "another"),
    }
    if what == "python":
        monkeypatch.setattr(cache.platform, "python_version", lambda: "3.99.0")
    else:
        monkeypatch.setattr(cache, *changes[what])
    assert cache.recall(defect, "probe") is None
    monkeypatch.undo()


def test_the_source_counts_with_all_that_it_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "tree" / "qat"
    (package / "deep").mkdir(parents=True)
    (package / "defect.py").write_text("def probe():\n    from qat.deep import (\n        helper,\n    )\n")
    (package / "deep" / "__init__.py").write_text("")
    (package / "deep" / "helper.py").write_text("import qat.lowest as lowest\n")
    (package / "lowest.py").write_text("x = 1\n")
    (package / "stranger.py").write_text("x = 1\n")
    monkeypatch.setattr(cache, "_PACKAGE", package)

    def digest() -> str:
        cache._source_digest.cache_clear()
        return cache._source_digest("qat.defect", with_plugin=False)

    first = digest()
    (package / "stranger.py").write_text("x = 2\n")
    assert digest() == first
    seen = {first}
    for name in ("lowest.py", "deep/helper.py", "deep/__init__.py", "defect.py"):
        (package / name).write_text((package / name).read_text() + "# changed\n")
        seen.add(digest())
    assert len(seen) == 5
    monkeypatch.undo()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"format": 1}',
        b'{"format": 2, "results": {}}',
        b'{"format": 1, "results": {"a": 3}}',
        b'{"format": 1, "results": {"a": {"status": "maybe", "detail": "", "seconds": 1}}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_counts_as_empty_and_is_rewritten(file: Path, content: bytes) -> None:
    defect = FakePatch("one", Status.NEEDED)
    file.parent.mkdir()
    file.write_bytes(content)
    assert cache.recall(defect, "probe") is None
    cache.remember(defect, "probe", SEEN)
    assert cache.recall(defect, "probe") == SEEN


def test_a_folder_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    defect = FakePatch("one", Status.NEEDED)
    assert cache.through(defect, "probe", defect.probe).status is Status.NEEDED
    assert cache.through(defect, "probe", defect.probe).status is Status.NEEDED
    assert defect.calls == ["probe", "probe"]


def test_it_stays_small(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr(cache, "_MAX_RESULTS", 3)
    fakes = [FakePatch(f"d{number}", Status.NEEDED) for number in range(5)]
    for fake in fakes:
        cache.remember(fake, "probe", SEEN)
    assert [cache.recall(fake, "probe") is not None for fake in fakes] == [False, False, True, True, True]


def _write(number: int) -> None:
    for round_ in range(5):
        cache.remember(FakePatch(f"d{number}-{round_}", Status.NEEDED), "probe", SEEN)


def test_writers_at_the_same_time_lose_nothing(file: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert len(json.loads(file.read_text())["results"]) == 20
    assert sorted(path.name for path in file.parent.iterdir()) == ["probes.json", "probes.lock"]


def test_versions_are_those_of_the_probes_environment() -> None:
    from importlib.metadata import version

    defect = FakePatch("one", Status.NEEDED)
    defect.libraries = ("pytest", "no-such-library")  # type: ignore[assignment]
    assert cache.versions(defect) == {"pytest": version("pytest"), "no-such-library": "absent"}


def test_keys_need_no_torch() -> None:
    import subprocess

    code = (
        "import sys; from qat.patches.registry import all_defects; from qat.patches import cache;"
        "[cache.recall(d, 'probe') for d in all_defects()]; print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "False"
