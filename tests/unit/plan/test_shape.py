"""Where a base's sizes are found, and that the shipped cards say what the published files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat.errors import UserError
from qat.plan.shape import CARDS, find_shape
from qat.recipe.load import load_recipe, recipe_names
from qat.recipe.schema import BaseBlock

NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_can_be_planned_without_its_base(name: str) -> None:
    shape = find_shape(load_recipe(name).base)
    assert shape.text["model_type"] and shape.text["hidden_size"] > 0


@pytest.mark.parametrize("card", sorted(CARDS.glob("*.json")), ids=lambda path: path.stem)
def test_a_card_is_the_published_file_less_what_is_no_size(card: Path, real_data: Path) -> None:
    published = json.loads((real_data / "model_configs" / f"{card.stem}_config.json").read_text())
    content = json.loads(card.read_text())
    assert content["config"] == {key: published[key] for key in content["config"]}
    assert content["model"].replace("/", "--") == card.stem and content["source"]


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    shape = find_shape(BaseBlock(model=str(tmp_path), family="llama"))
    assert shape.config["hidden_size"] == 8 and shape.folder == tmp_path


def test_what_fetch_config_only_brought_comes_before_a_card(empty_cache: Path) -> None:
    repository = empty_cache / f"models--{NANO.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text('{"model_type": "nemotron_h", "hidden_size": 1}')
    found = find_shape(BaseBlock(model=NANO))
    assert found.config["hidden_size"] == 1 and "cache" in found.origin


def test_of_a_model_with_towers_the_language_model_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "x", "text_config": {"model_type": "llama"}}')
    assert find_shape(BaseBlock(model=str(tmp_path), family="llama")).text == {"model_type": "llama"}


@pytest.mark.parametrize("model", ["nobody/nothing", "./no/such/folder", "words"])
def test_unknown_sizes_say_how_to_get_them(model: str) -> None:
    with pytest.raises(UserError, match="not known here") as fault:
        find_shape(BaseBlock(model=model))
    assert "--config-only" in fault.value.remedy


def test_a_broken_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        find_shape(BaseBlock(model=str(tmp_path)))
