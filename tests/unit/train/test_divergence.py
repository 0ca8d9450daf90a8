from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.train import divergence
from tests.unit.train import world
from tests.unit.train.conftest import Small


def test_the_persona_is_gone_when_an_arm_brings_its_own_weights(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """An arm that was trained as a whole comes first: its network is loaded, and the persona's is not begun with."""
    persona: list[weakref.ref[torch.nn.Module]] = []
    alive: list[bool] = []

    def load_persona(*arguments: Any) -> Any:
        model = original(*arguments)
        model.held = [model]  # in a circle, as replaced forwards hold it on a GPU
        persona.append(weakref.ref(model))
        return model

    def load_base(folder: Path) -> Any:
        alive.append(persona[0]() is not None)
        return loaded(folder)

    original, loaded = divergence.load_persona, divergence.load_base
    monkeypatch.setattr(divergence, "load_persona", load_persona)
    monkeypatch.setattr(divergence, "load_base", load_base)
    arms: dict[str, tuple[Path | None, Path | None]] = {"whole": (small.base, None)}
    gc.disable()  # when Python collects by itself is luck
    try:
        found = divergence.measure(world.recipe(small.base), small.base, small.base, arms, small.validation)
    finally:
        gc.enable()
    assert alive == [False] and found["whole"].replies.kl == 0.0
