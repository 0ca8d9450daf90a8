"""The journal: every line whole, in order, on disk when the context is left."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from qat.behavior.journal import Journal
from qat.errors import UserError


class Line(BaseModel):
    n: int
    text: str = "ಕನ್ನಡ\nline\u2028separator"


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_bytes().split(b"\n")[:-1]]


def test_a_slow_disk_delays_nothing_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, syncs = os.fsync, []

    def slow(descriptor: int) -> None:
        time.sleep(0.05)
        syncs.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    started = time.monotonic()
    with Journal(tmp_path / "deep" / "j.jsonl") as journal:
        for n in range(500):
            journal.append(Line(n=n))
        assert time.monotonic() - started < 0.5
    assert numbers(tmp_path / "deep" / "j.jsonl") == list(range(500))
    assert 1 <= len(syncs) < 20


def test_a_record_counts_as_kept_only_after_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = os.fsync, []
    journal = Journal(tmp_path / "j.jsonl")

    def watched(descriptor: int) -> None:
        seen.append(journal.on_disk)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    with journal:
        for n in range(3):
            journal.append(Line(n=n))
            while journal.on_disk <= n:
                time.sleep(0.001)
    assert seen == [0, 1, 2]


def test_partial_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: real(descriptor, bytes(content)[:7]))
    with Journal(tmp_path / "j.jsonl") as journal:
        for n in range(20):
            journal.append(Line(n=n))
    assert numbers(tmp_path / "j.jsonl") == list(range(20))


def test_lines_are_appended_to_what_is_there(tmp_path: Path) -> None:
    for n in range(2):
        with Journal(tmp_path / "j.jsonl") as journal:
            journal.append(Line(n=n))
    assert numbers(tmp_path / "j.jsonl") == [0, 1]


def test_lines_before_an_exception_are_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Journal(tmp_path / "j.jsonl") as journal:
        journal.append(Line(n=1))
        raise KeyboardInterrupt
    assert numbers(tmp_path / "j.jsonl") == [1]


def test_a_fault_of_the_last_write_is_raised_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, content: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="disk is full"), Journal(tmp_path / "j.jsonl") as journal:
        journal.append(Line(n=1))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError), Journal(tmp_path / "file" / "j.jsonl"):
        pass
