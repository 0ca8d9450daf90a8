"""Each patch: the defect is seen through the library's own front door, repaired, and comes back on revert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qat.patches.protocol import Patch, Status
from qat.patches.registry import all_defects
from tests.tiny_models import nemotron_h_tiny, qwen3_tiny, save_tiny


@pytest.fixture
def patches() -> Iterator[dict[str, Patch]]:
    found = {defect.name: defect for defect in all_defects() if isinstance(defect, Patch)}
    for patch in found.values():
        patch.revert()
    yield found
    for patch in found.values():
        patch.revert()


def adapter_on_out_proj() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(nemotron_h_tiny(), LoraConfig(r=2, target_modules=["out_proj"]))


def test_peft_accepts_out_proj_but_not_conv1d(patches: dict[str, Patch]) -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="incompatible"):
        adapter_on_out_proj()
    patches["peft_mamba_out_proj"].apply()
    model = adapter_on_out_proj().train()
    ids = torch.randint(0, 512, (1, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert gradients and all(gradient is not None and gradient.any() for gradient in gradients)
    with pytest.raises(ValueError, match="incompatible"):
        get_peft_model(nemotron_h_tiny(), LoraConfig(r=2, target_modules=["conv1d"]))


def test_the_fused_mamba_path_is_closed(patches: dict[str, Patch], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    # What mamba_ssm's kernel does, as far as out_proj is concerned: it multiplies with the weight itself.
    def fused(zxbcdt: torch.Tensor, *_: Any, outproj_weight: torch.Tensor, **__: Any) -> torch.Tensor:
        return torch.nn.functional.linear(zxbcdt[..., : outproj_weight.shape[1]], outproj_weight)

    monkeypatch.setattr(modeling, "mamba2_split_conv1d_scan_combined", fused)
    patch = patches["nemotron_h_fused_mamba"]
    assert patch.probe().status is Status.NEEDED
    patch.apply()
    assert patch.probe().status is Status.APPLIED
    calls: list[int] = []
    model = nemotron_h_tiny().train()
    model.model.layers[0].mixer.out_proj.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=torch.randint(0, 512, (1, 16)))
    assert calls == [1]
    patch.revert()
    assert modeling.mamba2_split_conv1d_scan_combined is fused


def test_modelopt_leaves_the_experts_implementation(patches: dict[str, Patch]) -> None:
    from modelopt.torch.quantization.plugins.custom import register_custom_model_plugins_on_the_fly

    def after_modelopts_hooks() -> str:
        model = nemotron_h_tiny()
        model.config._experts_implementation = "grouped_mm"
        register_custom_model_plugins_on_the_fly(model)
        return str(model.config._experts_implementation)

    assert after_modelopts_hooks() == "eager"
    patches["modelopt_eager_experts"].apply()
    assert after_modelopts_hooks() == "grouped_mm"


def test_saving_keeps_the_dtype(patches: dict[str, Patch], tmp_path: Any) -> None:
    model = qwen3_tiny()
    save_tiny(tmp_path / "a", model)
    assert model.config.dtype == "bfloat16"
    patches["transformers_dtype_string"].apply()
    model = qwen3_tiny()
    save_tiny(tmp_path / "b", model)
    assert model.config.dtype is torch.bfloat16
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_missing_target_is_not_needed_or_unclear(patches: dict[str, Patch], monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt.torch.quantization.plugins import huggingface
    from peft.tuners import tuners_utils
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    monkeypatch.delattr(tuners_utils, "_check_lora_target_modules_mamba")
    monkeypatch.delattr(modeling, "mamba2_split_conv1d_scan_combined")
    monkeypatch.delattr(huggingface, "force_eager_experts_impl_on_the_fly")
    assert patches["peft_mamba_out_proj"].probe().status is Status.NOT_NEEDED
    assert patches["nemotron_h_fused_mamba"].probe().status is Status.CANNOT_TELL
    assert patches["modelopt_eager_experts"].probe().status is Status.NOT_NEEDED
