"""Silent defects of adapters: merging, fused experts, defaults nobody asked for, preparation for k-bit training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.patches.modelopt_int8 import quantize_int8
from qat.patches.registry import find
from tests.tiny_models import nemotron_h_tiny, token_ids

MERGE, UPCAST = "peft_merge_rounding", "peft_kbit_experts_upcast"


@pytest.fixture
def patches() -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {defect.name: defect for defect in find(MERGE, UPCAST, "peft_mamba_out_proj")}
    yield found
    for patch in found.values():
        patch.revert()


# Merging -------------------------------------------------------------------------------------------------------------


def lora_in_bf16(alpha: int) -> Any:
    """One BF16 layer of 64 by 64 with FP32 factors of rank 4 that matter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layers = nn.Sequential()
    layers.add_module("q_proj", nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))
    model: Any = get_peft_model(layers, LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"]))
    nn.init.normal_(model.base_model.model.q_proj.lora_B["default"].weight, std=0.1)
    return model


def rounded(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float32).to(torch.bfloat16))


@pytest.fixture
def modelopts_lora() -> Iterator[None]:
    """ModelOpt's class for LoRA layers in its registry, where qat may have put its own."""
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from modelopt.torch.quantization.plugins.peft import _QuantLoraLinear
    from peft.tuners.lora.layer import Linear

    before: Any = QuantModuleRegistry._registry[Linear]
    key = QuantModuleRegistry.get_key(Linear)
    QuantModuleRegistry.unregister(Linear)
    QuantModuleRegistry.register({Linear: key})(_QuantLoraLinear)
    yield
    QuantModuleRegistry.unregister(Linear)
    QuantModuleRegistry.register({Linear: key})(before)


@pytest.mark.parametrize("alpha", [8, 5])
def test_merging_writes_what_the_forward_quantized(patches: dict[str, Any], modelopts_lora: None, alpha: int) -> None:
    def both() -> tuple[Tensor, Tensor, Any]:
        """What the weight quantizer got in the forward, what was merged, and the layer."""
        model, x = lora_in_bf16(alpha), torch.ones(2, 64, dtype=torch.bfloat16)
        quantize_int8(model, lambda network: network(x))
        layer = model.base_model.model.q_proj
        seen: list[Tensor] = []
        layer.weight_quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
        with torch.no_grad():
            model(x)
            layer.merge()
        return seen[0], layer.base_layer.weight.detach(), layer

    quantized, merged, _ = both()
    assert 0.05 < float((quantized != merged).float().mean()) < 0.5
    patches[MERGE].apply()
    quantized, merged, layer = both()
    assert torch.equal(quantized, merged)
    # By hand, one value: the product rounded to BF16, then the sum.
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    base = lora_in_bf16(alpha).base_model.model.q_proj.base_layer.weight
    product = sum(float(b[3, rank]) * float(a[rank, 7]) for rank in range(4)) * alpha / 4
    assert float(merged[3, 7]) == rounded(float(base[3, 7]) + rounded(product))
    layer.unmerge()
    assert torch.allclose(layer.base_layer.weight, base, atol=2**-9)


def test_plain_adapters_merge_as_before(patches: dict[str, Any]) -> None:
    before = lora_in_bf16(8).merge_and_unload().q_proj.weight
    patches[MERGE].apply()
    assert torch.equal(lora_in_bf16(8).merge_and_unload().q_proj.weight, before)


def test_qat_merges_what_its_own_forward_computes_with() -> None:
    """The way around: one function for both, so the merged model's logits are those of the adapted one."""
    from qat.quant.lora import linear_weight, merge_adapter_

    adapted = lora_in_bf16(5)
    computed = linear_weight(adapted.base_model.model.q_proj).detach().clone()
    assert torch.equal(merge_adapter_(adapted).get_submodule("q_proj").weight, computed)
    assert not torch.equal(lora_in_bf16(5).merge_and_unload(safe_merge=True).q_proj.weight, computed)


# Fused experts -------------------------------------------------------------------------------------------------------


def trainable(**arguments: Any) -> int:
    """Trainable numbers of rank 2 on the tiny Nemotron-H (two layers of experts, one with attention)."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(nemotron_h_tiny(), LoraConfig(r=2, **arguments))
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def test_what_each_way_of_asking_trains() -> None:
    """Counted by hand from the shapes: hidden 64, shared experts 96 wide, 8 routed experts 48 wide, rank 2."""
    shared = 2 * 2 * (64 + 96) * 2  # layers, projections
    routed = 2 * 2 * (64 + 48) * 2 * 8
    attention = 2 * ((64 + 64) + (64 + 32) + (64 + 32) + (64 + 64))  # q, k, v, o
    parameters = ["mixer.experts.up_proj", "mixer.experts.down_proj"]
    assert trainable(target_modules=["up_proj", "down_proj"]) == shared
    assert trainable(target_modules=["up_proj", "down_proj"], target_parameters=parameters) == shared + routed
    assert trainable(target_modules=[], target_parameters=parameters) == routed
    assert trainable(target_modules=None, target_parameters=parameters) == routed + attention


def test_qats_adapter_reaches_them_and_nothing_else() -> None:
    from qat.recipe.schema import AdapterBlock
    from qat.train.adapters import attach_adapter

    block = AdapterBlock(rank=2, alpha=4, targets=("routed_experts", "shared_experts"))
    _, coverage = attach_adapter(nemotron_h_tiny(), block, "nemotron_h", seed=0)
    assert coverage.matched == {"routed_experts": 4, "shared_experts": 4}
    assert coverage.trainable == 2 * 2 * (64 + 96) * 2 + 2 * 2 * (64 + 48) * 2 * 8


@pytest.mark.parametrize("target_modules", [["up_proj", "down_proj"], None])
def test_verify_notices_an_adapter_that_misses_or_adds(
    monkeypatch: pytest.MonkeyPatch, target_modules: list[str] | None
) -> None:
    """The workarounds' own check fails where the way around would not work."""
    import peft

    from qat.patches.protocol import Status

    original = peft.LoraConfig

    def broken(**arguments: Any) -> Any:
        # Missing: no parameters. Adding: None in the place of an empty list.
        parameters = arguments["target_parameters"] if target_modules is None else None
        return original(r=2, target_modules=target_modules, target_parameters=parameters)

    (defect,) = find("peft_target_modules_none" if target_modules is None else "peft_fused_experts_missed")
    workaround: Any = defect
    assert workaround.verify().status is Status.NOT_NEEDED
    monkeypatch.setattr(peft, "LoraConfig", broken)
    assert workaround.verify().status is Status.NEEDED


# Preparation for k-bit training --------------------------------------------------------------------------------------


def test_fused_experts_keep_their_dtype(patches: dict[str, Any]) -> None:
    import peft

    def prepared() -> Any:
        return peft.prepare_model_for_kbit_training(nemotron_h_tiny(), use_gradient_checkpointing=False)

    def is_expert(name: str) -> bool:
        return name.endswith((".experts.up_proj", ".experts.down_proj"))

    before = {name: parameter.dtype for name, parameter in prepared().named_parameters()}
    assert set(before.values()) == {torch.float32}
    patches[UPCAST].apply()
    model = prepared()
    for name, parameter in model.named_parameters():
        assert parameter.dtype is (torch.bfloat16 if is_expert(name) else torch.float32), name
        assert not parameter.requires_grad
    assert sum(is_expert(name) for name in before) == 4
    # The model's own method is back.
    assert "parameters" not in model.__dict__ and len(list(model.parameters())) == len(before)


def test_the_method_is_back_after_an_error(patches: dict[str, Any]) -> None:
    import peft

    patches[UPCAST].apply()
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError):
        peft.prepare_model_for_kbit_training(model, no_such_argument=True)
    assert "parameters" not in model.__dict__


def test_training_after_it_runs_in_bf16(patches: dict[str, Any]) -> None:
    """The mixed model still takes a step: BF16 experts between float32 norms under autocast."""
    import peft
    from peft import LoraConfig, get_peft_model

    patches[UPCAST].apply()
    model: Any = peft.prepare_model_for_kbit_training(nemotron_h_tiny(), use_gradient_checkpointing=False)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    ids = token_ids(1, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in adapted.named_parameters() if "lora_B" in name)
