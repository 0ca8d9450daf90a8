from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from qat.errors import UserError
from qat.receipt import sha256_file
from qat.recipe.schema import BaseBlock
from qat.train import base
from qat.train.base import base_sha256, load_base, load_tokenizer, require_suitable, resolve_base
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


def test_large_weights_are_hashed_once_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(base, "sha256_file", counted)
    monkeypatch.setattr(base, "_REMEMBERED_FROM", 2)
    for name, content in (("a.safetensors", b"weights"), ("b.safetensors", b"x")):
        (tmp_path / name).write_bytes(content)
    first = base_sha256(tmp_path)
    assert base_sha256(tmp_path) == first and sorted(read) == [*["a.safetensors"] * 2, *["b.safetensors"] * 2]
    monkeypatch.setattr(base, "_SETTLED_NS", -1)  # as if they had lain there for long
    assert base_sha256(tmp_path) == base_sha256(tmp_path) == first
    assert sorted(read[4:]) == ["a.safetensors", "b.safetensors", "b.safetensors"]
    (tmp_path / "a.safetensors").write_bytes(b"Weights")
    os.utime(tmp_path / "a.safetensors", ns=(1, 1))
    assert base_sha256(tmp_path) != first


def test_a_loaded_base_is_frozen_bf16_and_whole(small: Small) -> None:
    model = load_base(small.base)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    original = nemotron_h_tiny().state_dict()
    assert all(torch.equal(tensor.cpu(), original[name]) for name, tensor in model.state_dict().items())


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


def test_a_base_that_says_that_it_is_not_quantized(small: Small, tmp_path: Path) -> None:
    config = json.loads((small.base / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": None}), encoding="utf-8")
    require_suitable(tmp_path, BaseBlock(model=str(tmp_path), family="nemotron_h"))


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
def test_a_quantized_base(small: Small, tmp_path: Path, where: str) -> None:
    """It is said by the configuration, before a weight is read: NVIDIA publishes the same model in three precisions."""
    config = json.loads((small.base / "config.json").read_text(encoding="utf-8"))
    if where == "config.json":
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    else:
        (tmp_path / where).write_text("{}", encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="quantized already") as caught:
        resolve_base(BaseBlock(model=str(tmp_path), family="nemotron_h"))
    assert caught.value.value == ("modelopt, FP8" if where == "config.json" else None)
    assert "BF16" in caught.value.remedy


def test_shards_without_a_sound_index(small: Small, tmp_path: Path) -> None:
    """One of two shards, carried without the index, would pass for a whole checkpoint."""
    (tmp_path / "config.json").write_bytes((small.base / "config.json").read_bytes())
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes((small.base / "model.safetensors").read_bytes())
    block = BaseBlock(model=str(tmp_path), family="nemotron_h")
    with pytest.raises(UserError, match="index is missing"):
        resolve_base(block)
    for damaged in ("{", "[]", '{"weight_map": 3}', "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(UserError, match="index of the weight files is damaged"):
            resolve_base(block)


def test_weights_of_other_shapes(small: Small, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in small.base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = "backbone.layers.2.mixer.q_proj.weight"
    save_file(tensors | {name: tensors[name][:8].contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="does not fit its own config") as caught:
        load_base(tmp_path)
    assert "mismatched_keys: 1" in str(caught.value.value) and "q_proj" in str(caught.value.value)
