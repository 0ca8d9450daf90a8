"""What the tests of saving share: a repair for the length of a block, and checkpoints read without Transformers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qat.patches.protocol import Patch, Status


@contextlib.contextmanager
def applied(*patches: Patch) -> Iterator[None]:
    """Have the patches in place inside the block, whether they are needed or not."""
    try:
        for patch in patches:
            patch.apply()
        yield
    finally:
        for patch in patches:
            patch.revert()


def require_repair(patch: Patch) -> None:
    """The probe sees the defect, not after `apply`, and again after `revert`."""
    first = patch.probe()
    assert first.status is Status.NEEDED, first.detail
    with applied(patch):
        patch.apply()
        repaired = patch.probe()
        assert repaired.status is Status.APPLIED, repaired.detail
    assert patch.probe() == first


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint of one file."""
    return load_file(folder / "model.safetensors")


def config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON file of a checkpoint."""
    content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return content


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bytes."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
