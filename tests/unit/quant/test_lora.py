"""LoRA under quantization and its merge, against the arithmetic written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.errors import UserError
from qat.patches.guard import watch
from qat.quant.effective import effective_weight
from qat.quant.lora import linear_weight, merge_adapter_, parameter_weight
from qat.quant.modelopt import calibrate, insert_quantizers, quantizers, quantizers_off
from qat.quant.nvfp4 import fake_quant_activation, fake_quant_weight
from tests.tiny_models import nemotron_h_tiny, qwen3_moe_tiny, qwen3_tiny, token_ids
from tests.unit.quant.adapters import with_lora

BUILDERS = [nemotron_h_tiny, qwen3_moe_tiny]


def forward(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def quantized_lora(build: Any, **options: Any) -> Any:
    model = with_lora(build(), **options)
    insert_quantizers(model, "all", model.config.to_dict())
    calibrate(model, lambda network: network(input_ids=token_ids()))
    return model


def test_a_lora_linear_by_hand() -> None:
    model = quantized_lora(nemotron_h_tiny)
    layer = model.base_model.model.model.layers[0].mixer.out_proj
    pair = quantizers(model)["backbone.layers.0.mixer.out_proj"]
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        y = layer(x)
    w = nemotron_h_tiny().model.layers[0].mixer.out_proj.weight.detach()
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    effective = torch.addmm(w, b.bfloat16(), a.bfloat16(), alpha=2.0)
    assert pair.weight._amax == effective.abs().max().float()
    assert torch.equal(
        y, F.linear(fake_quant_activation(x, pair.input._amax), fake_quant_weight(effective, pair.weight._amax))
    )


def test_experts_see_the_effective_weight() -> None:
    model = quantized_lora(nemotron_h_tiny)
    outer = model.base_model.model.model.layers[1].mixer.experts
    inner = outer.base_layer
    assert (outer.parameter_name, inner.parameter_name) == ("down_proj", "up_proj")
    base = nemotron_h_tiny().model.layers[1].mixer.experts
    effective = {}
    for wrapper in (outer, inner):
        name = wrapper.parameter_name
        a = wrapper.lora_A["default"].weight.detach().view(8, 4, -1)
        b = wrapper.lora_B["default"].weight.detach().view(-1, 4, 8).permute(2, 0, 1)
        w = getattr(base, name).detach()
        effective[name] = torch.baddbmm(w, b.bfloat16(), a.bfloat16(), alpha=2.0)
        pair = quantizers(model)[f"backbone.layers.1.mixer.experts.{name}"]
        assert torch.equal(pair.weight._amax, effective[name].abs().amax((1, 2)).float())
    # The same experts without an adapter, with these weights, under the same ranges.
    plain = nemotron_h_tiny()
    for name, weight in effective.items():
        getattr(plain.model.layers[1].mixer.experts, name).data.copy_(weight)
    insert_quantizers(plain, "all", plain.config.to_dict())
    calibrate(plain, lambda network: network(input_ids=token_ids()))
    for name in effective:
        key = f"backbone.layers.1.mixer.experts.{name}"
        quantizers(plain)[key].input._amax.copy_(quantizers(model)[key].input._amax)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 64, generator=generator).bfloat16()
    routes = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(40)])
    gates = torch.rand(40, 2, generator=generator)
    with torch.no_grad():
        assert torch.equal(outer(x, routes, gates), plain.model.layers[1].mixer.experts(x, routes, gates))
    assert not inner.base_layer.adapted, "the effective weight lives for one forward only"


@pytest.mark.parametrize("build", BUILDERS)
def test_merged_equals_the_effective_weight_forward(build: Any) -> None:
    ids = token_ids(seed=4)
    student = quantized_lora(build)
    with quantizers_off(student):
        expected = forward(student, ids)
        with student.disable_adapter():
            teacher = forward(student, ids)
    assert torch.equal(teacher, forward(build(), ids))
    merged = merge_adapter_(with_lora(build()))
    assert torch.equal(forward(merged, ids), expected)
    assert not torch.equal(expected, teacher)
    assert set(merged.state_dict()) == set(build().state_dict())


def test_merging_rounds_once() -> None:
    wrapped = with_lora(nemotron_h_tiny())
    expected = {}
    for name, layer in wrapped.get_base_model().named_modules():
        if hasattr(layer, "parameter_name"):
            expected[f"{name.replace('.base_layer', '')}.{layer.parameter_name}"] = parameter_weight(layer).detach()
        elif hasattr(layer, "lora_A"):
            expected[f"{name}.weight"] = linear_weight(layer).detach()
    state = merge_adapter_(wrapped).state_dict()
    assert len(expected) == 14
    for name, weight in expected.items():
        assert torch.equal(state[name], weight)
    pefts = with_lora(nemotron_h_tiny()).merge_and_unload().state_dict()
    assert any(not torch.equal(pefts[name], weight) for name, weight in expected.items()), "PEFT rounds twice"


def test_a_second_adapter_goes_on_the_merged_model(recwarn: pytest.WarningsRecorder) -> None:
    merged = merge_adapter_(with_lora(nemotron_h_tiny()))
    recwarn.clear()
    again = with_lora(merged, seed=8)
    assert not [warning for warning in recwarn if "second time" in str(warning.message)]
    layer = again.base_model.model.model.layers[2].mixer.q_proj
    expected = effective_weight(
        merged.model.layers[2].mixer.q_proj.base_layer.weight,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        2.0,
    )
    assert torch.equal(linear_weight(layer), expected)


@pytest.mark.parametrize("build", BUILDERS)
def test_every_factor_and_quantizer_takes_part(build: Any) -> None:
    model = quantized_lora(build, zero_b=True).train()
    ids = token_ids()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with watch(model) as seen:
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    seen.require(quantizers=True, adapters=True)
    assert len(seen.quantizer_calls) == 2 * len(quantizers(model))
    assert min(seen.quantizer_calls.values()) >= 2


@pytest.mark.parametrize("build", BUILDERS)
def test_gradient_checkpointing_changes_nothing(build: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = quantized_lora(build).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][name]), name


def test_the_adapter_file_holds_factors_only(tmp_path: Path) -> None:
    from safetensors import safe_open

    quantized_lora(nemotron_h_tiny).save_pretrained(tmp_path / "quantized")
    with_lora(nemotron_h_tiny()).save_pretrained(tmp_path / "plain")
    keys = []
    for folder in ("quantized", "plain"):
        with safe_open(tmp_path / folder / "adapter_model.safetensors", "pt") as file:
            keys.append(set(file.keys()))
    assert keys[0] == keys[1]


def test_adapters_without_an_effective_weight_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(UserError, match="dropout"):
        model = with_lora(nemotron_h_tiny(), dropout=0.1)
        insert_quantizers(model, "all", model.config.to_dict())
    for options in ({"use_dora": True}, {"lora_bias": True}):
        model = get_peft_model(qwen3_tiny(), LoraConfig(target_modules=["q_proj"], **options))
        with pytest.raises(UserError, match="Only plain LoRA"):
            merge_adapter_(model)
    model = get_peft_model(qwen3_tiny(), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(UserError, match="cannot be merged"):
        merge_adapter_(model)


def test_quantized_models_are_not_merged() -> None:
    with pytest.raises(TypeError, match="before quantizers"):
        merge_adapter_(quantized_lora(nemotron_h_tiny))


def test_pefts_own_merge_is_noticed() -> None:
    model = quantized_lora(nemotron_h_tiny)
    layer = model.base_model.model.model.layers[0].mixer.in_proj
    layer.merged_adapters.append("default")
    with pytest.raises(RuntimeError, match="merge_adapter_"):
        forward(model, token_ids())
