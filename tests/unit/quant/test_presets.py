"""Presets against NVIDIA's published list, against ModelOpt's own configurations and against the models' modules."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from qat.errors import UserError
from qat.quant.linears import layer_kinds, linears
from qat.quant.presets import FORMATS, PRESETS, Preset, compose, preset_of
from qat.recipe.schema import PresetBlock, Shipped
from tests.tiny_models import nemotron_h_tiny, qwen3_moe_tiny, qwen3_tiny


def tiny_config() -> dict[str, Any]:
    config: dict[str, Any] = nemotron_h_tiny().config.to_dict()
    return config


def published(real_data: Path, name: str) -> dict[str, Any]:
    file = real_data / "model_configs" / name
    if not file.is_file():
        pytest.skip(f"no {file}")
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


def test_nvidia_nano_is_the_published_list(real_data: Path) -> None:
    config = published(real_data, "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16_config.json")
    quantized = published(real_data, "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4_hf_quant_config.json")
    assert Preset("nvidia-nano").excludes(config) == quantized["quantization"]["exclude_modules"]
    modules = Preset("nvidia-nano").quantized_modules(config)
    # 52 layers: 23 Mamba of which 6 precede attention, 23 MoE with four modules each, 6 attention
    assert len(modules) == (23 - 6) * 2 + 23 * 4
    assert not set(modules) & set(Preset("nvidia-nano").excludes(config))


def test_nvidia_nano_by_hand() -> None:
    # Mamba, Mamba, attention, MLP, Mamba: only the second Mamba layer stands right before attention.
    config = {key: value for key, value in tiny_config().items() if key != "layers_block_type"}
    config["hybrid_override_pattern"] = "MM*-M"
    kept = [f"backbone.layers.1.mixer.{leaf}" for leaf in ("in_proj", "out_proj")]
    kept += [f"backbone.layers.2.mixer.{leaf}_proj" for leaf in "qkvo"]
    convolutions = [f"backbone.layers.{layer}.mixer.conv1d" for layer in (0, 1, 4)]
    assert Preset("nvidia-nano").excludes(config) == ["lm_head", *kept, *convolutions]
    assert Preset("nvidia-nano").quantized_modules({**config, "intermediate_size": 96}) == [
        "backbone.layers.0.mixer.in_proj",
        "backbone.layers.0.mixer.out_proj",
        "backbone.layers.3.mixer.up_proj",
        "backbone.layers.3.mixer.down_proj",
        "backbone.layers.4.mixer.in_proj",
        "backbone.layers.4.mixer.out_proj",
    ]


def test_a_pattern_and_a_list_of_kinds_are_the_same(real_data: Path) -> None:
    config = published(real_data, "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16_config.json")
    words = {"M": "linear_attention", "E": "moe", "*": "full_attention"}
    other = {key: value for key, value in config.items() if key != "hybrid_override_pattern"}
    other["layers_block_type"] = [words[letter] for letter in config["hybrid_override_pattern"]]
    assert layer_kinds(config) == layer_kinds(other)
    for name in PRESETS:
        assert Preset(name).formats(config) == Preset(name).formats(other)
        assert Preset(name).excludes(config) == Preset(name).excludes(other)


@pytest.mark.parametrize("build", [nemotron_h_tiny, qwen3_tiny, qwen3_moe_tiny])
def test_all_is_every_linear_and_expert_of_the_model(build: object) -> None:
    from torch import nn

    from qat.quant.names import checkpoint_name

    model = build()  # type: ignore[operator]
    expected = {
        checkpoint_name(name, model.config.model_type) for name, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    expected |= {
        checkpoint_name(name, model.config.model_type)
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "experts" in name
    }
    assert set(Preset("all").quantized_modules(model.config.to_dict())) == expected - {"lm_head"}


@pytest.mark.parametrize(("preset", "theirs"), [("conservative", "CONSERVATIVE"), ("aggressive", "AGGRESSIVE")])
def test_modelopts_presets(preset: str, theirs: str) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    from qat.quant.names import checkpoint_name

    if NemotronHExperts in QuantModuleRegistry:  # ours, left by another test: let ModelOpt register its own
        QuantModuleRegistry.unregister(NemotronHExperts)
    model = nemotron_h_tiny()
    config = model.config.to_dict()
    quant_cfg = copy.deepcopy(getattr(mtq, f"MAMBA_MOE_NVFP4_{theirs}_CFG"))
    mtq.quantize(model, {**quant_cfg, "algorithm": None})
    QuantModuleRegistry.unregister(NemotronHExperts)
    enabled = set()
    for name, module in model.named_modules():
        if "weight_quantizer" in name and getattr(module, "is_enabled", False):
            name = name.split("_weight_quantizers.")[0].removesuffix(".weight_quantizer")
            enabled.add(checkpoint_name(name, "nemotron_h"))
    assert set(Preset(preset).quantized_modules(config)) == enabled


def test_latent_projections_and_prediction_heads(real_data: Path) -> None:
    config = published(real_data, "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4_config.json")
    everything = Preset("all").quantized_modules(config)
    assert "backbone.layers.1.mixer.fc1_latent_proj" in everything
    assert "mtp*" in Preset("all").excludes(config)
    assert "backbone.layers.1.mixer.fc2_latent_proj" in Preset("aggressive").excludes(config)


def test_routers_of_qwen_are_named() -> None:
    excludes = Preset("all").excludes(qwen3_moe_tiny().config.to_dict())
    assert excludes == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


def test_faults() -> None:
    config = tiny_config()
    with pytest.raises(UserError, match="no such precision preset"):
        Preset("nano")
    for preset in ("nvidia-nano", "conservative", "aggressive", "lightning"):
        with pytest.raises(UserError, match="does not fit this model"):
            Preset(preset).quantized_modules(qwen3_tiny().config.to_dict())
    with pytest.raises(UserError, match="model type"):
        Preset("all").quantized_modules({"model_type": "gpt2"})
    with pytest.raises(UserError, match="multiple of 16"):
        Preset("all").quantized_modules({**config, "moe_intermediate_size": 40})
    for kinds in (["moe", "magic"], ["moe", None], ["moe", ["moe"]], []):
        with pytest.raises(UserError, match="kinds of the layers"):
            Preset("all").quantized_modules({**config, "layers_block_type": kinds})
    with pytest.raises(UserError, match="whole number"):
        Preset("all").quantized_modules({key: value for key, value in config.items() if key != "hidden_size"})


def test_recipes_know_the_same_presets() -> None:
    from typing import get_args

    from qat.recipe import checks

    assert set(checks.PRESETS) == set(PRESETS) == set(get_args(Shipped))
    assert set(PresetBlock.model_fields) == {"like", "bf16", *FORMATS}


def test_lightning_is_the_published_mix(real_data: Path) -> None:
    """Module by module; the published lm_head is the one that stays in BF16 here."""
    name = "nvidia--NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4"
    config = published(real_data, f"{name}_config.json")
    quantized = published(real_data, f"{name}_hf_quant_config.json")["quantization"]
    words = {"W4A16_NVFP4": "w4a16", "FP8": "fp8"}
    expected = {}
    for module, entry in quantized["quantized_layers"].items():
        expected[re.sub(r"\.experts\.\d+\.", ".experts.", module)] = words[entry["quant_algo"]]
    del expected["lm_head"]
    found = Preset("lightning").formats(config)
    assert found == expected
    assert not set(quantized["exclude_modules"]) & set(found)


def test_an_own_preset() -> None:
    config = tiny_config()
    mixer = "backbone.layers.{}.mixer"
    changes = {
        "bf16": [f"{mixer.format(1)}.*"],
        "fp8": [f"{mixer.format(0)}.in_proj", f"{mixer.format(2)}.?_proj"],
        "w4a16": [f"{mixer.format(3)}.experts.*"],
    }
    preset = compose("mine", "all", changes, config)
    found = preset.formats(config)
    expected = {
        f"{mixer.format(0)}.in_proj": "fp8",
        f"{mixer.format(0)}.out_proj": "nvfp4",
        **{f"{mixer.format(2)}.{leaf}_proj": "fp8" for leaf in "qkvo"},
        f"{mixer.format(3)}.experts.up_proj": "w4a16",
        f"{mixer.format(3)}.experts.down_proj": "w4a16",
        f"{mixer.format(3)}.shared_experts.up_proj": "nvfp4",
        f"{mixer.format(3)}.shared_experts.down_proj": "nvfp4",
    }
    assert found == expected and list(found) == [linear.name for linear in linears(config) if linear.name in expected]
    kept = {f"{mixer.format(1)}.{leaf}" for leaf in ("experts.up_proj", "shared_experts.down_proj")}
    assert kept < set(preset.excludes(config))
    block = PresetBlock.model_validate({"like": "all", **changes})
    assert preset_of("mine", {"mine": block}, config) == preset
    assert preset_of("all", {"mine": block}, config) == Preset("all")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"bf16": ["backbone.layers.9.*"]}, "matches no module"),
        ({"bf16": ["*.q_proj"]}, "computes as one"),
        ({"w4a16": ["*.experts.up_proj"]}, "computes as one"),
        ({"fp8": ["*.experts.*"]}, "cannot be FP8"),
        ({"fp8": ["*.in_proj"], "bf16": ["*.in_*"]}, "claim one module"),
        ({"bf16": ["*"]}, "matches no module of this model"),
    ],
)
def test_own_presets_that_cannot_be(changes: dict[str, list[str]], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        compose("mine", "all", changes, tiny_config())


def test_own_presets_of_another_model() -> None:
    with pytest.raises(UserError, match="does not have"):
        Preset("mine", {"backbone.layers.7.mixer.in_proj": "fp8"}).formats(tiny_config())
    with pytest.raises(UserError, match="Unknown format"):
        Preset("mine", {"backbone.layers.0.mixer.in_proj": "int4"}).formats(tiny_config())
    with pytest.raises(UserError, match="name of a shipped one"):
        Preset("all", {})


def test_eight_bits_need_no_blocks() -> None:
    """A row of 40 divides into no blocks of 16, which E4M3 does not have."""
    config = {**tiny_config(), "moe_shared_expert_intermediate_size": 40}
    with pytest.raises(UserError, match="multiple of 16"):
        Preset("all").formats(config)
    name = "backbone.layers.1.mixer.shared_experts.down_proj"
    assert Preset("mine", {name: "fp8"}).formats(config) == {name: "fp8"}
