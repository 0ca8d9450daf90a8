from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.unit.train import world

# On a GPU mamba-ssm otherwise sums in any order, and tries all tiles of its kernels for every new shape. Read when its
# modules are imported.
os.environ["MAMBA_DETERMINISTIC"] = "1"
os.environ.pop("TRITON_CACHE_AUTOTUNING", None)


class Small(NamedTuple):
    """A tiny checkpoint and conversations for it."""

    base: Path
    train: Path
    validation: Path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    root = tmp_path_factory.mktemp("small")
    base = world.save_base(root / "base")
    train = world.save_conversations(root / "train.jsonl", 24, seed=1)
    validation = world.save_conversations(root / "validation.jsonl", 10, seed=2)
    return Small(base, train, validation)
