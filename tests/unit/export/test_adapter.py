"""Adapters from their files, against the factors that PEFT itself loads from the same files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.errors import UserError
from qat.export.adapter import Adapter, read_adapter
from qat.export.merge import find_modules
from qat.export.shards import read_entries
from tests.unit.export.builders import load_model, make_adapter, make_base
from tests.unit.export.conftest import Persona


def read(base: Path, adapter: Path) -> Adapter:
    return read_adapter(adapter, find_modules(read_entries(base), base), "nemotron_h")


def peft_factors(base: Path, adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """b, a and scale of every adapted weight, from a model that PEFT has loaded the adapter into."""
    from peft import PeftModel
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    model = PeftModel.from_pretrained(load_model(base, torch.float32), adapter)
    found = {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            name = path.replace(".base_layer", "").replace("model.", "backbone.", 1)
            if isinstance(layer, ParamWrapper):
                found[f"{name}.{layer.parameter_name}"] = layer.get_delta_factors("default")
            else:
                factors = (layer.lora_B["default"].weight, layer.lora_A["default"].weight, layer.scaling["default"])
                found[name] = factors
    return found


def require_equal(base: Path, adapter: Path) -> None:
    expected, found = peft_factors(base, adapter), read(base, adapter).factors
    assert found.keys() == expected.keys()
    for name, (b, a, scale) in expected.items():
        delta = found[name].load()
        assert torch.equal(delta.a, a), name
        assert torch.equal(delta.b, b), name
        assert delta.scale == scale, name


def test_factors_are_pefts(persona: Persona) -> None:
    require_equal(persona.base, persona.adapters[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "lora_alpha": 5, "use_rslora": True},
        {
            "rank_pattern": {"in_proj": 2, r"layers\.2\.mixer\..*": 5},
            "alpha_pattern": {"q_proj": 1, "experts.up_proj": 9},
        },
        {"rank_pattern": {"experts.down_proj": 6}, "experts": ["mixer.experts.down_proj"]},
        {"linears": [], "experts": ["mixer.experts.up_proj"]},
        {"linears": ["o_proj"], "experts": []},
    ],
)
def test_ranks_scales_and_partial_targets(persona: Persona, tmp_path: Path, settings: dict[str, Any]) -> None:
    require_equal(persona.base, make_adapter(persona.base, tmp_path / "adapter", seed=5, **settings))


def test_square_experts_are_told_apart_by_depth_alone(tmp_path: Path) -> None:
    """With hidden == intermediate both projections have equal shapes, so nothing but PEFT's nesting names them."""
    from transformers import AutoModelForCausalLM

    from tests.tiny_models import nemotron_h_tiny

    config = nemotron_h_tiny().config
    config.moe_intermediate_size = config.hidden_size
    base = make_base(tmp_path / "base", AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    require_equal(base, make_adapter(base, tmp_path / "adapter", seed=6))


def broken(persona: Persona, folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    """A copy of the first adapter after `change` to its weights and its configuration."""
    shutil.copytree(persona.adapters[0], folder)
    weights = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(weights, config)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


IN_PROJ = "base_model.model.model.layers.0.mixer.in_proj"
EXPERTS = "base_model.model.model.layers.1.mixer.experts"


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    def change(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        for side in "AB":
            weights[f"{new}.lora_{side}.weight"] = weights.pop(f"{old}.lora_{side}.weight")

    return change


def extra(key: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    return lambda weights, config: weights.update({key: torch.ones(1)})


def setting(**values: Any) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    return lambda weights, config: config.update(values)


def without(key: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    def change(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        del weights[key]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename(IN_PROJ, IN_PROJ.replace("layers.0", "layers.9")), "no such module"),
        (rename(IN_PROJ, IN_PROJ + ".base_layer"), "level of nested factors is missing"),
        (extra(IN_PROJ + ".lora_magnitude_vector.weight"), "no LoRA factor"),
        (extra("base_model.model.lm_head.weight"), "no LoRA factor"),
        (without(IN_PROJ + ".lora_A.weight"), "alone"),
        (rename(EXPERTS + ".base_layer", EXPERTS + ".base_layer.base_layer"), "level of nested factors is missing"),
        (setting(target_parameters=["mixer.experts.up_proj"]), "levels of factors"),
        (setting(target_parameters=None), "levels of factors"),
        (lambda w, c: w.update({IN_PROJ + ".lora_A.weight": torch.ones(4, 63)}), "does not fit the base"),
        (lambda w, c: w.update({IN_PROJ + ".lora_B.weight": torch.ones(323, 4)}), "does not fit the base"),
        (lambda w, c: w.update({EXPERTS + ".lora_A.weight": torch.ones(33, 48)}), "does not fit the base"),
        (setting(r=5), "rank is not"),
        (setting(lora_alpha="7"), "lora_alpha"),
        (setting(peft_type="LOHA"), "peft_type"),
        (setting(use_dora=True), "use_dora"),
        (setting(bias="lora_only"), "bias"),
        (setting(modules_to_save=["lm_head"]), "modules_to_save"),
        (setting(init_lora_weights="pissa"), "init_lora_weights"),
        (lambda w, c: w.clear(), "no LoRA factors"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    persona: Persona, tmp_path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read(persona.base, broken(persona, tmp_path / "adapter", change))


def test_missing_and_damaged_files(persona: Persona, tmp_path: Path) -> None:
    folder = broken(persona, tmp_path / "adapter", lambda w, c: None)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="truncated"):
        read(persona.base, folder)
    weights.unlink()
    with pytest.raises(UserError, match="missing"):
        read(persona.base, folder)
    weights.write_bytes(whole)
    (folder / "qat_adapter.json").write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        read(persona.base, folder)
    (folder / "qat_adapter.json").unlink()
    assert read(persona.base, folder).base_sha256 is None
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read(persona.base, folder)
