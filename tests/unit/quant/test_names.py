"""Names in memory and on disk, against what Transformers itself writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qat.errors import UserError
from qat.quant.names import checkpoint_name, expert_tensors, is_fused_experts, memory_name, sharing_groups, unwrapped
from tests.tiny_models import nemotron_h_tiny, qwen3_moe_tiny, qwen3_tiny, save_tiny


@pytest.mark.parametrize("build", [nemotron_h_tiny, qwen3_tiny, qwen3_moe_tiny])
def test_every_parameter_has_the_name_and_content_that_transformers_saves(build: object, tmp_path: Path) -> None:
    model = build()  # type: ignore[operator]
    save_tiny(tmp_path, model)
    model_type = model.config.model_type
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        on_disk = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if "rotary" in name or "inv_freq" in name:
            continue
        saved = checkpoint_name(name, model_type)
        assert memory_name(saved, model_type) == name
        if not is_fused_experts(saved):
            assert torch.equal(on_disk.pop(saved), parameter)
            continue
        for tensor in expert_tensors(saved, len(parameter)):
            rows = parameter[tensor.expert]
            if tensor.half is not None:
                rows = rows.chunk(2)[tensor.half]
            assert torch.equal(on_disk.pop(tensor.name), rows)
    assert not on_disk


def test_wrapped_names() -> None:
    assert unwrapped("base_model.model.model.layers.0.mixer.in_proj.base_layer") == "model.layers.0.mixer.in_proj"
    wrapped = "base_model.model.model.layers.1.mixer.experts.base_layer.base_layer.up_proj"
    assert checkpoint_name(wrapped, "nemotron_h") == "backbone.layers.1.mixer.experts.up_proj"
    assert checkpoint_name("lm_head", "nemotron_h") == "lm_head"


def test_groups() -> None:
    names = [f"m.0.attn.{leaf}" for leaf in ("o_proj", "v_proj", "q_proj", "k_proj")]
    names += ["m.0.mlp.up_proj", "m.0.mlp.down_proj", "m.1.mlp.up_proj", "m.1.mlp.gate_proj"]
    assert sharing_groups(names) == [
        ["m.0.attn.q_proj", "m.0.attn.k_proj", "m.0.attn.v_proj"],
        ["m.1.mlp.gate_proj", "m.1.mlp.up_proj"],
    ]


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="model type"):
        checkpoint_name("model.layers.0", "gpt2")
    with pytest.raises(ValueError, match="no fused expert"):
        expert_tensors("backbone.layers.0.mixer.in_proj", 2)
