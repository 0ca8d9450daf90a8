"""Groups and their sizes, by hand and against an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qat.calibration.groups import fixed_bytes, kinds_of_groups, servable_groups
from qat.export import export_checkpoint
from qat.quant.presets import Preset, compose
from qat.quant.state import ModuleState, QuantState
from tests.tiny_models import nemotron_h_tiny, qwen3_moe_tiny
from tests.unit.export.builders import base_digest, make_base


def test_groups_by_hand() -> None:
    config = nemotron_h_tiny().config.to_dict()
    assert [group.name for group in servable_groups(config)] == [
        "0.mamba.in_proj", "0.mamba.out_proj", "1.experts", "1.shared_experts", "2.attention", "3.experts",
        "3.shared_experts",
    ]  # fmt: skip
    assert [group.name for group in kinds_of_groups(config)] == [
        "mamba.in_proj", "mamba.out_proj", "experts.up_proj", "experts.down_proj", "shared_experts.up_proj",
        "shared_experts.down_proj", "attention",
    ]  # fmt: skip
    experts = servable_groups(config)[2]
    assert experts.parameters == 2 * 8 * 64 * 48
    assert experts.bytes("bf16") == 2 * experts.parameters
    assert experts.bytes("nvfp4") == experts.parameters * 9 // 16 + 16 * 8
    assert experts.bytes("w4a16") == experts.parameters * 9 // 16 + 16 * 4
    attention = servable_groups(config)[4]
    assert attention.bytes("fp8") == attention.parameters + 4 * 8


@pytest.mark.parametrize("build", [nemotron_h_tiny, qwen3_moe_tiny])
@pytest.mark.parametrize("kinds", [("nvfp4", "nvfp4"), ("w4a16", "fp8")])
def test_sizes_are_those_of_an_export(build: object, kinds: tuple[str, str], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", build())  # type: ignore[operator]
    config = json.loads((base / "config.json").read_text())
    first, second = kinds
    preset = compose("mine", "all", {first: ["*.experts.*"], second: ["*.q_proj", "*.k_proj", "*.v_proj"]}, config)
    chosen = preset.formats(config)
    experts = {name for name in chosen if ".experts." in name}
    count = 8 if build is nemotron_h_tiny else 4
    modules = {
        name: ModuleState(
            torch.full((count,), 9.0) if name in experts else torch.tensor(9.0),
            None if kind == "w4a16" else torch.tensor(3.0),
            kind,
        )
        for name, kind in chosen.items()
    }
    QuantState(modules, "mine", "bf16", [], [], base_digest(base)).save(tmp_path / "state")
    report = export_checkpoint(base, tmp_path / "out", quant_state=tmp_path / "state")
    groups = kinds_of_groups(config)
    expected = fixed_bytes(base, groups)
    for group in groups:
        for module, weight in zip(group.modules, group.weights, strict=True):
            expected += group._replace(modules=[module], weights=[weight]).bytes(chosen.get(module, "bf16"))
    assert report.bytes == expected


def test_what_is_fixed(tmp_path: Path) -> None:
    """Embeddings, output, norms, convolutions, routers: everything that no preset touches."""
    from safetensors.torch import load_file

    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    modules = tuple(f"{name.partition('.experts.')[0]}." for name in Preset("all").quantized_modules(config))
    rest = 0
    for name, tensor in load_file(base / "model.safetensors").items():
        touched = name.startswith(modules) and (".experts." in name or f"{name.removesuffix('.weight')}." in modules)
        rest += 0 if touched else tensor.numel() * tensor.element_size()
    assert fixed_bytes(base, servable_groups(config)) == rest
