"""Norms, convolution, routing and the replaced layers against the modules that they stand in for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="no Triton, which comes with CUDA builds of torch")

from qat.quant.experts import sort_by_expert
from qat.quant.kernels import convolution, norm, routing
from tests.tiny_models import nemotron_h_tiny, token_ids

pytestmark = pytest.mark.gpu


def same(ours: Any, theirs: Any, inputs: list[Tensor], tolerance: float = 2e-4) -> None:
    """Values and gradients agree, float32."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    g = torch.randn_like(theirs)
    mine, wanted = torch.autograd.grad(ours, inputs, g), torch.autograd.grad(theirs, inputs, g)
    for own, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [64, 2688])
def test_rms_norm(width: int, cuda: torch.device) -> None:
    x = torch.randn(3, 7, width, device=cuda, requires_grad=True)
    w = torch.rand(width, device=cuda)
    same(norm.rms_norm(x, w, 1e-5), w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5), [x])


@pytest.mark.parametrize(("width", "group"), [(128, 64), (4096, 512), (96, 48)])
def test_gated_rms_norm(width: int, group: int, cuda: torch.device) -> None:
    x = torch.randn(2, 5, width, device=cuda, requires_grad=True)
    wide = torch.randn(2, 5, width + 32, device=cuda, requires_grad=True)
    w = torch.rand(width, device=cuda)
    gate = wide[..., :width]
    h = (x * F.silu(gate)).unflatten(-1, (-1, group))
    expected = w * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2)
    same(norm.gated_rms_norm(x, gate, w, group, 1e-5), expected, [x, wide])


@pytest.mark.parametrize("bias", [True, False])
def test_causal_convolution(bias: bool, cuda: torch.device) -> None:
    wide = torch.randn(2, 37, 200, device=cuda, requires_grad=True)
    x = wide[..., 24:180]
    w, b = torch.randn(156, 4, device=cuda), torch.randn(156, device=cuda) if bias else None
    expected = F.silu(F.conv1d(x.mT, w.unsqueeze(1), b, padding=3, groups=156)[..., :37]).mT
    same(convolution.causal_convolution(x, w, b), expected, [wide], 1e-3)


def test_routing(cuda: torch.device) -> None:
    hidden = torch.randn(50, 96, device=cuda, requires_grad=True)
    choice = torch.stack([torch.randperm(8)[:3] for _ in range(50)]).to(cuda)
    route = sort_by_expert(choice, 8)
    assert torch.equal(route.offsets.cpu().long(), torch.bincount(choice.cpu().reshape(-1), minlength=8).cumsum(0))
    same(routing.gather(hidden, route.token, route.place), hidden[route.token], [hidden])
    rows = torch.randn(150, 96, device=cuda, requires_grad=True)
    weights = torch.rand(50, 3, device=cuda, requires_grad=True)
    expected = (rows[route.place.view(-1)] * weights.view(-1, 1)).view(50, 3, -1).sum(1)
    same(routing.combine(rows, route.place, weights), expected, [rows, weights])


@pytest.mark.usefixtures("scan")
def test_replaced_layers_compute_the_same_network(cuda: torch.device) -> None:
    from qat.quant.kernels.nemotron_h import use_fast_layers_

    ids = token_ids(2, 64).to(cuda)
    gradients, losses = [], []
    for fast in (False, True):
        model = nemotron_h_tiny(dtype=torch.float32).to(cuda).train()
        model.requires_grad_(False)
        trained = model.model.layers[0].mixer.in_proj.weight.requires_grad_()
        if fast:
            assert use_fast_layers_(model) == (5, 1)
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, trained)[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)
    assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()
