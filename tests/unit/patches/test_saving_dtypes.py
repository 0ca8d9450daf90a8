"""The tensors that stay out of the model's dtype: from one checkpoint into another through training's steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qat.patches.modelopt_architectures_none import ModelOptArchitecturesNone
from qat.patches.modelopt_name_sentinel import ModelOptNameSentinel
from qat.patches.nemotron_h_special_dtypes import NemotronHSpecialDtypes
from qat.patches.tiny import nemotron_h_config
from tests.tiny_models import nemotron_h_tiny, save_tiny, token_ids
from tests.unit.patches.saving import applied, require_equal, require_repair, tensors

SPECIAL = ("A_log", "D", "dt_bias", "e_score_correction_bias")
WIDE, NARROW = torch.float32, torch.bfloat16


def special(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in found.items() if name.rpartition(".")[2] in SPECIAL}


def make_base(folder: Path, dtypes: dict[str, torch.dtype]) -> Path:
    """A bfloat16 checkpoint whose special tensors have the given dtypes and values that bfloat16 cannot hold."""
    save_tiny(folder, nemotron_h_tiny())
    content = tensors(folder)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in special(content).items():
        content[name] = torch.rand(tensor.shape, generator=generator).to(dtypes[name.rpartition(".")[2]])
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path, dtype: Any = NARROW) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def test_repair() -> None:
    require_repair(NemotronHSpecialDtypes())


@pytest.mark.parametrize("dtype", [NARROW, "auto"])
@pytest.mark.parametrize("scan", [WIDE, NARROW])
@pytest.mark.parametrize("router", [WIDE, NARROW])
def test_loading_and_saving_change_nothing(scan: Any, router: Any, dtype: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {"A_log": scan, "D": scan, "dt_bias": scan, "e_score_correction_bias": router})
    with applied(NemotronHSpecialDtypes()):
        model = load(base, dtype)
        save_tiny(tmp_path / "saved", model)
    assert model.dtype == NARROW
    assert model.model.layers[0].mixer.A_log.dtype == scan
    # Transformers computes the router in float32 whatever was stored.
    assert model.model.layers[1].mixer.gate.e_score_correction_bias.dtype == WIDE
    require_equal(tensors(tmp_path / "saved"), tensors(base))


def test_one_wide_tensor_widens_no_other(tmp_path: Path) -> None:
    base = make_base(tmp_path, {"A_log": WIDE, "D": NARROW, "dt_bias": NARROW, "e_score_correction_bias": WIDE})
    with applied(NemotronHSpecialDtypes()):
        mixer = load(base).model.layers[0].mixer
    assert (mixer.A_log.dtype, mixer.D.dtype, mixer.dt_bias.dtype) == (WIDE, NARROW, NARROW)


def test_the_forward_uses_the_stored_decay_and_trains(tmp_path: Path) -> None:
    base = make_base(tmp_path, dict.fromkeys(SPECIAL, WIDE))
    rounded = load(base)
    with applied(NemotronHSpecialDtypes()):
        model = load(base)
    with torch.no_grad():
        assert not torch.equal(model(token_ids()).logits, rounded(token_ids()).logits)
        stored = special(tensors(base))
        rounded.model.layers[0].mixer.A_log.data = stored["backbone.layers.0.mixer.A_log"]
        rounded.model.layers[0].mixer.D.data = stored["backbone.layers.0.mixer.D"]
        rounded.model.layers[0].mixer.dt_bias.data = stored["backbone.layers.0.mixer.dt_bias"]
        assert torch.equal(model(token_ids()).logits, rounded(token_ids()).logits)
    model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert model.model.layers[0].mixer.A_log.grad.any()
    model.eval().generate(token_ids(1, 8), max_new_tokens=3, do_sample=False)


def test_merging_widening_and_moving_do_not_reach_the_file(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    stored = {"A_log": WIDE, "D": NARROW, "dt_bias": NARROW, "e_score_correction_bias": WIDE}
    base = make_base(tmp_path / "base", stored)
    with applied(NemotronHSpecialDtypes()):
        merged = get_peft_model(load(base), LoraConfig(r=2, target_modules=["q_proj"])).merge_and_unload()
        save_tiny(tmp_path / "merged", merged)
        prepared = load(base)
        prepared.is_loaded_in_4bit = True
        prepared = prepare_model_for_kbit_training(prepared, use_gradient_checkpointing=False)
        save_tiny(tmp_path / "prepared", prepared)
        moved = load(base).to(torch.float32)
        save_tiny(tmp_path / "moved", moved)
    assert prepared.model.layers[0].mixer.D.dtype == WIDE
    expected = special(tensors(base))
    for name in ("merged", "prepared", "moved"):
        require_equal(special(tensors(tmp_path / name)), expected)


@pytest.mark.usefixtures("plain_modelopt")
def test_modelopts_export_keeps_them(tmp_path: Path) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    base = make_base(tmp_path / "base", {"A_log": WIDE, "D": WIDE, "dt_bias": WIDE, "e_score_correction_bias": NARROW})
    with applied(NemotronHSpecialDtypes(), ModelOptNameSentinel(), ModelOptArchitecturesNone()):
        model = mtq.quantize(load(base), mtq.FP8_DEFAULT_CFG, lambda network: network(token_ids(2, 16)))
        export_hf_checkpoint(model, export_dir=tmp_path / "exported")
    require_equal(special(tensors(tmp_path / "exported")), special(tensors(base)))


def test_each_layer_has_its_own(tmp_path: Path) -> None:
    from transformers import NemotronHForCausalLM

    layers = ["linear_attention"] * 12
    NemotronHForCausalLM(nemotron_h_config(*layers)).to(NARROW).save_pretrained(tmp_path / "base")
    content = tensors(tmp_path / "base")
    wide = "backbone.layers.1.mixer.D"
    content[wide] = torch.rand(content[wide].shape)
    save_file(content, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with applied(NemotronHSpecialDtypes()):
        model = load(tmp_path / "base")
        save_tiny(tmp_path / "saved", model)
    assert [layer.mixer.D.dtype == WIDE for layer in model.model.layers] == [number == 1 for number in range(12)]
    require_equal(tensors(tmp_path / "saved"), content)


def test_other_models_and_fresh_ones_are_left_alone(tmp_path: Path) -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    # Its tensors have the same names.
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8}
    config = Mamba2Config(**sizes, state_size=8, n_groups=1)
    save_tiny(tmp_path / "mamba", Mamba2ForCausalLM(config))
    assert "backbone.layers.0.mixer.A_log" in tensors(tmp_path / "mamba")
    for folder, load_or_build in (("other", lambda: load(tmp_path / "mamba")), ("fresh", nemotron_h_tiny)):
        save_tiny(tmp_path / folder / "stock", load_or_build())
        with applied(NemotronHSpecialDtypes()):
            save_tiny(tmp_path / folder / "patched", load_or_build())
        require_equal(tensors(tmp_path / folder / "patched"), tensors(tmp_path / folder / "stock"))
