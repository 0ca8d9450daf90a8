"""Shipped recipes against the published configurations of the bases that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat.quant.presets import Preset
from qat.recipe.load import load_recipe


def config_of(real_data: Path, model: str) -> dict[str, Any]:
    path = real_data / "model_configs" / f"{model.replace('/', '--')}_config.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} among the real files")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize(
    ("name", "model_type", "weights"),
    [
        # 36 layers of q, k, v, o, gate, up and down.
        ("annie_qwen", "qwen3", 36 * 7),
        # 52 layers: 23 Mamba (2 projections), 23 MoE (2 of the experts, 2 shared), 6 attention (4); the published list
        # leaves all attention and the 6 Mamba layers before it in BF16.
        ("annie_v4", "nemotron_h", (23 - 6) * 2 + 23 * 4),
    ],
)
def test_presets_fit_the_base_that_is_named(real_data: Path, name: str, model_type: str, weights: int) -> None:
    recipe = load_recipe(name)
    config = config_of(real_data, recipe.base.model)
    assert config["model_type"] == model_type
    for preset in recipe.presets:
        assert len(Preset(preset).quantized_modules(config)) == weights
    assert recipe.data.max_length <= recipe.serve.max_model_len <= config["max_position_embeddings"]
