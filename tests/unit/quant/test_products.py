"""Products with adapted weights and the experts around them, against float64 and the definition."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.quant.effective import Adapted
from qat.quant.experts import sort_by_expert
from qat.quant.lora import use_fast_experts_
from qat.quant.modelopt import calibrate, insert_quantizers, quantizers, quantizers_off
from qat.quant.products import _GradientOnTokens, computing, low_rank_pays, multiply, multiply_low_rank, ready
from tests.tiny_models import nemotron_h_tiny, qwen3_moe_tiny, token_ids
from tests.unit.quant.adapters import with_lora

ENDS = [8, 8, 29, 40]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


def exact(x: Tensor, w: Tensor) -> Tensor:
    """The product in float64, expert by expert."""
    if w.dim() == 2:
        return x.double() @ w.mT
    rows = [x[start:end].double() for start, end in pairwise([0, *ENDS])]
    return torch.cat([part @ each.mT for part, each in zip(rows, w, strict=True)])


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("fused", [True, False])
def test_products_and_their_gradients(fused: bool, rank: int) -> None:
    torch.manual_seed(rank)
    shape = (4,) if fused else ()
    w = torch.randn(*shape, 48, 64).bfloat16()
    a, b = torch.randn(*shape, rank, 64, requires_grad=True), torch.randn(*shape, 48, rank, requires_grad=True)
    x, g = torch.randn(40, 64).bfloat16().requires_grad_(), torch.randn(40, 48).bfloat16()
    offsets = torch.tensor(ENDS, dtype=torch.int32) if fused else None
    expected = exact(x, w.double() + 0.5 * b.double() @ a.double())
    gradients = torch.autograd.grad(expected, [x, a, b], g.double())
    adapted = Adapted(w, a, b, 0.5)
    a_16, b_16 = adapted.factors()
    ways: dict[str, Tensor] = {
        "formed": multiply(x, adapted, None, offsets),
        "low-rank": multiply_low_rank(x, adapted, offsets),
        "gradient on tokens": _GradientOnTokens.apply(x, adapted.merged().detach(), a_16, b_16, 0.5, offsets),
    }
    for name, y in ways.items():
        assert relative(y, expected.detach()) < 1e-2, name
        for own, other in zip(torch.autograd.grad(y, [x, a, b], g), gradients, strict=True):
            assert relative(own, other) < 1e-2, name


def test_a_bias_and_a_plain_weight() -> None:
    x, w, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    assert torch.equal(multiply(x, w, None, bias=bias), torch.nn.functional.linear(x, w, bias))


def test_low_rank_pays_where_it_moves_fewer_bytes() -> None:
    w = torch.empty(128, 1856, 2688, device="meta")
    # 4 * 1856 * 2688 / (10 * (1856 + 2688)) = 439.2 rows an expert
    assert low_rank_pays(128 * 439, w) and not low_rank_pays(128 * 440, w)


def test_sorting_by_expert_by_its_definition() -> None:
    choice = torch.stack([torch.randperm(6)[:2] for _ in range(9)])
    choice[choice == 4] = 5  # an expert without tokens, and one that is named twice
    routing = sort_by_expert(choice, 6)
    pairs = sorted((int(expert), token, slot) for token, row in enumerate(choice) for slot, expert in enumerate(row))
    assert routing.token.tolist() == [token for _, token, _ in pairs]
    assert [int(routing.place[token, slot]) for _, token, slot in pairs] == list(range(18))
    assert routing.offsets.tolist() == [sum(expert <= last for expert, _, _ in pairs) for last in range(6)]
    hidden, weights = torch.randn(9, 4), torch.rand(9, 2)
    rows = routing.gather(hidden)
    assert all(torch.equal(row, hidden[token]) for row, (_, token, _) in zip(rows, pairs, strict=True))
    for token, combined in enumerate(routing.combine(rows, weights)):
        torch.testing.assert_close(combined, hidden[token] * weights[token].sum())


def test_a_quantizer_computes_what_is_put_in_its_place_and_is_still_seen() -> None:
    model = nemotron_h_tiny()
    insert_quantizers(model, "all", model.config.to_dict())
    quantizer = quantizers(model)["backbone.layers.0.mixer.in_proj"].weight
    assert ready(quantizer)
    quantizer.enable_calib()
    assert not ready(quantizer)
    quantizer.disable_calib()
    calibrate(model, lambda network: network(input_ids=token_ids()))
    seen: list[int] = []
    quantizer.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(4, 64)
    with computing(quantizer, lambda own, amax: own + amax):
        assert torch.equal(quantizer(x), x + quantizer._amax)
    assert not torch.equal(quantizer(x), x + quantizer._amax)
    assert len(seen) == 2
    with quantizers_off(model):
        assert not ready(quantizer)


@pytest.mark.parametrize("build", [nemotron_h_tiny, qwen3_moe_tiny])
def test_fast_experts_compute_the_same_layer(build: Any) -> None:
    ids, found = token_ids(), []
    for fast in (False, True):
        model = with_lora(build(dtype=torch.float32))
        if fast:
            assert use_fast_experts_(model) == 2
        for training in (False, True):  # with the formed weight, and low-rank
            logits = model.train(training)(input_ids=ids).logits
            found.append((fast, training, logits.detach()))
        logits.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        found.append((fast, "gradients", torch.cat([gradient.flatten() for gradient in gradients])))
    for plain, ours in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(ours[2], plain[2], rtol=1e-3, atol=1e-3)
