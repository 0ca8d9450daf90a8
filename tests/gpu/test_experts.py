"""Adapted, quantized experts on a GPU: the same layer as on the CPU, and every factor's gradient."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.patches.guard import watch
from qat.quant.effective import Adapted
from qat.quant.lora import use_fast_experts_
from qat.quant.modelopt import calibrate, insert_quantizers, quantizers, quantizers_off
from qat.quant.products import multiply, multiply_low_rank
from tests.tiny_models import nemotron_h_tiny, qwen3_moe_tiny, token_ids
from tests.unit.quant.adapters import with_lora

pytestmark = pytest.mark.gpu

BUILDERS = [nemotron_h_tiny, qwen3_moe_tiny]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double().cpu() - theirs.double().cpu()).norm() / theirs.double().norm().cpu())


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids).loss.backward()
    return {
        name: parameter.grad.clone().cpu() for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_on_tokens_are_those_of_the_dense_way(fused: bool, rank: int, cuda: torch.device) -> None:
    shape = (4,) if fused else ()
    w = torch.randn(*shape, 48, 64, device=cuda).bfloat16()
    a = torch.randn(*shape, rank, 64, device=cuda, requires_grad=True)
    b = torch.randn(*shape, 48, rank, device=cuda, requires_grad=True)
    x = torch.randn(40, 64, device=cuda).bfloat16().requires_grad_()
    offsets = torch.tensor([8, 8, 29, 40], dtype=torch.int32, device=cuda) if fused else None
    g = torch.randn(40, 48, device=cuda).bfloat16()
    adapted = Adapted(w, a, b, 0.5)
    dense_w = w.double() + 0.5 * b.double() @ a.double()
    if fused:
        parts = [
            x[s:e].double() @ each.mT for (s, e), each in zip(pairwise([0, *offsets.tolist()]), dense_w, strict=True)
        ]
        exact = torch.cat(parts)
    else:
        exact = x.double() @ dense_w.mT
    expected = torch.autograd.grad(exact, [x, a, b], g.double())
    for y in (multiply(x, adapted, None, offsets), multiply_low_rank(x, adapted, offsets)):
        assert relative(y, exact) < 2e-2
        for own, other in zip(torch.autograd.grad(y, [x, a, b], g), expected, strict=True):
            assert relative(own, other) < 2e-2


@pytest.mark.parametrize("build", BUILDERS)
def test_the_quantized_student_is_the_cpus(build: Any, cuda: torch.device) -> None:
    ids = token_ids()
    model = with_lora(build())
    insert_quantizers(model, "all", model.config.to_dict())
    calibrate(model, lambda network: network(input_ids=ids))
    model.train()
    here = gradients(model, ids)
    model.to(cuda)
    with watch(model) as seen:
        there = gradients(model, ids.to(cuda))
    seen.require()
    assert len(seen.quantizer_calls) == 2 * len(quantizers(model))
    assert set(here) == set(there)
    # Another order of summation flips single codes and single expert choices; a wrong formula changes everything.
    similarity = [torch.nn.functional.cosine_similarity(here[n].view(-1), there[n].view(-1), dim=0) for n in here]
    assert torch.stack(similarity).median() > 0.9
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    again = gradients(model, ids.to(cuda))
    for name, gradient in there.items():
        assert torch.equal(again[name], gradient), name


@pytest.mark.parametrize("build", BUILDERS)
def test_quantizers_off_is_the_plain_network(build: Any, cuda: torch.device) -> None:
    ids = token_ids().to(cuda)
    plain = build().to(cuda)
    model = with_lora(build()).to(cuda)
    insert_quantizers(model, "all", model.config.to_dict())
    calibrate(model, lambda network: network(input_ids=ids))
    with torch.no_grad(), quantizers_off(model), model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("build", BUILDERS)
def test_fast_plain_experts(build: Any, cuda: torch.device) -> None:
    ids = token_ids().to(cuda)
    model = with_lora(build()).to(cuda).train()
    before = gradients(model, ids)
    assert use_fast_experts_(model) == 2
    after = gradients(model, ids)
    similarity = [torch.nn.functional.cosine_similarity(before[n].view(-1), after[n].view(-1), dim=0) for n in before]
    assert torch.stack(similarity).min() > 0.9 and torch.stack(similarity).median() > 0.99
    with watch(model) as seen:
        gradients(model, ids)
    seen.require(quantizers=False)
