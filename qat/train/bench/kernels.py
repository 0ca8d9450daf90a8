"""Single kernels of the training step at the 30B model's shapes, beside what they stand in for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.train.bench import arms as ways

EXPERTS, OUT, IN, RANK, SLOTS = 128, 1856, 2688, 16, 6


class Case(NamedTuple):
    """One measurement.

    Attributes:
        name: What is computed.
        run: Computes it.
        gigabytes: The least that must be read and written, 1e9 bytes; 0 where arithmetic is the limit.
    """

    name: str
    run: Callable[[], Any]
    gigabytes: float


def milliseconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median time of one call, by events, after two that do not count."""
    for _ in range(2):
        run()
    taken: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end))
    return median(taken)


def weight_cases() -> Iterator[Case]:
    """One expert tensor (128, 1856, 2688) in BF16: 1.28 GB."""
    from qat.quant import nvfp4
    from qat.quant.kernels import nvfp4 as kernels
    from qat.quant.packed import pack

    w = torch.randn(EXPERTS, OUT, IN, device="cuda", dtype=torch.bfloat16) * 0.02
    a = torch.randn(EXPERTS, RANK, IN, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(EXPERTS, OUT, RANK, device="cuda", dtype=torch.bfloat16) * 1e-3
    amax = w.abs().amax((1, 2)).float()
    both = 4e-9 * w.numel()
    yield Case("weight: copy", w.clone, both)
    packed = pack(w)
    yield Case("weight: unpack from NVFP4", lambda: nvfp4.dequantize(packed, w.dtype), 2.5625e-9 * w.numel())
    yield Case("weight: fake-quantize", lambda: nvfp4.fake_quant_weight(w, amax), both)
    yield Case("weight: W + sBA, torch.baddbmm", lambda: torch.baddbmm(w, b, a, alpha=2.0), both)
    yield Case("weight: W + sBA", lambda: kernels.effective_weight(w, a, b, 2.0), both)
    yield Case("weight: W + sBA, fake-quantized", lambda: kernels.effective_weight(w, a, b, 2.0, amax), both)


def token_cases(rows_per_expert: int) -> Iterator[Case]:
    """Adapted experts on so many rows each: forward and backward, formed against low-rank, on tokens against dense."""
    from qat.quant.effective import Adapted
    from qat.quant.products import multiply, multiply_low_rank, product

    rows = EXPERTS * rows_per_expert
    w = torch.randn(EXPERTS, OUT, IN, device="cuda", dtype=torch.bfloat16) * 0.02
    a = torch.randn(EXPERTS, RANK, IN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    b = (torch.randn(EXPERTS, OUT, RANK, device="cuda", dtype=torch.bfloat16) * 1e-3).requires_grad_()
    x = torch.randn(rows, IN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    g = torch.randn(rows, OUT, device="cuda", dtype=torch.bfloat16)
    offsets = torch.arange(1, EXPERTS + 1, device="cuda", dtype=torch.int32) * rows_per_expert
    adapted = Adapted(w, a, b, 2.0)
    ways: dict[str, Callable[[], Tensor]] = {
        "frozen weight": lambda: product(x, w, offsets),
        "formed, gradient on tokens": lambda: multiply(x, adapted, None, offsets),
        "formed, dense gradient": lambda: product(x, torch.baddbmm(w, b, a, alpha=2.0), offsets),
        "low-rank": lambda: multiply_low_rank(x, adapted, offsets),
    }
    for name, way in ways.items():
        yield Case(f"{rows_per_expert} rows an expert: {name}, forward", _without_gradient(way), 0.0)
        yield Case(f"{rows_per_expert} rows an expert: {name}, forward + backward", _with_gradient(way, g), 0.0)


def layer_cases(tokens: int) -> Iterator[Case]:
    """Routing, activations, norms and convolution on so many tokens, by torch and by this package, with gradients."""
    from qat.quant import nvfp4
    from qat.quant.experts import sort_by_expert
    from qat.quant.kernels import convolution, norm, routing
    from qat.quant.kernels import nvfp4 as kernels

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    choice = torch.rand(tokens, EXPERTS, device="cuda").topk(SLOTS).indices
    route = sort_by_expert(choice, EXPERTS)
    weights = torch.rand(tokens, SLOTS, device="cuda").requires_grad_()
    hidden, rows, inner = leaf(tokens, IN), leaf(tokens * SLOTS, IN), leaf(tokens * SLOTS, OUT)
    amax = torch.tensor(10.0, device="cuda")
    flat = route.place.reshape(-1)

    def combine_in_torch() -> Tensor:
        return (rows * weights.reshape(-1, 1)[flat.argsort()])[flat].view(tokens, SLOTS, -1).sum(1).to(rows.dtype)

    def combine_by_index_add() -> Tensor:
        weighted = rows * weights.reshape(-1, 1)[flat.argsort()].to(rows.dtype)
        return torch.zeros_like(hidden).index_add(0, route.token, weighted)

    yield Case("routing: sort", lambda: sort_by_expert(choice, EXPERTS), 0.0)
    for name, way, like in (
        ("routing: gather, torch", lambda: hidden[route.token], rows),
        ("routing: gather", lambda: routing.gather(hidden, route.token, route.place), rows),
        ("routing: combine, torch", combine_in_torch, hidden),
        ("routing: combine, index_add", combine_by_index_add, hidden),
        ("routing: combine", lambda: routing.combine(rows, route.place, weights), hidden),
        ("relu2, torch", lambda: torch.relu(inner).square(), inner),
        ("relu2", lambda: kernels.relu2(inner), inner),
        ("relu2, quantized", lambda: kernels.relu2(inner, amax), inner),
    ):
        yield Case(f"{name}, forward", _without_gradient(way), 0.0)
        yield Case(f"{name}, forward + backward", _with_gradient(way, torch.randn_like(like)), 0.0)
    yield Case("activation: fake-quantize (tokens, 2688)", lambda: nvfp4.fake_quant_activation(hidden, amax), 0.0)
    length = 2048
    wide = leaf(tokens // length, length, 10304)
    w, bias = torch.randn(6144, 4, device="cuda").bfloat16(), torch.randn(6144, device="cuda").bfloat16()
    mixed, gate = wide[..., 4096:10240], wide[..., :4096]
    scanned, scale = leaf(tokens // length, length, 4096), torch.rand(4096, device="cuda").bfloat16()
    plain = torch.rand(IN, device="cuda").bfloat16()

    def torch_convolution() -> Tensor:
        return F.silu(F.conv1d(mixed.mT, w.unsqueeze(1), bias, padding=3, groups=6144)[..., :length]).mT

    def torch_norm() -> Tensor:
        x = hidden.float()
        return (plain.float() * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))).to(hidden.dtype)

    for name, way in (
        ("convolution, torch", torch_convolution),
        ("convolution", lambda: convolution.causal_convolution(mixed, w, bias)),
        ("gated norm", lambda: norm.gated_rms_norm(scanned, gate, scale, 512, 1e-5)),
        ("norm, torch", torch_norm),
        ("norm", lambda: norm.rms_norm(hidden, plain, 1e-5)),
    ):
        yield Case(f"{name}, forward", _without_gradient(way), 0.0)
        yield Case(f"{name}, forward + backward", _with_gradient(way, torch.randn_like(way())), 0.0)


def module_cases(tokens: int) -> Iterator[Case]:
    """The quantized, adapted experts of one layer, forward and backward: as they are, and through `torch.compile`."""
    from peft.tuners.lora.layer import ParamWrapper

    model = ways.with_lora(ways.network(expert_layer(), checkpointing=False), [], ways.EXPERTS)
    ways.quantize(model, torch.randint(0, 512, (1, 2048), device="cuda"))
    experts = next(module for module in model.modules() if isinstance(module, ParamWrapper))
    hidden = torch.randn(tokens, IN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    choice = torch.rand(tokens, EXPERTS, device="cuda").topk(SLOTS).indices
    weights, gradient = torch.rand(tokens, SLOTS, device="cuda"), torch.randn_like(hidden)
    for name, call in (("as they are", experts), ("torch.compile", torch.compile(experts))):
        way = partial(call, hidden, choice, weights)
        yield Case(
            f"experts, NVFP4, LoRA, {tokens} tokens: {name}, forward + backward", _with_gradient(way, gradient), 0.0
        )


def expert_layer() -> Any:
    """The configuration of one layer of experts."""
    from transformers import NemotronHConfig

    return NemotronHConfig(
        vocab_size=512,
        hidden_size=IN,
        layers_block_type=["moe"],
        n_routed_experts=EXPERTS,
        num_experts_per_tok=SLOTS,
        moe_intermediate_size=OUT,
        moe_shared_expert_intermediate_size=2 * OUT,
        use_cache=False,
    )


def _without_gradient(way: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return way()

    return run


def _with_gradient(way: Callable[[], Tensor], g: Tensor) -> Callable[[], None]:
    def run() -> None:
        way().backward(g)

    return run
