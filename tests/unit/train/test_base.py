from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qat.errors import UserError
from qat.recipe.schema import BaseBlock
from qat.train.base import base_sha256, load_base, load_tokenizer, resolve_base
from tests.tiny_models import nemotron_h_tiny
from tests.unit.train.conftest import Small


def test_a_folder(small: Small) -> None:
    assert resolve_base(BaseBlock(model=str(small.base), family="nemotron_h")) == small.base


def test_another_family(small: Small) -> None:
    with pytest.raises(UserError, match="no qwen model"):
        resolve_base(BaseBlock(model=str(small.base), family="qwen"))


@pytest.mark.parametrize("model", ["nobody/has-this-model", "/no/such/folder", "no_such_name"])
def test_what_is_not_here(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError) as caught:
        resolve_base(BaseBlock(model=model))
    assert caught.value.where == "base.model" and caught.value.value == model and caught.value.remedy


def test_incomplete_folders(tmp_path: Path) -> None:
    block = BaseBlock(model=str(tmp_path))
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_base(block)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is no JSON"):
        resolve_base(block)
    (tmp_path / "config.json").write_text('{"model_type": "nemotron_h"}', encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no safetensors"):
        resolve_base(block)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 2 weight files"):
        resolve_base(block)


def test_the_hash_follows_the_weights_alone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = base_sha256(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert base_sha256(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert base_sha256(tmp_path) != before


def test_a_loaded_base_is_frozen_bf16_and_whole(small: Small) -> None:
    model = load_base(small.base)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    original = nemotron_h_tiny().state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())


def test_a_damaged_or_incomplete_base(small: Small, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in small.base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match="damaged"):
        load_base(tmp_path)
    weights.write_bytes(whole)
    tensors = {name: tensor for name, tensor in load_file(weights).items() if "in_proj" not in name}
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not fit its own config"):
        load_base(tmp_path)


def test_the_chat_template_of_the_recipe(small: Small, tmp_path: Path) -> None:
    template = tmp_path / "other.jinja"
    template.write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    tokenizer = load_tokenizer(BaseBlock(model=str(small.base), chat_template=str(template)), small.base)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False) == "w3"
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(BaseBlock(model=str(small.base), chat_template=str(tmp_path / "none")), small.base)
