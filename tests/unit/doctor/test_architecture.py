"""The list of tensors that a configuration implies, against what Transformers writes and what is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qat.export.doctor.architecture import UnknownArchitectureError, expected_tensors

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
HYBRID = TINY | {
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
}
SPARSE = TINY | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", TINY),
    "llama with biases": ("llama", TINY | {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", TINY | {"tie_word_embeddings": True}),
    "mistral": ("mistral", TINY),
    "qwen2": ("qwen2", {key: value for key, value in TINY.items() if key != "head_dim"}),
    "qwen3": ("qwen3", TINY),
    "qwen3 with biases": ("qwen3", TINY | {"attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", SPARSE),
    "qwen3_moe, some dense": ("qwen3_moe", SPARSE | {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    "qwen3_moe, named dense": ("qwen3_moe", SPARSE | {"mlp_only_layers": [0]}),
    "nemotron_h": ("nemotron_h", HYBRID),
    "nemotron_h with biases": ("nemotron_h", HYBRID | {"use_bias": True, "mlp_bias": True, "use_conv_bias": False}),
    "nemotron_h with latent experts": ("nemotron_h", HYBRID | {"moe_latent_size": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_that_transformers_writes(case: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = CASES[case]
    config = AutoConfig.for_model(model_type, **fields)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    written = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert expected_tensors(json.loads((tmp_path / "config.json").read_text())) == written


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 31_577_940_288),  # 63.2 GB in BF16, as published
        ("Qwen--Qwen3-30B-A3B", 30_532_122_624),
        ("Qwen--Qwen3-8B", 8_190_735_360),
        ("meta-llama--Meta-Llama-3.1-8B", 8_030_261_248),
    ],
)
def test_published_models_have_their_published_size(real_data: Path, name: str, parameters: int) -> None:
    config = json.loads((real_data / "model_configs" / f"{name}_config.json").read_text())
    assert sum(torch.Size(shape).numel() for shape in expected_tensors(config).values()) == parameters


@pytest.mark.parametrize("value", [None, "8", -1, 2.0, True, 2**60, [8]])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"])
def test_impossible_sizes_are_unknown(key: str, value: object) -> None:
    with pytest.raises(UnknownArchitectureError):
        expected_tensors({"model_type": "llama", **TINY, key: value})


def test_endless_models_are_unknown() -> None:
    with pytest.raises(UnknownArchitectureError, match="more than"):
        expected_tensors({"model_type": "llama", **TINY, "num_hidden_layers": 2**39})
