from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qat.errors import UserError
from qat.train.base import load_base
from qat.train.full import MasterAdamW, save_model, train_all_
from tests.tiny_models import nemotron_h_tiny, qwen3_moe_tiny, qwen3_tiny, save_tiny


def _problem(dtype: torch.dtype) -> tuple[torch.nn.Parameter, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=generator).bfloat16()
    target = torch.randn(6, 5, generator=generator)
    return torch.nn.Parameter(weight.to(dtype)), target


def _step(parameter: torch.nn.Parameter, gradient: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()


def test_masters_follow_torch_s_adamw_on_float32_weights() -> None:
    """The oracle sees the same gradients on float32 weights; the network's weights are its own, rounded."""
    parameter, _ = _problem(torch.bfloat16)
    reference, target = _problem(torch.float32)
    optimizer = MasterAdamW([parameter], lr=1e-3, weight_decay=0.1)
    oracle = torch.optim.AdamW([reference], lr=1e-3, weight_decay=0.1)
    for _ in range(20):
        gradient = (parameter.detach().float() - target).bfloat16().float()
        _step(parameter, gradient, optimizer)
        _step(reference, gradient, oracle)
        master = optimizer.state[parameter]["master"]
        torch.testing.assert_close(master, reference.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(parameter.detach(), master.bfloat16())


def test_updates_below_the_last_bit_add_up() -> None:
    parameter = torch.nn.Parameter(torch.full((4,), 100.0).bfloat16())
    optimizer = MasterAdamW([parameter], lr=0.05)
    for _ in range(20):
        _step(parameter, torch.ones(4), optimizer)
    assert float(parameter.detach()[0]) == 99.0


def test_a_saved_state_goes_on_to_the_same_bits() -> None:
    def run(stop: int) -> torch.Tensor:
        parameter, target = _problem(torch.bfloat16)
        optimizer = MasterAdamW([parameter], lr=1e-2)
        for number in range(12):
            if number == stop:
                saved = optimizer.state_dict()
                parameter = torch.nn.Parameter(parameter.detach().clone())
                optimizer = MasterAdamW([parameter], lr=1.0)
                optimizer.load_state_dict(saved)
                assert optimizer.state[parameter]["master"].dtype == torch.float32
            _step(parameter, parameter.detach().float() - target, optimizer)
        return optimizer.state[parameter]["master"]

    assert torch.equal(run(-1), run(5))


def test_what_is_trained() -> None:
    model = nemotron_h_tiny()
    coverage = train_all_(model, ends=True)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.layers.1.mixer.gate.weight", "model.layers.3.mixer.gate.weight"]
    assert coverage.total - coverage.trainable == 2 * 8 * 64 and coverage.router_frozen == 2
    coverage = train_all_(model, ends=False)
    assert coverage.total - coverage.trainable == 2 * 8 * 64 + 2 * 512 * 64


def test_a_saved_model_is_loaded_as_it_was(tmp_path: Path) -> None:
    """Fused parameters come back to their experts, gate and up apart; other files come along."""
    for index, build in enumerate((nemotron_h_tiny, qwen3_moe_tiny)):
        base, out = tmp_path / f"base{index}", tmp_path / f"out{index}"
        save_tiny(base, build())
        (base / "tokenizer.json").write_text("{}", encoding="utf-8")
        model = load_base(base)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                parameter.add_(noise.to(parameter))
        save_model(model, base, out, base_sha256="digest")
        again = load_base(out)
        for (name, left), (_, right) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            assert torch.equal(left, right), name
        assert load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
        assert (out / "tokenizer.json").is_file() and not (tmp_path / f"out{index}.partial").exists()


def test_training_that_would_be_lost_is_an_error(tmp_path: Path) -> None:
    """A trained parameter that no tensor of the base holds: the written model would keep its old value."""
    base = save_tiny(tmp_path / "base")
    model = load_base(base)
    model.model.layers[0].register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(RuntimeError, match="1 trained parameters are no tensors of the base"):
        save_model(model, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_names_are_said_before_training() -> None:
    model = qwen3_tiny()
    model.config.model_type = "qwen2"
    with pytest.raises(UserError, match="not known"):
        train_all_(model, ends=True)
