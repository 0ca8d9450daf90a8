"""The benchmark's arithmetic and files; what it times needs a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.quant.packed import PackedWeight, packed_modules
from qat.quant.presets import Preset
from qat.train.bench.arms import EXPERTS, Arm, configuration, network, next_token_loss, packed_network, with_lora
from qat.train.bench.kernels import expert_layer
from qat.train.bench.run import Record, Shape, guarded, markdown
from qat.train.bench.timing import _GROUPS, summarize
from tests.tiny_models import nemotron_h_tiny, token_ids


def test_a_summary_by_hand() -> None:
    timing = summarize([1.0, 2.0, 3.0], tokens=100, peak_bytes=3 << 30, rest_bytes=1 << 30)
    # mean 2, deviation 1, t(0.975; 2 degrees) = 4.30265: 2 +- 4.30265 / sqrt(3)
    assert (timing.steps, timing.median, timing.mean) == (3, 2.0, 2.0)
    assert (timing.low, timing.high) == pytest.approx((-0.48414, 4.48414), abs=1e-5)
    assert (timing.tokens_per_second, timing.peak_gib, timing.above_rest_gib) == (50.0, 3.0, 2.0)


def test_shapes_are_read_from_the_command_line() -> None:
    assert Shape.parse("experts:4:2048:no:20") == Shape("experts", 4, 2048, False, 20)
    assert Shape.parse("attention:8:1024:yes:3").checkpointing


def test_a_configuration_is_cut_to_its_first_layers(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "nemotron_h", "hybrid_override_pattern": "ME*EM", "hidden_size": 64}))
    assert configuration(file, 3).layers_block_type == ["linear_attention", "moe", "full_attention"]
    assert configuration(file, None).num_hidden_layers == 5
    assert not configuration(file, None).use_cache


def test_a_failing_part_is_said_and_the_rest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.train.bench.run.environment", lambda: {"device": "none"})
    record = Record(tmp_path / "out.json", {"layers": 13})
    timing = summarize([0.25, 0.25], tokens=512, peak_bytes=1 << 30, rest_bytes=0)
    record.add("step", arm="qat", batch=2, length=256, checkpointing=False, **timing._asdict())

    def fails() -> None:
        raise ValueError("no room")

    record.attempt("the second", fails)
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert content["device"] == "none" and content["layers"] == 13
    assert content["measurements"][1] == {"kind": "failed", "what": "the second", "error": "ValueError: no room"}
    row = markdown([tmp_path / "out.json"]).splitlines()[2]
    assert row == "| qat | 2 x 256 | no | 2 | 0.2500 | 0.2500 to 0.2500 | 2,048 | 1.0 |"


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("_effective_kernel", "NVFP4 and effective weights"),
        ("void cutlass::device_kernel<GemmUniversal<GroupProblemShape<…>>>", "matrix products, grouped"),
        ("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT", "matrix products"),
        ("_chunk_scan_fwd_kernel", "Mamba scan"),
        ("void at::native::vectorized_gather_kernel<16, long>", "routing: gather, combine"),
    ],
)
def test_kernels_fall_into_their_groups(kernel: str, group: str) -> None:
    assert next(name for name, pattern in _GROUPS if re.search(pattern, kernel)) == group


def test_the_packed_network_is_drawn_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole network's own initialization is the oracle: names, shapes, dtypes, spread; at most a layer in BF16."""
    from qat.train.bench import arms

    config = nemotron_h_tiny().config
    alive: list[int] = []
    draw = arms._draw

    def counted(model: Any, part: torch.nn.Module) -> None:
        draw(model, part)
        held = (each for layer in model.model.layers for each in layer.parameters())
        alive.append(sum(each.numel() for each in held if not each.is_meta and not isinstance(each, PackedWeight)))

    monkeypatch.setattr(arms, "_draw", counted)
    found = dict(packed_network(config).named_parameters())
    expected = dict(network(config).named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name].shape, found[name].dtype) == (weight.shape, weight.dtype), name
        assert not found[name].is_meta and not found[name].requires_grad
        if weight.dim() > 1:
            torch.testing.assert_close(found[name].float().std(), weight.float().std(), rtol=0.2, atol=0, msg=name)
    packed = [name for name, weight in found.items() if isinstance(weight, PackedWeight)]
    assert len(packed) == len(packed_modules([], config.to_dict()))
    layers = [sum(each.numel() for name, each in expected.items() if f".layers.{n}." in name) for n in range(4)]
    assert max(alive) < max(layers) * 1.1 < sum(layers) * 0.6


def test_the_layer_of_experts_can_be_quantized() -> None:
    """Its four products, of routed and shared experts, have rows that NVFP4 can store."""
    formats = Preset("all").formats(expert_layer().to_dict())
    assert len([name for name in formats if "shared_experts" in name]) == 2 and len(formats) == 4


def test_the_guard_counts_what_a_step_reaches() -> None:
    """The tiny network has two layers of experts with two weights each, and two factors a weight."""
    model = with_lora(network(nemotron_h_tiny().config), [], EXPERTS)
    said = guarded(Arm("experts", "", model, next_token_loss(model)), token_ids().to(model.device))
    assert (said["parameters"], said["trained_parameters"], said["adapted_weights"]) == (8, 8, 4)
    assert said["quantizers"] == 0 and said["dead"] == {}
