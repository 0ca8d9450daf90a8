"""Silent defects of training with ModelOpt: each through the library's own front door, with and without its repair."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from qat.patches.modelopt_int8 import int8_config, quantize_int8
from qat.patches.registry import find
from tests.tiny_models import nemotron_h_tiny, qwen3_tiny, token_ids

BYPASSED, LORA, LATE, LEFT = (
    "modelopt_experts_bypassed",
    "modelopt_qat_lora_disables_quantizers",
    "modelopt_amax_shared_late",
    "modelopt_functional_left_replaced",
)


@pytest.fixture
def patches() -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {defect.name: defect for defect in find(BYPASSED, LORA, LATE, LEFT)}
    yield found
    for patch in found.values():
        patch.revert()


def on_tokens(model: Any) -> Any:
    return model(input_ids=token_ids(2, 16))


# Fused experts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_of_modelopt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A tiny Nemotron-H with ModelOpt's own wrapper around its experts, whatever qat registered before."""
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    class Experts(NemotronHExperts):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model: Any = nemotron_h_tiny(dtype=torch.float32)
    for module in model.modules():
        if type(module) is NemotronHExperts:
            module.__class__ = Experts
    config = int8_config()
    config["quant_cfg"].append({"quantizer_name": "*conv1d*", "enable": False})
    quantize_int8(model, on_tokens, config)
    yield model
    QuantModuleRegistry.unregister(Experts)


def logits(model: Any, implementation: str) -> Tensor:
    model.config._experts_implementation = implementation
    with torch.no_grad():
        output: Tensor = on_tokens(model).logits
    assert model.config._experts_implementation == implementation
    return output


def test_experts_are_quantized_under_every_implementation(patches: dict[str, Any], model_of_modelopt: Any) -> None:
    eager = logits(model_of_modelopt, "eager")
    assert not torch.allclose(logits(model_of_modelopt, "grouped_mm"), eager, atol=1e-3)
    patches[BYPASSED].apply()
    for implementation in ("grouped_mm", "batched_mm"):
        assert torch.equal(logits(model_of_modelopt, implementation), eager)


def test_the_teacher_keeps_its_implementation(
    patches: dict[str, Any], model_of_modelopt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import modelopt.torch.quantization as mtq
    from transformers.integrations import moe

    called: list[str] = []
    original = moe.ALL_EXPERTS_FUNCTIONS.get_interface

    def note(name: str, eager: Any) -> Any:
        called.append(name)
        return original(name, eager)

    monkeypatch.setattr(moe.ALL_EXPERTS_FUNCTIONS, "get_interface", note)
    patches[BYPASSED].apply()
    logits(model_of_modelopt, "grouped_mm")
    assert set(called) == {"eager"}
    called.clear()
    mtq.disable_quantizer(model_of_modelopt, "*")
    logits(model_of_modelopt, "grouped_mm")
    assert set(called) == {"grouped_mm"}


def test_an_error_in_the_forward_leaves_the_implementation(
    patches: dict[str, Any], model_of_modelopt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ModelOpt's wrapper leaves its own F.linear in place after an error.
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)
    experts = model_of_modelopt.model.layers[1].mixer.experts
    patches[BYPASSED].apply()
    model_of_modelopt.config._experts_implementation = "grouped_mm"
    with pytest.raises(AttributeError):
        experts(torch.zeros(2, 64), None, None)
    assert model_of_modelopt.config._experts_implementation == "grouped_mm"


def test_an_error_leaves_torchs_linear(
    patches: dict[str, Any], model_of_modelopt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes after an interrupted forward computes with the plain linear."""
    plain = nn.functional.linear
    experts = model_of_modelopt.model.layers[1].mixer.experts
    monkeypatch.setattr(experts.act_fn, "forward", Mock(side_effect=MemoryError))

    def interrupted() -> Any:
        with pytest.raises(MemoryError):
            logits(model_of_modelopt, "eager")
        left, nn.functional.linear = nn.functional.linear, plain
        return left

    assert interrupted() is not plain
    patches[LEFT].apply()
    assert interrupted() is plain and not hasattr(nn.functional, "_linear")
    monkeypatch.undo()
    logits(model_of_modelopt, "eager")
    assert nn.functional.linear is plain


# LoRA in the trainer -------------------------------------------------------------------------------------------------


def trainer_config(folder: Path, targets: Sequence[str]) -> Any:
    """The configuration that `QATTrainer.__init__` makes of a recipe and a LoRA configuration."""
    from modelopt.torch.quantization.plugins.transformers_trainer import QATTrainer, QuantizationArguments
    from peft import LoraConfig
    from transformers import TrainingArguments

    arguments: Any = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    arguments.lora_config = LoraConfig(r=2, target_modules=list(targets))
    model = qwen3_tiny(dtype=torch.float32)
    recipe = QuantizationArguments(recipe="general/ptq/nvfp4_default-kv_fp8")
    return QATTrainer(model=model, args=arguments, quant_args=recipe).quant_cfg


def names_in(config: Any) -> list[str]:
    return [str(dict(entry)["quantizer_name"]) for entry in config["quant_cfg"]]


def test_the_trainer_leaves_the_quantizers_on(patches: dict[str, Any], tmp_path: Path) -> None:
    names = names_in(trainer_config(tmp_path, ["q_proj"]))
    assert names[-4:] == ["*lora*", "*q_proj.input_quantizer", "*q_proj.weight_quantizer", "*q_proj.output_quantizer"]
    patches[LORA].apply()
    # The factors' own quantizers stay off, with the repair as without.
    assert names_in(trainer_config(tmp_path, ["q_proj"])) == names[:-3]


def test_what_the_trainer_prepared_is_what_runs(patches: dict[str, Any]) -> None:
    """The layer's output is the quantized one: the product of rounded inputs and rounded weights (B is zero)."""
    from modelopt.torch.quantization.plugins import transformers_trainer
    from peft import LoraConfig, get_peft_model

    def errors() -> tuple[float, float]:
        """Of the layer's output, against the exact product and against the rounded one."""
        torch.manual_seed(0)
        layers = nn.Sequential()
        layers.add_module("q_proj", nn.Linear(16, 16, bias=False))
        model = get_peft_model(layers, LoraConfig(r=2, target_modules=["q_proj"]))
        weight: Tensor = model.base_model.model.q_proj.base_layer.weight.detach()
        config = int8_config()
        transformers_trainer.disable_lora_quantizers_in_config(config, ["q_proj"])
        x = torch.randn(4, 16)
        quantize_int8(model, lambda network: network(x), config)
        steps = [tensor.abs().amax() / 127 for tensor in (x, weight)]
        rounded = [(tensor / step).round() * step for tensor, step in zip((x, weight), steps, strict=True)]
        with torch.no_grad():
            output = model(x)
        return float((output - x @ weight.T).abs().max()), float((output - rounded[0] @ rounded[1].T).abs().max())

    from_exact, from_rounded = errors()
    assert from_exact < 1e-5 < 1e-3 < from_rounded
    patches[LORA].apply()
    from_exact, from_rounded = errors()
    assert from_rounded < 1e-5 < 1e-3 < from_exact


# Ranges of fused modules ---------------------------------------------------------------------------------------------


def quantized_weights(model: Any) -> dict[str, Tensor]:
    return {
        name: module.weight_quantizer(module.weight).detach().clone()
        for name, module in model.named_modules()
        if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled
    }


def fuse_as_export_does(model: Any) -> None:
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        preprocess_linear_fusion([attention.q_proj, attention.k_proj, attention.v_proj])
        preprocess_linear_fusion([mlp.gate_proj, mlp.up_proj])


@pytest.mark.parametrize("calibrated_apart", [False, True])
def test_export_changes_no_weight(patches: dict[str, Any], calibrated_apart: bool) -> None:
    import modelopt.torch.quantization as mtq

    def changed() -> set[str]:
        model = qwen3_tiny(dtype=torch.float32)
        config = int8_config()
        if calibrated_apart:
            config["algorithm"] = None
        quantize_int8(model, on_tokens, config)
        if calibrated_apart:
            mtq.calibrate(model, algorithm="max", forward_loop=on_tokens)
        trained = quantized_weights(model)
        fuse_as_export_does(model)
        exported = quantized_weights(model)
        assert len(trained) == 16  # q, k, v, o, gate, up, down in two layers, embedding and head
        return {name for name in trained if not torch.equal(trained[name], exported[name])}

    without = changed()
    assert without and all(name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")) for name in without)
    patches[LATE].apply()
    assert changed() == set()


def test_sharing_takes_the_largest_and_leaves_the_rest(patches: dict[str, Any]) -> None:
    reference, model = (qwen3_tiny(dtype=torch.float32) for _ in range(2))
    config = int8_config()
    config["quant_cfg"].append({"quantizer_name": "*layers.1*v_proj.weight_quantizer", "enable": False})
    quantize_int8(reference, on_tokens, copy.deepcopy(config))
    patches[LATE].apply()
    quantize_int8(model, on_tokens, config)

    def ranges(network: Any, layer: int, *names: str) -> list[float]:
        attention = network.model.layers[layer].self_attn
        return [float(getattr(attention, name).weight_quantizer.amax) for name in names]

    whole, part = ("q_proj", "k_proj", "v_proj"), ("q_proj", "k_proj")
    assert ranges(model, 0, *whole) == [max(ranges(reference, 0, *whole))] * 3
    # A member that is not quantized has no range to share.
    assert ranges(model, 1, *part) == [max(ranges(reference, 1, *part))] * 2
    assert ranges(model, 0, "o_proj") == ranges(reference, 0, "o_proj")


def test_qats_own_calibration_leaves_export_nothing_to_share() -> None:
    from qat.quant.modelopt import calibrate, insert_quantizers, quantizers

    model = qwen3_tiny()
    insert_quantizers(model, "all", model.config.to_dict())
    calibrate(model, lambda network: on_tokens(network))
    before = {name: pair.weight._amax.clone() for name, pair in quantizers(model).items()}
    fuse_as_export_does(model)
    assert before and all(torch.equal(before[name], pair.weight._amax) for name, pair in quantizers(model).items())
