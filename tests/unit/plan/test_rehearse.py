"""The rehearsal: lines by hand, the network that is built, and its projection against a stage that really runs."""

from __future__ import annotations

import json
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from qat.errors import UserError
from qat.plan import rehearse as rehearsal
from qat.plan.measure import Rate, line
from qat.plan.rehearse import _chosen, rehearse
from qat.plan.rows import estimate_rows
from qat.plan.stages import training_stages
from qat.recipe.load import load_recipe
from qat.recipe.schema import Recipe, SftBlock
from tests.tiny_models import nemotron_h_tiny
from tests.unit.train import world


def small_recipe(folder: Path, train: dict[str, Any] | None = None, **further: Any) -> Recipe:
    """Of the tiny Nemotron-H, whose folder holds a config.json and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    nemotron_h_tiny().config.save_pretrained(folder)
    document = world.recipe(folder).model_dump(mode="json")
    document["train"] |= train or {}
    return Recipe.model_validate_json(json.dumps(document | further))


def test_a_line_through_exact_points() -> None:
    assert line([(10, 3.0), (20, 5.0), (40, 9.0)]) == pytest.approx((1.0, 0.2))
    assert Rate(1.0, 0.2).seconds(times=2, tokens=30) == pytest.approx(8.0)


def test_no_part_of_a_line_is_negative() -> None:
    assert line([(10, 1.0), (20, 3.0)]).fixed == 0 and line([(10, 1.0), (20, 3.0)]).per_token > 0
    assert line([(10, 3.0), (20, 1.0)]) == (2.0, 0.0)
    assert line([(10, 3.0), (10, 5.0)]) == pytest.approx((0.0, 0.4))  # all of one length


def test_the_longest_batch_comes_first_and_each_size_is_timed_alike() -> None:
    lengths = [5, 50, 20, 10, 40, 30]
    order, tokens = _chosen(lengths, SftBlock(batch_size=2, gradient_accumulation=3))
    assert order[:3] == [[1, 4]] * 3 and len(order) == 3 * len(tokens)
    assert tokens[0] == 2 * 50 * 3 and sorted(tokens[4:]) == sorted(2 * [2 * 50 * 3, 2 * 30 * 3, 2 * 10 * 3])


def test_the_network_is_that_of_load_base(tmp_path: Path) -> None:
    """Names, shapes and types of a loaded checkpoint of the same config."""
    from qat.plan.random_base import random_base
    from qat.train.base import load_base

    folder = world.save_base(tmp_path / "base")
    loaded, built = load_base(folder), random_base(folder, [], seed=1)
    for kind in ("named_parameters", "named_buffers"):
        wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in getattr(loaded, kind)()}
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in getattr(built, kind)()} == wanted
    assert not built.training and not built.config.use_cache
    assert not any(parameter.requires_grad for parameter in built.parameters())
    assert built.config._experts_implementation == loaded.config._experts_implementation


def test_every_stage_is_measured_and_projected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves no network behind: of a base that fills half of a GPU the next stage builds another."""
    built: list[weakref.ref[Any]] = []
    original = rehearsal.random_base

    def watched(*arguments: Any) -> Any:
        assert not any(model() for model in built), f"network {len(built)} still stands"
        model = original(*arguments)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(rehearsal, "random_base", watched)
    recipe, told = small_recipe(tmp_path / "base"), []
    found = rehearse(recipe, told.append)
    assert len(built) == 3 and told == found.stages
    stages = training_stages(recipe, estimate_rows(recipe, tmp_path / "base"))
    assert [stage.name for stage in found.stages] == [stage.name for stage in stages]
    for measured, planned in zip(found.stages, stages, strict=True):
        assert set(measured.parts) >= {f"{part.kind} {part.network}" for part in planned.passes}
        assert measured.seconds > 0
        # The table's students were read in distillation already: no network is built, so it has no peak of its own.
        assert (measured.peak_gib is None) == (measured.name == "divergence")
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["seconds"] == pytest.approx(sum(stage.seconds for stage in found.stages), abs=0.1)


def test_a_packed_base_and_recomputed_layers_are_rehearsed_too(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "base", {"memory": "nvfp4", "gradient_checkpointing": True})
    assert rehearse(recipe).seconds > 0


def test_too_little_memory_is_said_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was built")

    monkeypatch.setattr("qat.plan.rehearse.random_base", never)
    monkeypatch.setattr("qat.train.before._free_bytes", lambda: 40 * 2.0**30)
    with pytest.raises(UserError, match="does not fit into memory") as fault:
        rehearse(load_recipe("annie_v4"))
    assert "this would fit" in fault.value.remedy


@pytest.mark.slow
def test_the_projection_is_within_a_quarter_of_a_real_stage(tmp_path: Path) -> None:
    """On an idle machine: what the rehearsal says of annie_tiny's fine-tuning, and how long that really takes."""
    from qat.data.generate import conversations
    from qat.data.load import load_conversations, save_conversations
    from qat.data.schema import load_persona
    from qat.inputs import base_folder, split
    from qat.train.sft import train_sft

    recipe = load_recipe("annie_tiny", ["train.sft.epochs=1", "train.sft.early_stopping_patience=0"])
    projected = next(stage for stage in rehearse(recipe).stages if stage.name == "sft").seconds
    file = tmp_path / "all.jsonl"
    save_conversations(file, conversations(load_persona(recipe.persona), 300, 11))  # type: ignore[arg-type]
    train, validation = split(load_conversations(file), recipe.data.validation_fraction, recipe.data.seed)
    save_conversations(tmp_path / "train.jsonl", train)
    save_conversations(tmp_path / "validation.jsonl", validation)
    start = time.monotonic()
    train_sft(recipe, base_folder(recipe), tmp_path / "train.jsonl", tmp_path / "validation.jsonl", tmp_path / "sft")
    measured = time.monotonic() - start
    print(f"projected {projected:.1f} s, measured {measured:.1f} s")
    assert projected == pytest.approx(measured, rel=0.25)
