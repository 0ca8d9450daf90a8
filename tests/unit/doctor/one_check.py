"""One check at a time on a checkpoint: what it finds, and nothing from the others."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qat.export.doctor.findings import Finding
from qat.export.doctor.folder import CheckpointView, open_checkpoint
from tests.unit.doctor.planting import TINY_BASE

Check = Callable[[CheckpointView, CheckpointView | None], Iterator[Finding]]
Plant = Callable[[Path], Any]

_TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def copy_texts(target: Path) -> Path:
    """The tiny base without its weights: everything that is read as text."""
    target.mkdir(parents=True)
    for name in _TEXTS:
        shutil.copyfile(TINY_BASE / name, target / name)
    return target


def findings(check: Check, folder: Path, base: Path | None = None) -> list[Finding]:
    """What one check says; reading itself must have found nothing, and every text must say something."""
    view = open_checkpoint(folder)
    assert not view.findings
    found = list(check(view, None if base is None else open_checkpoint(base)))
    for finding in found:
        assert all(finding), finding
    return found


def codes(check: Check, folder: Path, base: Path | None = None) -> set[str]:
    return {finding.code for finding in findings(check, folder, base)}
