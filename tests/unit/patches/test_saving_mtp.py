"""Multi-token prediction layers, which Transformers has no modules for, from one checkpoint into another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qat.patches.nemotron_h_mtp_dropped import NemotronHMtpDropped
from qat.patches.nemotron_h_special_dtypes import NemotronHSpecialDtypes
from qat.patches.transformers_quantized_moe_save import TransformersQuantizedMoeSave
from tests.tiny_models import nemotron_h_tiny, save_tiny, token_ids
from tests.unit.patches.saving import applied, config, require_equal, require_repair, tensors

# An attention layer and experts, named as in the trunk, with an index that the trunk has too.
DRAFT = {
    "mtp.layers.0.eh_proj.weight": torch.randn(64, 128, dtype=torch.bfloat16),
    "mtp.layers.0.mixer.q_proj.weight": torch.randn(64, 64, dtype=torch.bfloat16),
    "mtp.layers.1.mixer.experts.0.up_proj.weight": torch.randn(48, 64, dtype=torch.bfloat16),
    "mtp.layers.1.mixer.experts.0.down_proj.weight": torch.randn(64, 48, dtype=torch.bfloat16),
    "mtp.layers.1.mixer.gate.e_score_correction_bias": torch.randn(8),
}


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = nemotron_h_tiny()
    model.config.num_nextn_predict_layers = 1
    folder = save_tiny(tmp_path / "base", model)
    save_file(tensors(folder) | DRAFT, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_repair() -> None:
    require_repair(NemotronHMtpDropped())


def test_the_layers_survive_load_and_save(base: Path, tmp_path: Path) -> None:
    with applied(NemotronHMtpDropped(), NemotronHSpecialDtypes(), TransformersQuantizedMoeSave()):
        model = load(base)
        model.lm_head.weight.data.neg_()
        save_tiny(tmp_path / "saved", model)
    expected = tensors(base)
    expected["lm_head.weight"] = -expected["lm_head.weight"]
    require_equal(tensors(tmp_path / "saved"), expected)
    assert config(tmp_path / "saved")["num_nextn_predict_layers"] == 1
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "saved")(token_ids()).logits, model(token_ids()).logits)


def test_a_merged_adapter_keeps_them(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    monkeypatch.chdir(base.parent)
    with applied(NemotronHMtpDropped()):
        model = get_peft_model(load(Path(base.name)), LoraConfig(r=2, target_modules=["q_proj"])).merge_and_unload()
        monkeypatch.chdir("/")  # a relative path is remembered as where it was
        save_tiny(tmp_path / "saved", model)
    assert {name for name in tensors(tmp_path / "saved") if name.startswith("mtp.")} == set(DRAFT)


@pytest.mark.usefixtures("plain_modelopt")
def test_modelopts_export_keeps_them(base: Path, tmp_path: Path) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    with applied(NemotronHMtpDropped()):
        model = mtq.quantize(load(base), mtq.FP8_DEFAULT_CFG, lambda network: network(token_ids(2, 16)))
        export_hf_checkpoint(model, export_dir=tmp_path / "exported")
    written = tensors(tmp_path / "exported")
    require_equal({name: written[name] for name in DRAFT}, DRAFT)


def test_a_base_without_them_gets_none(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", nemotron_h_tiny())
    with applied(NemotronHMtpDropped()):
        save_tiny(tmp_path / "saved", load(tmp_path / "base"))
    require_equal(tensors(tmp_path / "saved"), tensors(tmp_path / "base"))
