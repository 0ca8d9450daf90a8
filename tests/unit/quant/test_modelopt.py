"""Quantizers in the forward, against forwards written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import UserError
from qat.quant.modelopt import (
    Inserted,
    calibrate,
    collect_state,
    insert_quantizers,
    load_state_into,
    quantizers,
    quantizers_off,
    share_amax,
)
from qat.quant.names import sharing_groups
from qat.quant.nvfp4 import fake_quant_activation, fake_quant_weight
from qat.quant.presets import Preset
from qat.quant.state import ModuleState, QuantState
from tests.tiny_models import nemotron_h_tiny, qwen3_moe_tiny, qwen3_tiny, token_ids

BUILDERS = [nemotron_h_tiny, qwen3_tiny, qwen3_moe_tiny]


def forward(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def quantized(model: Any, preset: str = "all") -> Inserted:
    inserted = insert_quantizers(model, preset, model.config.to_dict())
    calibrate(model, lambda network: network(input_ids=token_ids()))
    return inserted


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_off_is_the_unquantized_model_bit_for_bit(build: Any, experts: str) -> None:
    plain, model = build(), build()
    for each in (plain, model):
        each.config._experts_implementation = experts
    quantized(model)
    assert model.config._experts_implementation == experts
    ids = token_ids(seed=5)
    on = forward(model, ids)
    with quantizers_off(model):
        off = forward(model, ids)
    assert torch.equal(off, forward(plain, ids))
    assert not torch.equal(on, off)
    assert torch.equal(forward(model, ids), on)


@pytest.mark.parametrize(
    ("build", "preset"),
    [(build, "all") for build in BUILDERS]
    + [(nemotron_h_tiny, preset) for preset in ("nvidia-nano", "conservative", "aggressive", "lightning")],
)
def test_exactly_the_presets_modules_are_quantized(build: Any, preset: str) -> None:
    model = build()
    config = model.config.to_dict()
    inserted = quantized(model, preset)
    assert inserted.quantized == Preset(preset).quantized_modules(config) == list(quantizers(model))
    everything = set(Preset("all").quantized_modules(config)) | {"lm_head"}
    assert set(inserted.skipped) == everything - set(inserted.quantized)
    enabled = [name for name, m in model.named_modules() if "quantizer" in name and getattr(m, "is_enabled", False)]
    weight_only = Preset(preset).formats(config).values()
    assert len(enabled) == 2 * len(inserted.quantized) - list(weight_only).count("w4a16")


def test_a_linear_by_hand() -> None:
    model = nemotron_h_tiny()
    quantized(model)
    layer = model.model.layers[0].mixer.in_proj
    pair = quantizers(model)["backbone.layers.0.mixer.in_proj"]
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        y = layer(x)
    w = model.state_dict()["model.layers.0.mixer.in_proj.weight"]
    assert pair.weight._amax == w.abs().max().float()
    expected = F.linear(fake_quant_activation(x, pair.input._amax), fake_quant_weight(w, w.abs().max().float()))
    assert torch.equal(y, expected)


def test_formats_by_hand() -> None:
    """FP8 and W4A16 linears from their definitions; attention stays as it was."""
    model, plain = nemotron_h_tiny(), nemotron_h_tiny()
    quantized(model, "lightning")
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    names = ("0.mixer.in_proj", "1.mixer.shared_experts.up_proj", "2.mixer.q_proj")
    with torch.no_grad():
        eight, four, none = (model.get_submodule(f"model.layers.{name}")(x) for name in names)
    w = [plain.get_submodule(f"model.layers.{name}").weight.detach() for name in names]
    pair = quantizers(model)["backbone.layers.0.mixer.in_proj"]
    scale, entry = w[0].abs().max().float() / 448, pair.input._amax / 448
    codes = (w[0] / scale).to(torch.float8_e4m3fn)
    rows = (x.float() * (1 / entry)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(eight, F.linear((rows.float() * entry).bfloat16(), (codes.float() * scale).bfloat16()))
    assert torch.equal(four, F.linear(x, fake_quant_weight(w[1], w[1].abs().max().float())))
    assert torch.equal(none, F.linear(x, w[2]))


def test_weight_only_experts_leave_activations_alone() -> None:
    """The same experts as Transformers' own with the rounded weights."""
    model, plain = nemotron_h_tiny(), nemotron_h_tiny()
    quantized(model, "lightning")
    ours, theirs = (each.get_submodule("model.layers.1.mixer.experts") for each in (model, plain))
    for name in ours.projection_names:
        w = theirs.get_parameter(name)
        w.data = fake_quant_weight(w.data, w.data.abs().amax(dim=(1, 2)).float())
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(30, 64, generator=generator).bfloat16()
    routes = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(30)])
    gates = torch.rand(30, 2, generator=generator)
    with torch.no_grad():
        y, expected = ours(x, routes, gates), theirs(x, routes, gates)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02 * float(expected.abs().mean()))
    assert not quantizers(model)["backbone.layers.1.mixer.experts.up_proj"].input.is_enabled


def slow_experts(
    module: Any, state: dict[str, Tensor], ranges: dict[str, Any], x: Tensor, routes: Tensor, gates: Tensor
) -> Tensor:
    """Token by token, expert by expert, in float32 from the quantized weights and activations."""
    first, second = module.projection_names
    weights = {}
    for name in (first, second):
        w = state[name]
        rows = [fake_quant_weight(w[e], w[e].abs().max().float()).float() for e in range(len(w))]
        weights[name] = rows
    out = torch.zeros(x.shape, dtype=torch.float32)
    for token in range(len(x)):
        row = fake_quant_activation(x[token], ranges[first].input._amax)
        for slot in range(routes.shape[1]):
            expert = int(routes[token, slot])
            inner = (weights[first][expert] @ row.float()).bfloat16()
            if first == "gate_up_proj":
                gate, up = inner.chunk(2)
                inner = F.silu(gate) * up
            else:
                inner = F.relu(inner).square()
            inner = fake_quant_activation(inner, ranges[second].input._amax)
            outer = (weights[second][expert] @ inner.float()).bfloat16()
            out[token] += outer.float() * gates[token, slot].float()
    return out


@pytest.mark.parametrize(
    ("build", "layer", "prefix"),
    [
        (nemotron_h_tiny, "model.layers.1.mixer.experts", "backbone.layers.1.mixer.experts"),
        (qwen3_moe_tiny, "model.layers.1.mlp.experts", "model.layers.1.mlp.experts"),
    ],
)
def test_experts_token_by_token(build: Any, layer: str, prefix: str) -> None:
    model = build()
    quantized(model)
    module = model.get_submodule(layer)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(30, 64, generator=generator).bfloat16()
    routes = torch.stack([torch.randperm(module.num_experts, generator=generator)[:2] for _ in range(30)])
    routes[routes == 1] = 3  # one expert without any token
    routes[:, 1] = torch.where(routes[:, 0] == routes[:, 1], 0, routes[:, 1])
    gates = torch.rand(30, 2, generator=generator)
    with torch.no_grad():
        y = module(x, routes, gates)
    state = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
    ranges = {name: quantizers(model)[f"{prefix}.{name}"] for name in module.projection_names}
    for name in ranges:
        assert torch.equal(ranges[name].weight._amax, state[name].abs().amax((1, 2)).float())
    expected = slow_experts(module, state, ranges, x, routes, gates)
    # BF16 products may round differently in another order of summation, and a value at a tie of the second
    # quantization then moves by a step; everything else agrees to BF16's precision.
    difference = (y.float() - expected).abs() / expected.abs().mean()
    assert difference.median() < 4e-3
    assert (difference < 0.02).float().mean() > 0.95


def test_input_ranges_are_those_of_the_data() -> None:
    model, plain = nemotron_h_tiny(), nemotron_h_tiny()
    inserted = insert_quantizers(model, "all", model.config.to_dict())
    seen: dict[str, float] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = max(seen.get(name, 0.0), float(inputs[0].abs().max()))

        return hook

    for name in inserted.quantized:
        # What enters the experts' first projection is what enters the module; the second's input is inside it.
        path = name.replace("backbone", "model").replace(".experts.up_proj", ".experts")
        if ".experts.down_proj" not in name:
            plain.get_submodule(path).register_forward_pre_hook(record(name))
    batches = [token_ids(seed=1), token_ids(seed=2)]

    def read(network: nn.Module) -> None:
        for ids in batches:
            network(input_ids=ids)

    calibrate(model, read)
    for ids in batches:
        forward(plain, ids)
    groups = sharing_groups(seen)
    assert len(seen) == 12 and len(groups) == 1
    for name, largest in seen.items():
        assert float(quantizers(model)[name].input._amax) == largest, name


def test_ranges_are_shared_where_a_server_fuses() -> None:
    model = qwen3_tiny()
    insert_quantizers(model, "all", model.config.to_dict())
    groups = calibrate(model, lambda network: network(input_ids=token_ids()))
    assert [len(group) for group in groups] == [3, 2] * 2
    for group in groups:
        weights = [model.get_submodule(name).weight.detach() for name in group]
        largest = max(float(w.abs().max()) for w in weights)
        assert {float(quantizers(model)[name].weight._amax) for name in group} == {largest}
        assert len({float(quantizers(model)[name].input._amax) for name in group}) == 1
    assert share_amax(model) == groups
    # Members do not share storage: each is its own buffer.
    quantizers(model)[groups[0][0]].weight._amax.fill_(9.0)
    assert quantizers(model)[groups[0][1]].weight._amax != 9.0


def test_gradients_pass_straight_through() -> None:
    model = qwen3_tiny(dtype=torch.float32)
    quantized(model)
    layer = model.model.layers[0].mlp.up_proj
    pair = quantizers(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(5, 64, requires_grad=True)
    layer(x).backward(g := torch.randn(5, 96))
    assert x.grad is not None
    w = fake_quant_weight(layer.weight.detach(), pair.weight._amax)
    torch.testing.assert_close(x.grad, g @ w)
    torch.testing.assert_close(layer.weight.grad, g.T @ fake_quant_activation(x.detach(), pair.input._amax))


def test_a_state_of_several_formats_restores_the_forward(tmp_path: Path) -> None:
    model = nemotron_h_tiny()
    inserted = quantized(model, "lightning")
    collect_state(model, inserted, kv_cache="bf16", base_sha256="0").save(tmp_path / "state")
    state = QuantState.load(tmp_path / "state")
    assert {module.format for module in state.modules.values()} == {"fp8", "w4a16"}
    other = nemotron_h_tiny()
    insert_quantizers(other, state.precision(), other.config.to_dict())
    load_state_into(other, state)
    ids = token_ids(seed=6)
    assert torch.equal(forward(other, ids), forward(model, ids))
    changed = nemotron_h_tiny()
    names = {name: "nvfp4" for name in state.modules}
    insert_quantizers(changed, Preset("mine", names), changed.config.to_dict())
    with pytest.raises(UserError, match="another format than the preset"):
        load_state_into(changed, state)


@pytest.mark.parametrize("build", BUILDERS)
def test_state_restores_the_forward(build: Any) -> None:
    model = build()
    inserted = quantized(model)
    state = collect_state(model, inserted, kv_cache="fp8", base_sha256="0" * 64, adapter="adapter")
    assert state.preset == "all" and state.kv_cache == "fp8" and state.adapter == "adapter"
    assert state.excluded == inserted.excluded
    other = build()
    insert_quantizers(other, "all", other.config.to_dict())
    load_state_into(other, state)
    ids = token_ids(seed=6)
    assert torch.equal(forward(other, ids), forward(model, ids))


def test_ranges_do_not_leak_into_the_state_dict() -> None:
    model = nemotron_h_tiny()
    quantized(model)
    assert set(model.state_dict()) == set(nemotron_h_tiny().state_dict())


def test_calibrating_again_starts_afresh() -> None:
    model = nemotron_h_tiny()
    inserted = quantized(model)
    first = collect_state(model, inserted, kv_cache="bf16", base_sha256="0")
    calibrate(model, lambda network: network(input_ids=token_ids(length=8, seed=9)))
    calibrate(model, lambda network: network(input_ids=token_ids()))
    again = collect_state(model, inserted, kv_cache="bf16", base_sha256="0")
    for name, ranges in first.modules.items():
        assert torch.equal(ranges.input_amax, again.modules[name].input_amax)
        assert torch.equal(ranges.weight_amax, again.modules[name].weight_amax)


def test_faults() -> None:
    model = nemotron_h_tiny()
    config = model.config.to_dict()
    with pytest.raises(TypeError, match="no quantizers"):
        quantizers(model)
    with pytest.raises(UserError, match="does not have") as fault:
        insert_quantizers(model, "all", {**config, "layers_block_type": [*config["layers_block_type"], "moe"]})
    assert "backbone.layers.4" in str(fault.value)
    model = nemotron_h_tiny()
    inserted = insert_quantizers(model, "all", config)
    with pytest.raises(RuntimeError, match="before it was calibrated"):
        forward(model, token_ids())
    with pytest.raises(UserError, match="no usable") as fault:
        calibrate(model, lambda network: None)
    assert "backbone.layers.0.mixer.in_proj" in str(fault.value)
    calibrate(model, lambda network: network(input_ids=token_ids()))
    state = collect_state(model, inserted, kv_cache="bf16", base_sha256="0")
    up = "backbone.layers.1.mixer.experts.up_proj"
    good = state.modules[up]
    state.modules[up] = ModuleState(good.weight_amax[:3], good.input_amax)
    with pytest.raises(UserError, match="another shape"):
        load_state_into(model, state)
    del state.modules[up]
    with pytest.raises(UserError, match="does not fit the model"):
        load_state_into(model, state)


def test_a_weight_of_zeros_is_refused() -> None:
    model = nemotron_h_tiny()
    model.model.layers[1].mixer.experts.up_proj.data[2] = 0
    insert_quantizers(model, "all", model.config.to_dict())
    with pytest.raises(UserError, match="no usable weight range"):
        calibrate(model, lambda network: network(input_ids=token_ids()))
