"""Counts of numbers and operations against figures found elsewhere: published, counted by torch, or by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qat.plan.shape import CARDS
from qat.plan.work import Step, read_network
from qat.train.shapes import low_rank_pays

NANO: dict[str, Any] = json.loads((CARDS / "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.json").read_text())["config"]
DENSE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def test_nano_has_the_size_that_was_built_on_a_gpu() -> None:
    network = read_network(NANO)
    assert network.parameters / 1e9 == pytest.approx(31.58, abs=0.005)  # 31.58 G, built by transformers 5.17
    assert network.active_parameters / 1e9 == pytest.approx(3.2, abs=0.05)  # "A3B"; 3.2 G without the embedding


def test_nano_adapters_have_the_numbers_that_peft_made() -> None:
    network = read_network(NANO)
    attention = sum(weight.factors(16) for weight in network.named(["attention"]))
    experts = sum(weight.factors(16) for weight in network.named(["attention", "routed_experts"]))
    assert (attention, experts) == (1_867_776, 429_948_928)


def test_a_dense_forward_by_hand() -> None:
    """Two layers: q 64x64, k and v 64x32, o 64x64, three of 64x96; the output layer 64x512 at the targets."""
    work = read_network(DENSE).work(Step(tokens=10, length=5, targets=3, backward=False))
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    attention = 2 * 10 * 2 * 2 * 64 * 5 / 2  # layers, tokens, two products, multiply-add, heads x size, mean look-back
    assert work.flops == 2 * 10 * 2 * layer + attention + 3 * 2 * 64 * 512
    assert work.streamed == 2 * (2 * layer + 64 * 512) and work.block_passes == 2 and work.made == 0


def test_passes_of_a_training_step() -> None:
    network = read_network(DENSE)
    once = network.work(Step(10, 5, 0, backward=False))
    plain, recomputed = network.work(Step(10, 5, 0)), network.work(Step(10, 5, 0, checkpointing=True))
    assert plain.flops == 2 * once.flops and recomputed.flops == 3 * once.flops
    assert (plain.block_passes, recomputed.block_passes) == (4, 6)


def test_formed_weights_cost_their_traffic_and_a_dense_gradient_a_product() -> None:
    network = read_network(DENSE)
    up = {weight.name for weight in network.weights if weight.name.endswith("up_proj")}
    plain = network.work(Step(10, 5, 0))
    formed = network.work(Step(10, 5, 0, adapted=up))
    assert formed.flops == plain.flops and formed.made == 2 * 64 * 96 * 4 and formed.weight_passes == 0
    dense = network.work(Step(10, 5, 0, adapted=up, route="dense"))
    assert dense.flops - plain.flops == 2 * 10 * 2 * 64 * 96 and dense.made == 2 * 64 * 96 * (4 + 6)


def test_the_cheapest_route_is_chosen_as_training_chooses_it() -> None:
    import torch

    from qat.quant.products import low_rank_pays as rule

    network = read_network(NANO)
    weight = next(weight for weight in network.weights if weight.name.endswith("experts.up_proj"))
    matrix = torch.empty(weight.matrices, weight.out_features, weight.in_features, device="meta")
    for rows in (1_000, 50_000, 56_000, 57_000, 500_000):
        assert low_rank_pays(rows, weight) == rule(rows, matrix)
    few, many = (network.work(Step(t, t, 0, adapted={weight.name}, route="cheapest")) for t in (1_000, 100_000))
    assert few.weight_passes == many.weight_passes == 2  # one expert weight, forward and backward
    assert few.made == 10 * 6 * 1_000 * (1856 + 2688) and many.made == 4 * 128 * 1856 * 2688


def test_few_tokens_do_not_read_all_experts() -> None:
    network = read_network(NANO)
    one, many = (network.work(Step(tokens, 1, 0, backward=False)).streamed for tokens in (1, 10_000))
    assert one == pytest.approx(2 * network.active_parameters, rel=0.02)
    assert many == pytest.approx(2 * (network.parameters - 131072 * 2688), rel=1e-3)


def test_operations_are_those_that_torch_counts() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tests.tiny_models import qwen3_tiny, token_ids

    model = qwen3_tiny()
    model.set_attn_implementation("eager")  # torch's counter does not see inside a CPU's fused attention
    ids = token_ids(batch=2, length=24)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    network = read_network(model.config.to_dict())
    step = Step(tokens=48, length=24, targets=48, backward=False)
    work = network.work(step)
    # Eager attention computes the whole square, of which a causal one needs half.
    assert counter.get_total_flops() == work.flops + 48 * network.mixing_per_position * 24 / 2


def test_parameters_are_those_of_transformers_models() -> None:
    from tests.tiny_models import nemotron_h_tiny, qwen3_moe_tiny, qwen3_tiny

    for build in (nemotron_h_tiny, qwen3_tiny, qwen3_moe_tiny):
        model = build()
        matrices = sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if parameter.dim() >= 2 and "conv1d" not in name
        )
        assert read_network(model.config.to_dict()).parameters == matrices, build.__name__
