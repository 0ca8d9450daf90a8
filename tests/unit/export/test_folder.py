"""A folder that is whole or absent: failures, full disks, kills, collisions."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qat.errors import UserError
from qat.export import export_checkpoint
from qat.export.folder import require_space, whole_folder
from tests.unit.export.conftest import Persona


def test_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with whole_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "x")])
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), whole_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_user_error(
    persona: Persona, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real, calls = os.pwrite, []

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 20:
            raise OSError(code, os.strerror(code))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(UserError, match="disk is full"):
        export_checkpoint(persona.base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_any_work(
    persona: Persona, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("qat.export.folder.shutil.disk_usage", lambda path: Usage())
    monkeypatch.setattr("qat.export.ShardWriter", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(UserError, match="not enough free disk space"):
        export_checkpoint(persona.base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    require_space(tmp_path / "out", 1000)
    with pytest.raises(UserError):
        require_space(tmp_path / "out", 1001)


def test_an_older_export_is_replaced_and_survives_a_failure(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for content in ("old", "new"):
        with whole_folder(target) as folder:
            (folder / "export.json").write_text(content)
            (folder / content).touch()
    assert {path.name for path in target.iterdir()} == {"export.json", "new"}
    with pytest.raises(ValueError), whole_folder(target):
        raise ValueError
    assert (target / "export.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("new_is_in_place", [False, True])
def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path, new_is_in_place: bool) -> None:
    target, old = tmp_path / "out", tmp_path / ".out.old"
    old.mkdir()
    (old / "export.json").write_text("old")
    if new_is_in_place:
        target.mkdir()
        (target / "export.json").write_text("new")
    with pytest.raises(ValueError), whole_folder(target):
        raise ValueError
    assert (target / "export.json").read_text() == ("new" if new_is_in_place else "old")
    assert list(tmp_path.iterdir()) == [target]


def test_other_things_are_never_overwritten(persona: Persona, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="no export"):
        export_checkpoint(persona.base, target)
    assert (target / "thesis.tex").read_text() == "years of work"
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(target)
    file.touch()
    for path in (link, file):
        with pytest.raises(UserError, match="no export"), whole_folder(path):
            pass
    with pytest.raises(UserError, match="overwrite one of its inputs"):
        export_checkpoint(persona.base, persona.base)
    with pytest.raises(UserError, match="overwrite one of its inputs"):
        export_checkpoint(persona.base, persona.adapters[0], adapters=persona.adapters[:1])
    (tmp_path / "empty").mkdir()
    export_checkpoint(persona.base, tmp_path / "empty")


def test_two_processes_cannot_write_one_folder(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model.safetensors").touch()
    held = os.open(partial, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="Another process"), whole_folder(tmp_path / "out"):
            pass
        assert (partial / "model.safetensors").exists()
    finally:
        os.close(held)
    with whole_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []


KILLED = """
import sys
from pathlib import Path
import qat.export as export
real = export.verify_export
def stop(*arguments, **options):
    print("written", flush=True)
    sys.stdin.read()
export.verify_export = stop
export.export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), quant_state=Path(sys.argv[3]))
"""


def test_after_a_kill_the_next_export_gives_the_same_bytes(persona: Persona, tmp_path: Path) -> None:
    """Killed when all tensors are written and nothing is proven: nothing under the final name, and a clean next try."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(persona.base), str(out), str(persona.state)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert not out.exists()
    assert (tmp_path / ".out.partial" / "model.safetensors").is_file()
    export_checkpoint(persona.base, out, quant_state=persona.state)
    assert list(tmp_path.iterdir()) == [out]
    export_checkpoint(persona.base, tmp_path / "other", quant_state=persona.state)
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name


def test_nothing_in_an_export_tells_the_time(persona: Persona, tmp_path: Path) -> None:
    export_checkpoint(persona.base, tmp_path / "a" / "out")
    time.sleep(1.1)
    export_checkpoint(persona.base, tmp_path / "b" / "out")
    for path in (tmp_path / "a" / "out").iterdir():
        content = path.read_bytes()
        assert content == (tmp_path / "b" / "out" / path.name).read_bytes(), path.name
        assert str(tmp_path).encode() not in content, path.name
