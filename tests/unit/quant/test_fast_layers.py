"""The replaced layers of Nemotron-H, with torch in the kernels' place: the same network as Transformers' own.

The kernels themselves are tested on a GPU (tests/gpu).
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.quant.kernels import nemotron_h
from tests.tiny_models import nemotron_h_tiny, token_ids


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    channels, taps = weight.shape
    return F.silu(F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=taps - 1, groups=channels)[..., : x.shape[1]]).mT


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * F.rms_norm(x, (x.shape[-1],), eps=eps)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    return weight * F.rms_norm((x * F.silu(gate)).unflatten(-1, (-1, group_size)), (group_size,), eps=eps).flatten(-2)


@pytest.fixture
def torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    kernels = {
        "convolution": SimpleNamespace(causal_convolution=convolution),
        "norm": SimpleNamespace(rms_norm=norm, gated_rms_norm=gated_norm),
    }
    for name, module in kernels.items():
        monkeypatch.setitem(sys.modules, f"qat.quant.kernels.{name}", module)
    monkeypatch.setattr(nemotron_h, "_scan", lambda: mamba2_chunk_scan)


def loss_and_gradients(model: Any, names: list[str]) -> list[Tensor]:
    ids = token_ids()
    loss = model(input_ids=ids, labels=ids).loss
    return [loss, *torch.autograd.grad(loss, [model.get_parameter(name) for name in names])]


def test_the_same_network(torch_kernels: None) -> None:
    names = ["model.layers.0.mixer.in_proj.weight", "model.layers.0.mixer.out_proj.weight", "model.embeddings.weight"]
    found, called = [], []
    for fast in (False, True):
        model = nemotron_h_tiny(dtype=torch.float32).train().requires_grad_(False)
        torch.nn.init.normal_(model.model.layers[0].mixer.norm.weight, generator=torch.Generator().manual_seed(1))
        for name in names:
            model.get_parameter(name).requires_grad_()
        if fast:
            assert nemotron_h.use_fast_layers_(model) == (5, 1)
            model.model.layers[0].mixer.out_proj.register_forward_hook(lambda *_: called.append(1))
        found.append(loss_and_gradients(model, names))
    assert called, "out_proj runs as a module"
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_trained_weights_padding_and_caches_take_transformers_way(
    torch_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("convolution", "norm"):
        monkeypatch.setitem(sys.modules, f"qat.quant.kernels.{module}", None)  # importing it now raises
    model = nemotron_h_tiny(dtype=torch.float32)
    nemotron_h.use_fast_layers_(model)
    model(input_ids=token_ids())  # every weight is trained
    with torch.no_grad(), pytest.raises(ImportError):
        model(input_ids=token_ids())  # validation measures what the network loaded from its files gives
    model.requires_grad_(False)
    with pytest.raises(ImportError):
        model(input_ids=token_ids())
    mixer = model.model.layers[0].mixer
    hidden, mask = torch.randn(1, 5, 64), torch.tensor([[0, 1, 1, 1, 1]])
    assert mixer(hidden, attention_mask=mask).shape == (1, 5, 64)


def test_other_models_stay_as_they_are() -> None:
    assert nemotron_h.use_fast_layers_(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.RMSNorm(2))) == (0, 0)
