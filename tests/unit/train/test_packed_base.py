from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from qat.errors import UserError
from qat.quant import packed
from qat.quant.nvfp4 import Packed
from qat.quant.packed import PackedWeight, packed_modules, through_nvfp4
from qat.recipe.schema import AdapterBlock
from qat.train import packed_base
from qat.train.adapters import attach_adapter, use_effective_weights_
from qat.train.base import group_experts_, load_base
from qat.train.packed_base import load_packed_base
from tests.tiny_models import nemotron_h_tiny, qwen3_moe_tiny, qwen3_tiny, save_tiny, token_ids


def _modules(folder: Path) -> list[str]:
    return packed_modules([], json.loads((folder / "config.json").read_text(encoding="utf-8")))


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("build", [nemotron_h_tiny, qwen3_moe_tiny, qwen3_tiny])
def test_it_is_the_base_with_packed_weights(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    """Transformers' own loader is the oracle, for names, dtypes, values and logits."""
    save_tiny(tmp_path, build())
    modules = _modules(tmp_path)
    four, plain = load_packed_base(tmp_path, modules), load_base(tmp_path)
    found, expected = _tensors(four), _tensors(plain)
    assert found.keys() == expected.keys()
    assert sum(isinstance(tensor, PackedWeight) for tensor in found.values()) == len(modules)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert not found[name].requires_grad
        if isinstance(found[name], PackedWeight):
            tensor.data.copy_(through_nvfp4(tensor))
            assert torch.equal(found[name].to_dense(), tensor), name
        else:
            assert torch.equal(found[name], tensor), name
    group_experts_(plain)
    assert not four.training
    ids = token_ids().to(plain.device)
    with torch.no_grad():
        assert torch.equal(four(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_never_more_than_one_module_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lifetimes of what is read: the largest sum alive at once is that of one expert and of the tensors that stay."""
    save_tiny(tmp_path, nemotron_h_tiny())
    modules = _modules(tmp_path)
    alive, peak = 0, 0
    read = packed_base._Files.read

    def counted(self: packed_base._Files, name: str) -> torch.Tensor:
        nonlocal alive, peak
        tensor = read(self, name)
        size = tensor.numel() * tensor.element_size()
        alive += size
        peak = max(peak, alive)

        def gone() -> None:
            nonlocal alive
            alive -= size

        weakref.finalize(tensor, gone)
        return tensor

    monkeypatch.setattr(packed_base._Files, "read", counted)
    model = load_packed_base(tmp_path, modules)
    kept = sum(
        tensor.numel() * tensor.element_size()
        for tensor in _tensors(model).values()
        if not isinstance(tensor, PackedWeight)
    )
    largest = max(tensor.numel() * 2 for tensor in _tensors(model).values() if tensor.dim() == 2)
    everything = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(model).values())
    assert peak <= kept + 2 * largest < 0.8 * everything


def test_a_checkpoint_that_lacks_something(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path, nemotron_h_tiny())
    modules = _modules(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name, problem in (
        ("backbone.layers.1.mixer.experts.3.up_proj.weight", "missing"),
        ("backbone.layers.0.mixer.in_proj.weight", "not in the checkpoint"),
        ("backbone.layers.0.mixer.D", "missing"),
    ):
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, path, metadata={"format": "pt"})
        with pytest.raises(UserError) as caught:
            load_packed_base(tmp_path, modules)
        assert problem in str(caught.value)
    changed = {**tensors, "backbone.layers.0.mixer.in_proj.weight": torch.zeros(16, 64).bfloat16()}
    save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not fit its own"):
        load_packed_base(tmp_path, modules)


def test_a_model_type_without_known_names(tmp_path: Path) -> None:
    save_tiny(tmp_path, qwen3_tiny())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}), encoding="utf-8")
    with pytest.raises(UserError, match="not known"):
        load_packed_base(tmp_path, [])


def test_a_step_unpacks_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lifetimes of the storages that unpacking makes, over a forward and backward with gradient checkpointing."""
    save_tiny(tmp_path, nemotron_h_tiny())
    model, _ = attach_adapter(
        load_packed_base(tmp_path, _modules(tmp_path)),
        AdapterBlock(rank=4, alpha=8.0, targets=("attention", "routed_experts")),
        "nemotron_h",
        0,
    )
    use_effective_weights_(model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    alive, peak, calls = 0, 0, 0
    unpack = packed._unpack

    def counted(weight: Packed, dtype: torch.dtype) -> torch.Tensor:
        nonlocal alive, peak, calls
        made = unpack(weight, dtype)
        size = made.untyped_storage().nbytes()
        alive, calls = alive + size, calls + 1
        peak = max(peak, alive)

        def gone() -> None:
            nonlocal alive
            alive -= size

        weakref.finalize(made.untyped_storage(), gone)
        return made

    monkeypatch.setattr(packed, "_unpack", counted)
    model(input_ids=token_ids().to(model.device)).logits.float().square().sum().backward()
    layers: dict[str, int] = {}
    for name, tensor in model.named_parameters():
        if isinstance(tensor, PackedWeight):
            layer = name.split("layers.")[1].split(".")[0]
            layers[layer] = layers.get(layer, 0) + 2 * tensor.numel()
    assert calls > len(_modules(tmp_path)) and alive == 0
    assert 0 < peak <= max(layers.values()) < 0.5 * sum(layers.values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
