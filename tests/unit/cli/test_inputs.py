"""The split of the data, and what identifies the inputs of a stage."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qat import inputs
from qat.errors import UserError
from qat.recipe.load import load_recipe


def conversation(index: int, category: str, turn: str) -> Any:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": turn},
        {"role": "assistant", "content": "a"},
    ]
    return {"id": str(index), "category": category, "messages": messages}


def many(rng: random.Random, categories: dict[str, int]) -> list[Any]:
    made = [(category, f"{category} {number}") for category, count in categories.items() for number in range(count)]
    rng.shuffle(made)
    return [conversation(index, category, turn) for index, (category, turn) in enumerate(made)]


def test_split_by_share_of_every_category() -> None:
    items = many(random.Random(1), {"a": 100, "b": 40, "c": 10})
    training, held_out = inputs.split(items, 0.1, seed=5)
    assert Counter(item["category"] for item in held_out) == {"a": 10, "b": 4, "c": 1}
    assert sorted([*training, *held_out], key=lambda item: int(item["id"])) == items  # each once, order kept
    assert [int(item["id"]) for item in training] == sorted(int(item["id"]) for item in training)
    assert inputs.split(items, 0.1, seed=5) == (training, held_out)
    assert inputs.split(items, 0.1, seed=6)[1] != held_out


@pytest.mark.parametrize("seed", range(20))
def test_total_is_the_rounded_share_whatever_the_categories(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {name: rng.randint(2, 30) for name in "abcdefgh"[: rng.randint(1, 8)]}
    fraction = rng.choice([0.05, 0.1, 0.25, 0.5])
    held_out = inputs.split(many(rng, sizes), fraction, seed)[1]
    total = sum(sizes.values())
    assert len(held_out) == max(1, round(fraction * total))
    for name, size in sizes.items():
        given = sum(item["category"] == name for item in held_out)
        assert abs(given - fraction * size) < 1 or total * fraction < 1


def test_same_user_turns_stay_on_one_side() -> None:
    items = [conversation(index, "a", f"turn {index % 7}") for index in range(70)]
    training, held_out = inputs.split(items, 0.2, seed=1)
    sides = [{item["messages"][1]["content"] for item in side} for side in (training, held_out)]
    assert not sides[0] & sides[1] and len(held_out) == 20


@pytest.mark.parametrize("turns", [["x"], ["x", "x", "x"]])
def test_too_few_to_split(turns: list[str]) -> None:
    with pytest.raises(UserError, match="too few distinct"):
        inputs.split([conversation(index, "a", turn) for index, turn in enumerate(turns)], 0.5, seed=1)


def test_base_is_known_by_its_files_and_not_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name, weights in (("one", b"w"), ("two", b"w"), ("three", b"v")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(weights)
        monkeypatch.setattr(inputs, "base_folder", lambda recipe, folder=folder: folder)
        found.append(inputs.base_identity(load_recipe("annie_tiny", [f"base.model={folder}"])))
    assert found[0] == found[1] != found[2]


def test_template_and_tokenizer_identify_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "base_folder", lambda recipe: tmp_path)
    template = tmp_path / "own.jinja"
    template.write_text("a")
    (tmp_path / "tokenizer.json").write_text("{}")
    recipe = load_recipe("annie_tiny", [f"base.chat_template={template}"])
    seen = [inputs.tokenizer_identity(recipe)]
    template.write_text("b")
    seen.append(inputs.tokenizer_identity(recipe))
    (tmp_path / "tokenizer.json").write_text("[]")
    seen.append(inputs.tokenizer_identity(recipe))
    (tmp_path / "model.safetensors").write_bytes(b"x")  # weights are no part of it
    assert inputs.tokenizer_identity(recipe) == seen[2]
    assert seen[0] != seen[1] != seen[2]


def test_a_base_whose_modules_are_not_known_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2 can be fine-tuned; that no preset covers it must not be found out by the calibration afterwards."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    monkeypatch.setattr(inputs, "base_folder", lambda recipe: tmp_path)
    with pytest.raises(UserError, match="modules of this model type are not known"):
        inputs.require_presets(load_recipe("annie_qwen"))
    arms = ["arms=[{name: base, kind: base}, {name: bf16, kind: persona}]", "behavior.gate.candidate=bf16"]
    inputs.require_presets(load_recipe("annie_qwen", [*arms, "behavior.gate.reference=base"]))
