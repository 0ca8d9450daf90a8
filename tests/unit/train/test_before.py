from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qat.errors import UserError
from qat.recipe.schema import Recipe
from qat.train import before
from qat.train.before import packed_by, require_fits, require_trained_share
from qat.train.memory import Estimate, Need
from qat.train.sft import RowCounts, train_sft
from tests.unit.train import world
from tests.unit.train.conftest import Small


def _with(recipe: Recipe, **train: object) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


def test_too_little_memory_is_said_before_anything_is_loaded(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = world.recipe(small.base)
    monkeypatch.setattr(before, "_free_bytes", lambda: 1e6)
    monkeypatch.setattr("qat.train.sft.load_weights", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr("qat.train.sft.encode_file", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UserError, match="does not fit into memory") as caught:
        train_sft(recipe, small.base, small.train, small.validation, tmp_path)
    assert caught.value.where == "train.sft"
    assert "total" in require_fits(_with(recipe, allow=("memory",)), small.base, "sft", [], [])


def test_what_is_estimated_follows_the_recipe(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Need] = []

    def note(config: object, need: Need, *_: object) -> Estimate:
        asked.append(need)
        return Estimate(0, 0, 0, 0, 0, 0)

    monkeypatch.setattr(before, "require_memory", note)
    twice = world.recipe(small.base, sft={"gradient_accumulation": 2})
    recipe = _with(twice, memory="nvfp4", gradient_checkpointing=True)
    packed = packed_by(recipe, small.base)
    assert len(packed) == 14 and packed_by(world.recipe(small.base), small.base) == []
    require_fits(recipe, small.base, "sft", packed, [])
    require_fits(world.recipe(small.base), small.base, "distill", [], packed)
    first, second = asked
    assert (first.accumulates, second.accumulates) == (True, False)
    assert (first.memory, list(first.packed), first.checkpointing, first.teacher) == ("nvfp4", packed, True, False)
    assert (first.batch_size, first.length, first.rank, list(first.quantized)) == (4, 64, 4, [])
    assert (second.memory, second.checkpointing, second.teacher, list(second.quantized)) == (
        "bf16",
        False,
        True,
        packed,
    )


def test_what_torch_keeps_and_no_tensor_uses_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 that the driver has free, and 3 of the 7 that an earlier stage left with torch."""
    monkeypatch.setattr(before, "training_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10, 99))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 4)
    assert before._free_bytes() == 13


def test_several_processes_do_not_share_a_packed_base(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "ranks", lambda: 2)
    with pytest.raises(UserError, match="on one GPU"):
        require_fits(world.recipe(small.base), small.base, "sft", ["backbone.layers.0.mixer.in_proj"], [])


def test_a_base_that_is_cut_stands_beside_its_parts_first(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes each holds the loaded base and its half of it for a moment; what a step needs is not known."""
    stored = (small.base / "model.safetensors").stat().st_size
    monkeypatch.setattr(before, "ranks", lambda: 2)
    monkeypatch.setattr(before, "sharding", lambda: True)
    monkeypatch.setattr(before, "_free_bytes", lambda: 1.5 * stored / 0.94 + 1)
    assert "total" in require_fits(world.recipe(small.base), small.base, "sft", [], [])
    monkeypatch.setattr(before, "_free_bytes", lambda: 1.5 * stored / 0.94 - 1)
    with pytest.raises(UserError, match="base does not fit"):
        require_fits(world.recipe(small.base), small.base, "sft", [], [])
    monkeypatch.setattr(before, "sharding", lambda: False)
    with pytest.raises(UserError, match="training does not fit") as caught:
        require_fits(world.recipe(small.base), small.base, "sft", [], [])
    assert "--launch-flags=--use_fsdp" in caught.value.remedy
    monkeypatch.setattr(before, "ranks", lambda: 1)
    monkeypatch.setattr(before, "_free_bytes", lambda: stored)
    with pytest.raises(UserError, match="training does not fit") as caught:
        require_fits(world.recipe(small.base), small.base, "sft", [], [])
    assert "--use_fsdp" not in caught.value.remedy


@pytest.mark.parametrize(("supervised", "refused"), [(199, True), (200, False)])
def test_a_mask_that_trains_next_to_nothing(small: Small, supervised: int, refused: bool) -> None:
    recipe = world.recipe(small.base)
    counts = RowCounts(conversations=10, tokens=10_000, supervised=supervised, truncated=3, dropped=50)
    if not refused:
        require_trained_share(recipe, counts, small.train)
        return
    with pytest.raises(UserError, match=r"1\.99% of the tokens") as caught:
        require_trained_share(recipe, counts, small.train)
    assert "3 rows cut at 64 tokens" in str(caught.value.value)
    require_trained_share(_with(recipe, allow=("thin_mask",)), counts, small.train)


def test_fine_tuning_asks_for_both(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "LEAST_TRAINED_SHARE", 0.99)
    with pytest.raises(UserError, match="would be trained on"):
        train_sft(world.recipe(small.base), small.base, small.train, small.validation, tmp_path)
