"""The chain's promise: the weights inside the fake-quant forward are, byte for byte, the ones that are exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qat.export import export_checkpoint
from qat.quant.lora import merge_adapter_
from qat.quant.modelopt import calibrate, collect_state, insert_quantizers, quantizers
from tests.tiny_models import token_ids
from tests.unit.export.builders import EXPERTS, LINEARS, base_digest, load_model
from tests.unit.export.conftest import Persona

# The E2M1 values by code, sign bit last (OCP Microscaling Formats, table 5).
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def unpack(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    codes = stored[f"{name}.weight"]
    values = VALUES[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]
    steps = stored[f"{name}.weight_scale"].float() * stored[f"{name}.weight_scale_2"]
    return (values * steps.repeat_interleave(16, -1)).bfloat16()


def test_the_forward_multiplies_with_the_exported_weights(persona: Persona, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    sft = persona.adapters[0]
    merged = merge_adapter_(PeftModel.from_pretrained(load_model(persona.base), sft))
    config = LoraConfig(r=3, lora_alpha=8, target_modules=LINEARS, target_parameters=EXPERTS)
    student = get_peft_model(merged, config)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    inserted = insert_quantizers(student, "all", json.loads((persona.base / "config.json").read_text()))
    calibrate(student, lambda model: model(token_ids(8, 64)))
    student.save_pretrained(tmp_path / "distilled")
    state = collect_state(student, inserted, kv_cache="fp8", base_sha256=base_digest(persona.base))
    state.save(tmp_path / "quant_state.safetensors")
    export_checkpoint(
        persona.base,
        tmp_path / "out",
        adapters=[sft, tmp_path / "distilled"],
        quant_state=tmp_path / "quant_state.safetensors",
    )

    used: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: used.update({name: output.detach().clone()})

    for name, pair in quantizers(student).items():
        pair.weight.register_forward_hook(keep(name))
    with torch.no_grad():
        student(token_ids(2, 40, seed=5))

    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert used.keys() == set(inserted.quantized)
    for name, weight in used.items():
        if weight.dim() == 3:
            prefix, _, leaf = name.rpartition(".")
            exported = torch.stack([unpack(stored, f"{prefix}.{expert}.{leaf}") for expert in range(len(weight))])
        else:
            exported = unpack(stored, name)
        assert torch.equal(weight, exported), name
