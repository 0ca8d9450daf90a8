from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qat.errors import UserError
from qat.quant.presets import Preset
from qat.train.memory import GIB, Need, estimate, require_memory, what_fits
from qat.train.shapes import network_layers, network_weights

ALL = ("attention", "mamba", "routed_experts", "shared_experts")


@pytest.fixture(scope="module")
def nano() -> dict[str, Any]:
    """The published configuration of Nemotron-3-Nano-30B-A3B."""
    folder = os.environ.get("QAT_REAL_DATA")
    if not folder:
        pytest.skip("QAT_REAL_DATA names no folder of public files")
    path = Path(folder) / "model_configs" / "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _small(**changes: Any) -> dict[str, Any]:
    """A dense decoder whose sizes can be multiplied in the head."""
    config = {
        "model_type": "qwen3",
        "vocab_size": 1000,
        "hidden_size": 10,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 5,
    }
    return {**config, **changes}


def test_weights_by_hand() -> None:
    weights = network_weights(_small())
    layer = 10 * 10 + 2 * 5 * 10 + 10 * 10 + 3 * 10 * 20
    assert sum(weight.numbers for weight in weights) == 2 * 1000 * 10 + 2 * layer
    assert sum(weight.numbers for weight in network_weights(_small(tie_word_embeddings=True))) == 10_000 + 2 * layer
    assert sum(weight.factors(3) for weight in weights if weight.target == "attention") == 2 * 3 * (20 + 15 + 15 + 20)


@pytest.mark.parametrize("name", ["nemotron_h_tiny", "qwen3_tiny", "qwen3_moe_tiny"])
def test_weights_are_those_of_the_network(name: str) -> None:
    """The built network is the oracle: every matrix of it, and nothing else."""
    from tests import tiny_models

    model = getattr(tiny_models, name)()
    config = model.config.to_dict()
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    expected = sum(parameter.numel() for name, parameter in matrices.items() if "conv1d" not in name)
    assert sum(weight.numbers for weight in network_weights(config)) == expected
    names = {weight.name for weight in network_weights(config)}
    assert set(Preset("all").quantized_modules(config)) <= names
    assert len(list(network_layers(config))) == model.config.num_hidden_layers


def test_the_published_model_against_what_was_measured(nano: dict[str, Any]) -> None:
    """31.58 G parameters, 1,867,776 in factors on attention; peaks on one H200 with whole logits, without optimizer."""
    weights = network_weights(nano)
    assert sum(weight.numbers for weight in weights) == pytest.approx(31.58e9, rel=2e-4)
    assert sum(weight.factors(16) for weight in weights if weight.target == "attention") == 1_867_776
    for batch, length, checkpointing, measured in (
        (1, 2048, True, 63.5),
        (4, 2048, True, 77.2),
        (8, 2048, True, 95.4),
        (4, 4096, True, 95.4),
        (2, 2048, False, 90.9),
        (4, 2048, False, 122.7),
    ):
        need = Need(targets=("attention",), batch_size=batch, length=length, checkpointing=checkpointing)
        found = estimate(nano, need)
        # BF16 and float32 logits and the float32 gradient and probabilities of all positions.
        total = found._replace(trained=0, logits=batch * length * 131_072 * 14).total / GIB
        assert total == pytest.approx(measured, rel=0.05)


def test_a_packed_base_is_smaller_by_what_is_packed(nano: dict[str, Any]) -> None:
    packed = Preset("nvidia-nano").quantized_modules(nano)
    sizes = {weight.name: weight.numbers for weight in network_weights(nano)}
    plain, four = estimate(nano, Need()), estimate(nano, Need(memory="nvfp4", packed=packed))
    assert plain.weights - four.weights == pytest.approx(sum(sizes[name] for name in packed) * (2 - 0.5625))
    assert 17 < four.weights / GIB < 19
    assert estimate(nano, Need(packed=packed)).weights == plain.weights


def test_parts_by_hand() -> None:
    config = _small()
    need = Need(targets=("attention",), rank=2, batch_size=3, length=7, checkpointing=True)
    found = estimate(config, need)
    assert found.weights == 2 * (20_000 + 2 * 900)
    assert found.trained == 16 * 2 * 2 * 70
    assert found.saved == 2 * 10 * 2 * 21
    assert found.effective == 2 * (100 + 50 + 50 + 100) + 2 * 100  # one layer's, and the largest one's gradient
    assert found.logits == 21 * 1000 * 18
    everything = estimate(config, need._replace(trains="all"))
    assert everything.trained == 14 * (20_000 + 2 * 900) and everything.effective == 0
    assert estimate(config, need._replace(teacher=True)).logits > found.logits
    assert estimate(config, need._replace(checkpointing=False)).saved > found.saved
    quantized = estimate(config, need._replace(quantized=["model.layers.0.self_attn.q_proj"]))
    assert quantized.effective == found.effective + 2 * 100
    assert sum(found.to_json()[part] for part in found._fields) == pytest.approx(found.to_json()["total"], abs=0.05)


def test_too_little_memory_says_what_would_fit(nano: dict[str, Any]) -> None:
    packable = Preset("nvidia-nano").quantized_modules(nano)
    need = Need(targets=ALL, batch_size=8)
    with pytest.raises(UserError) as caught:
        require_memory(nano, need, 80 * GIB, packable, "train.sft")
    assert "80.0 GiB free" in str(caught.value.value) and "weights 58.82" in str(caught.value.value)
    assert "batch_size 1 with gradient_checkpointing" in caught.value.remedy
    assert "train.allow: [memory]" in caught.value.remedy
    assert what_fits(nano, need, 40 * GIB, packable)[0].startswith("memory: nvfp4")
    assert what_fits(nano, need, 10 * GIB, packable) == []
    with pytest.raises(UserError, match="does not fit") as caught:
        require_memory(nano, need, 10 * GIB, packable, "train.sft")
    assert "take another device" in caught.value.remedy
    with pytest.raises(UserError) as caught:
        require_memory(nano, Need(trains="all"), 141 * GIB, packable, "train.sft")
    assert "trains: adapter" in caught.value.remedy
    assert require_memory(nano, need._replace(batch_size=1, checkpointing=True), 80 * GIB, (), "").total < 80 * GIB


def test_a_model_that_is_not_known() -> None:
    with pytest.raises(UserError, match="cannot be estimated"):
        estimate(_small(model_type="gpt2"), Need())
    with pytest.raises(UserError, match="lacks a whole number"):
        estimate(_small(hidden_size=None), Need())
