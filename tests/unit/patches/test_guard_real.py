"""The guard against the silent defects of this stack, each planted in a tiny Nemotron-H with the real libraries.

Fused experts under another implementation, the fused Mamba kernel, adapters that miss or exceed what was asked,
quantizers that a LoRA configuration switches off, ranges that export would share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from qat.patches import guard
from qat.patches.guard import DeadModules, Seen, enabled_quantizers, watch
from qat.patches.modelopt_int8 import int8_config, quantize_int8
from qat.patches.registry import find
from tests.tiny_models import nemotron_h_tiny, qwen3_tiny, token_ids

EXPERTS = ["mixer.experts.up_proj", "mixer.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(autouse=True)
def out_proj_allowed() -> Iterator[None]:
    (patch,) = find("peft_mamba_out_proj")
    patch.apply()  # type: ignore[attr-defined]
    yield
    patch.revert()  # type: ignore[attr-defined]


def config() -> dict[str, Any]:
    """INT8 on all linears; the convolution is no linear, and its mixer reads the weight itself."""
    chosen = int8_config()
    chosen["quant_cfg"].append({"quantizer_name": "*conv1d*", "enable": False})
    return chosen


def quantized(model: Any) -> Any:
    quantize_int8(model, lambda network: network(input_ids=token_ids(2, 16)), config())
    for name, module in model.named_modules():  # as qat does after calibration
        if name.endswith(("self_attn", "mixer")) and hasattr(module, "q_proj"):
            share(module)
    return model


def share(attention: Any) -> None:
    for kind in ("weight_quantizer", "input_quantizer"):
        members = [getattr(getattr(attention, name), kind) for name in ("q_proj", "k_proj", "v_proj")]
        for member in members:
            member.amax = torch.stack([each.amax for each in members]).amax(0)


def adapted(model: Any, modules: Sequence[str] | None, parameters: Sequence[str] = ()) -> Any:
    from peft import LoraConfig, get_peft_model

    modules = None if modules is None else list(modules)
    with torch.random.fork_rng(devices=[]):
        return get_peft_model(model, LoraConfig(r=2, target_modules=modules, target_parameters=list(parameters)))


def step(model: Any) -> None:
    ids = token_ids(2, 16)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()


def watched(model: Any, **wanted: Any) -> Seen:
    with watch(model, **wanted) as seen:
        step(model)
    return seen


def own_experts(model: Any) -> Any:
    """Nemotron-H's experts under a class name of their own, so that ModelOpt's wrapper and not qat's takes them."""
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    class Experts(NemotronHExperts):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    for module in model.modules():
        if type(module) is NemotronHExperts:
            module.__class__ = Experts
    return model


def test_everything_takes_part() -> None:
    """Quantizers inside a LoRA layer never run, and need not: the layer's own do their work."""
    model = adapted(nemotron_h_tiny(), [*ATTENTION, "in_proj", "out_proj"], EXPERTS)
    quantized(own_experts(model))
    wanted = [name for name in enabled_quantizers(model) if ".lora_" not in name]
    seen = watched(model, quantized=wanted, adapted=["*.[qkvo]_proj", "*.in_proj", "*.out_proj", "*.experts.*"])
    seen.require()
    idle = [name for name, calls in seen.quantizer_calls.items() if not calls]
    assert any("q_proj.base_layer.weight_quantizer" in name for name in idle)
    receipt = seen.to_json()
    assert json.loads(json.dumps(receipt)) == receipt and receipt["dead"] == {}
    assert receipt["adapted_weights"] == 4 + 2 + 2 * 2 and receipt["trained_parameters"] == 2 * 10
    assert receipt["trained_numbers"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert receipt["quantizers_ran"] > 20


def test_fused_experts_under_another_implementation() -> None:
    model = quantized(own_experts(nemotron_h_tiny()))
    watched(model).require()
    model.config._experts_implementation = "grouped_mm"
    dead = watched(model).dead
    layers = [f"model.layers.{layer}.mixer.experts" for layer in (1, 3)]
    kinds = ("up_proj_input_quantizer", "up_proj_weight_quantizers", "down_proj_input_quantizer")
    assert {f"{layer}.{kind}" for layer in layers for kind in (*kinds, "down_proj_weight_quantizers")} == set(
        dead.quantizers
    )


def test_a_fused_kernel_around_out_proj(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    def fused(zxbcdt: torch.Tensor, *_: Any, outproj_weight: torch.Tensor, **__: Any) -> torch.Tensor:
        return torch.nn.functional.linear(zxbcdt[..., : outproj_weight.shape[1]], outproj_weight)

    monkeypatch.setattr(modeling, "mamba2_split_conv1d_scan_combined", fused)
    model = quantized(adapted(nemotron_h_tiny(), ["in_proj", "out_proj"]))
    # Calibration ran in eval mode, where the kernel is not used.
    dead = watched(model).dead
    mixer = "base_model.model.model.layers.0.mixer.out_proj"
    assert f"{mixer}.weight_quantizer" in dead.quantizers and f"{mixer}.input_quantizer" in dead.quantizers
    assert f"{mixer}.lora_A.default.weight_quantizer" in dead.quantizers  # nothing of its layer did its work either
    assert dead.parameters == [f"{mixer}.lora_{factor}.default.weight" for factor in "AB"]
    assert not any("in_proj" in name for name in (*dead.quantizers, *dead.parameters))


def test_target_modules_that_miss_the_fused_experts() -> None:
    wanted = ["*.experts.up_proj", "*.experts.down_proj", "*.shared_experts.*"]
    seen = watched(adapted(nemotron_h_tiny(), ["up_proj", "down_proj"]), adapted=wanted)
    missed = [f"model.layers.{layer}.{name}" for layer in (1, 3) for name in EXPERTS]
    assert sorted(seen.dead.without_adapter) == sorted(missed) and not seen.dead.unasked_adapters
    with pytest.raises(DeadModules, match="4 wanted weights have no adapter"):
        seen.require()
    watched(adapted(nemotron_h_tiny(), ["up_proj", "down_proj"], EXPERTS), adapted=wanted).require()


def test_target_modules_none_adds_attention() -> None:
    seen = watched(adapted(nemotron_h_tiny(), None, EXPERTS), adapted=["*.experts.*"])
    assert seen.dead.unasked_adapters == [f"model.layers.2.mixer.{name}" for name in ATTENTION]
    watched(adapted(nemotron_h_tiny(), [], EXPERTS), adapted=["*.experts.*"]).require()


def test_a_dead_adapter_of_fused_experts() -> None:
    model = adapted(nemotron_h_tiny(), [], EXPERTS)
    (name, factor), *_ = [(n, p) for n, p in model.named_parameters() if "layers.3" in n and "lora_B" in n]
    factor.register_hook(torch.zeros_like)
    assert watched(model).dead.parameters == [name]


def test_a_lora_configuration_that_switches_quantizers_off() -> None:
    """What QATTrainer does with `lora_config`: `*q_proj.weight_quantizer: off`, and the idle ones inside stay on."""
    from modelopt.torch.quantization.plugins.transformers_trainer import disable_lora_quantizers_in_config

    wanted = enabled_quantizers(quantized(nemotron_h_tiny()))
    model = adapted(nemotron_h_tiny(), ["q_proj"])
    chosen = config()
    disable_lora_quantizers_in_config(chosen, ["q_proj"])
    quantize_int8(model, lambda network: network(input_ids=token_ids(2, 16)), chosen)
    dead = watched(model, quantized=[name for name in wanted if "q_proj" in name]).dead
    taken_out = {*dead.quantizers, *dead.switched_off}
    assert any(name.endswith("q_proj.base_layer.weight_quantizer") for name in taken_out)
    assert all("q_proj" in name for name in taken_out)


def test_quantizers_that_were_on_before_the_adapter_came() -> None:
    model = quantized(nemotron_h_tiny())
    wanted = enabled_quantizers(model)
    model = adapted(model, ["q_proj", "in_proj"])
    watched(model, quantized=wanted).require()
    attention = model.get_base_model().model.layers[2].mixer
    attention.q_proj.base_layer.weight_quantizer.disable()
    with pytest.raises(DeadModules, match="switched off or missing"):
        watched(model, quantized=wanted).require()
    assert watched(model, quantized=wanted).dead.switched_off == ["model.layers.2.mixer.q_proj.weight_quantizer"]
    watched(model, quantized=wanted).require(quantizers=False)
    watched(model).require()


def test_a_wanted_pattern_that_fits_nothing() -> None:
    seen = watched(qwen3_tiny(), quantized=["*.experts.*"], adapted=["*.experts.*"])
    assert seen.dead.switched_off == seen.dead.without_adapter == ["*.experts.*"]


@pytest.mark.parametrize("kind", ["weight_quantizer", "input_quantizer"])
def test_ranges_that_a_server_would_share(kind: str) -> None:
    model = quantized(nemotron_h_tiny())
    watched(model).require()
    quantizer = getattr(model.model.layers[2].mixer.k_proj, kind)
    quantizer.amax = quantizer.amax * 2
    dead = watched(model).dead
    group = ", ".join(f"model.layers.2.mixer.{name}" for name in ("q_proj", "k_proj", "v_proj"))
    assert dead.unshared == [f"{group}: {kind}"]


def test_the_groups_are_those_of_the_numerics() -> None:
    from qat.quant.names import FUSED_WHEN_SERVED

    assert guard.FUSED_WHEN_SERVED == FUSED_WHEN_SERVED
