"""Names and tensors that saving and exporting write: held against the library's own classes and the written files."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.patches.modelopt_architectures_none import ModelOptArchitecturesNone
from qat.patches.modelopt_name_sentinel import ModelOptNameSentinel
from qat.patches.protocol import Status
from qat.patches.remote_tied_keys_list import RemoteTiedKeysList
from qat.patches.transformers_backbone_rename import TransformersBackboneRename
from qat.patches.transformers_quantized_moe_save import TransformersQuantizedMoeSave
from tests.tiny_models import nemotron_h_tiny, qwen3_moe_tiny, save_tiny, token_ids
from tests.unit.patches.saving import applied, config, require_equal, require_repair, tensors


def llama_classes() -> tuple[Any, Any]:
    """Transformers' Llama, and the same class as remote code of before Transformers 5 would declare it."""
    from transformers import LlamaForCausalLM

    class Remote(LlamaForCausalLM):
        _tied_weights_keys = ["lm_head.weight"]

    return LlamaForCausalLM, Remote


def llama_config(tied: bool) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(token_ids()).logits
    return found


def test_tied_keys_repair() -> None:
    require_repair(RemoteTiedKeysList())


@pytest.mark.parametrize("tied", [False, True])
def test_a_list_of_tied_keys_means_the_embedding(tied: bool, tmp_path: Path) -> None:
    plain, remote = llama_classes()
    with applied(RemoteTiedKeysList()):
        model = remote(llama_config(tied))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        model.save_pretrained(tmp_path)
        again = remote.from_pretrained(tmp_path)
    written = tensors(tmp_path)
    assert ("lm_head.weight" in written) is not tied
    if not tied:
        assert torch.equal(written["lm_head.weight"], model.lm_head.weight)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    for reader in (again, plain.from_pretrained(tmp_path)):
        assert torch.equal(logits(reader), logits(model))
    assert remote._tied_weights_keys == ["lm_head.weight"]


def test_a_model_built_before_the_repair_can_be_saved(tmp_path: Path) -> None:
    _, remote = llama_classes()
    model = remote(llama_config(False))
    holder = torch.nn.Module()
    holder.inner = model
    with applied(RemoteTiedKeysList()):
        save_tiny(tmp_path, model)
        from transformers import modeling_utils

        assert modeling_utils._get_tied_weight_keys(holder) == ["inner.lm_head.weight"]
    assert torch.equal(tensors(tmp_path)["lm_head.weight"], model.lm_head.weight)


def plant_old_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use Transformers 5.14's conversion table for Nemotron-H."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    first, *rest = conversion_mapping.get_checkpoint_conversion_mapping("nemotron_h")
    rules = [first, WeightRenaming("embedding.weight", "embeddings.weight"), *rest]
    table = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", table | {"nemotron_h": rules})


def test_the_embeddings_name_is_right_here() -> None:
    assert TransformersBackboneRename().probe().status is Status.NOT_NEEDED


def test_the_embeddings_name_under_the_old_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    model = nemotron_h_tiny()
    save_tiny(tmp_path / "right", model)
    with monkeypatch.context() as planted:
        plant_old_rule(planted)
        require_repair(TransformersBackboneRename())
        save_tiny(tmp_path / "wrong", model)
        with applied(TransformersBackboneRename()):
            save_tiny(tmp_path / "repaired", model)
    assert "backbone.embedding.weight" in tensors(tmp_path / "wrong")
    require_equal(tensors(tmp_path / "repaired"), tensors(tmp_path / "right"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "repaired")), logits(model))


def quantized(model: Any) -> Any:
    import modelopt.torch.quantization as mtq

    return mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda network: network(token_ids(2, 16)))


def test_quantized_moe_repair() -> None:
    require_repair(TransformersQuantizedMoeSave())


@pytest.mark.parametrize("build", [nemotron_h_tiny, qwen3_moe_tiny])
def test_a_quantized_moe_is_saved_whole(build: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path / "plain", build())
    model = quantized(build())
    with pytest.raises(IndexError, match="Dimension specified as 0"):
        save_tiny(tmp_path / "stock", model)
    with applied(TransformersQuantizedMoeSave()):
        save_tiny(tmp_path / "quantized", model)
    written = tensors(tmp_path / "quantized")
    ranges = {name: written.pop(name) for name in list(written) if "_quantizer" in name}
    require_equal(written, tensors(tmp_path / "plain"))
    assert any(".experts." in name for name in ranges)
    require_equal(ranges, {name: value for name, value in model.state_dict().items() if "_quantizer" in name})


def test_sentinel_repair() -> None:
    require_repair(ModelOptNameSentinel())


def test_architectures_repair() -> None:
    require_repair(ModelOptArchitecturesNone())


@pytest.mark.usefixtures("plain_modelopt")
def test_modelopts_export_of_a_model_that_was_never_loaded(tmp_path: Path) -> None:
    from modelopt.torch.export import export_hf_checkpoint

    model = quantized(nemotron_h_tiny())
    assert model.config.architectures is None
    with applied(ModelOptNameSentinel(), ModelOptArchitecturesNone()):
        export_hf_checkpoint(model, export_dir=tmp_path)
    written = tensors(tmp_path)
    assert config(tmp_path)["architectures"] == ["NemotronHForCausalLM"]
    excluded = config(tmp_path, "hf_quant_config.json")["quantization"]["exclude_modules"]
    assert excluded == config(tmp_path)["quantization_config"]["ignore"]
    for pattern in excluded:
        matched = [name for name in written if fnmatch.fnmatchcase(name, f"{pattern}.weight")]
        assert matched, pattern
        assert all(written[name].dtype == torch.bfloat16 for name in matched)
    unquantized = {name for name, tensor in written.items() if tensor.dim() >= 2 and tensor.dtype == torch.bfloat16}
    assert unquantized == {f"{pattern}.weight" for pattern in excluded}


def test_given_architectures_stay() -> None:
    from modelopt.torch.export import model_utils

    model = nemotron_h_tiny()
    model.config.architectures = ["SomebodysModel"]
    with applied(ModelOptArchitecturesNone()):
        assert model_utils.is_multimodal_model(model) is False
    assert model.config.architectures == ["SomebodysModel"]


def test_a_modelopt_without_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt.torch.export import model_utils, quant_aware_conversion

    monkeypatch.delattr(quant_aware_conversion, "build_reverse_name_mapper")
    monkeypatch.delattr(model_utils, "is_multimodal_model")
    assert ModelOptNameSentinel().probe().status is Status.NOT_NEEDED
    assert ModelOptArchitecturesNone().probe().status is Status.NOT_NEEDED
