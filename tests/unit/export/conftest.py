from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.unit.export.builders import base_digest, make_adapter, make_base, make_state, merge_reference


class Persona(NamedTuple):
    """A base with two adapters, trained one on top of the other, and the merged weights by an independent route."""

    base: Path
    adapters: list[Path]
    merged: Path
    state: Path


@pytest.fixture(scope="session")
def persona(tmp_path_factory: pytest.TempPathFactory) -> Persona:
    root = tmp_path_factory.mktemp("persona")
    base = make_base(root / "base")
    digest = base_digest(base)
    sft = make_adapter(base, root / "sft", seed=1, sidecar={"base_sha256": digest})
    parent = hashlib.sha256((sft / "adapter_model.safetensors").read_bytes()).hexdigest()
    distilled = make_adapter(
        base, root / "distilled", seed=2, r=2, sidecar={"base_sha256": digest, "parent_sha256": parent}
    )
    merged = merge_reference(base, [sft, distilled], root / "merged")
    return Persona(base, [sft, distilled], merged, make_state(base, merged, root / "quant_state.safetensors"))
