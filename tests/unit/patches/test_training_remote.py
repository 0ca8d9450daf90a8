"""Repairs of the hub's modeling_nemotron_h.py, on a class with the same faults (the file itself is not shipped)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.patches.protocol import Patch, Status
from qat.patches.registry import ensure, find
from qat.patches.remote_mamba_ssm_import import rmsnorm_fn

INDEX_ADD, IDLE, IMPORT = "remote_index_add_dtype", "remote_dummy_expert", "remote_mamba_ssm_import"
IMPORT_BLOCK = """
try:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
except ImportError:
    raise ImportError("mamba-ssm is required by the Mamba model but cannot be imported")
"""


class Expert(nn.Module):
    """up, squared ReLU, down; in the dtype of the weights, or packed: uint8 outside, float32 inside, with dropout."""

    def __init__(self, dtype: torch.dtype, *, packed: bool = False) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, 4, dtype=dtype))
        self.down = nn.Parameter(torch.randn(4, 6, dtype=dtype))
        self.down_proj = nn.Module()
        storage = torch.zeros(12, dtype=torch.uint8) if packed else torch.zeros(4, 6, dtype=dtype)
        self.down_proj.register_buffer("weight", storage)

    def forward(self, x: Tensor) -> Tensor:
        if not x.dtype.is_floating_point:
            raise NotImplementedError("\"fused_dropout\" not implemented for 'Byte'")
        return torch.relu(x.to(self.up.dtype) @ self.up.T).square() @ self.down.T


def remote_class() -> Any:
    """The method with the faults of the file on the hub: a buffer in the weights' dtype, zeros in the storage dtype."""

    class NemotronHMOE(nn.Module):
        def __init__(self, experts: list[Expert]) -> None:
            super().__init__()
            self.experts = nn.ModuleList(experts)

        def moe(self, hidden_states: Tensor, topk_indices: Tensor, topk_weights: Tensor) -> Tensor:
            total = torch.zeros_like(hidden_states, dtype=topk_weights.dtype)
            for number in range(len(self.experts)):
                expert: Any = self.experts[number]
                tokens, slots = torch.where(topk_indices == number)
                if tokens.numel() > 0:
                    weighted = expert(hidden_states[tokens]) * topk_weights[tokens, slots].unsqueeze(-1)
                    total.index_add_(0, tokens, weighted)
                else:
                    dtype = expert.down_proj.weight.dtype
                    total = total + expert(torch.zeros_like(hidden_states[0]).unsqueeze(0).to(dtype))
            return total.type(hidden_states.dtype)

    return NemotronHMOE


@pytest.fixture
def patches() -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {defect.name: defect for defect in find(INDEX_ADD, IDLE, IMPORT)}
    yield found
    for patch in found.values():
        patch.revert()


@pytest.fixture
def moe_class(monkeypatch: pytest.MonkeyPatch, patches: dict[str, Any]) -> Any:
    """The class as `trust_remote_code` leaves it in the process."""
    return loaded("some_org", monkeypatch)


def loaded(organisation: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    name = f"transformers_modules.{organisation}.revision.modeling_nemotron_h"
    module: Any = ModuleType(name)
    module.NemotronHMOE = remote_class()
    monkeypatch.setitem(sys.modules, name, module)
    return module.NemotronHMOE


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Three tokens, two experts each of three; the fourth expert gets none."""
    torch.manual_seed(0)
    chosen = torch.tensor([[0, 1], [2, 1], [0, 2]])
    return torch.randn(3, 4, dtype=dtype), chosen, torch.rand(3, 2).to(dtype)


def one_by_one(layer: Any, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Each token through each of its experts, summed in float64."""
    rows = []
    for token, numbers, shares in zip(tokens, chosen.tolist(), weights, strict=True):
        outputs = [layer.experts[number](token[None])[0].double() for number in numbers]
        rows.append(sum((share.double() * output for share, output in zip(shares, outputs, strict=True))))
    return torch.stack(rows)


def test_float32_experts_over_bf16_weights(moe_class: Any, patches: dict[str, Any]) -> None:
    layer, case = moe_class([Expert(torch.float32) for _ in range(3)]), inputs(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"self \(BFloat16\) and source \(Float\) must have the same scalar type"):
        layer.moe(*case)
    assert patches[INDEX_ADD].probe().status is Status.NEEDED
    patches[INDEX_ADD].apply()
    assert patches[INDEX_ADD].probe().status is Status.APPLIED
    output = layer.moe(*case)
    assert output.dtype is torch.bfloat16
    # One rounding to BF16 (8 bits) of the exact sum.
    torch.testing.assert_close(output.double(), one_by_one(layer, *case), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("order", [(INDEX_ADD, IDLE), (IDLE, INDEX_ADD)])
def test_packed_experts_one_of_them_idle(moe_class: Any, patches: dict[str, Any], order: tuple[str, str]) -> None:
    layer, case = moe_class([Expert(torch.float32, packed=True) for _ in range(4)]), inputs(torch.bfloat16)
    patches[INDEX_ADD].apply()
    with pytest.raises(NotImplementedError, match="fused_dropout"):
        layer.moe(*case)
    patches[INDEX_ADD].revert()
    for name in order:
        patches[name].apply()
    assert all(patches[name].probe().status is Status.APPLIED for name in order)
    torch.testing.assert_close(layer.moe(*case).double(), one_by_one(layer, *case), rtol=2**-8, atol=1e-6)
    # Each comes off alone.
    patches[order[0]].revert()
    assert patches[order[0]].probe().status is Status.NEEDED
    assert patches[order[1]].probe().status is Status.APPLIED


def test_an_idle_float32_expert_does_not_widen_the_sum(moe_class: Any, patches: dict[str, Any]) -> None:
    experts = [Expert(torch.float32), *(Expert(torch.bfloat16) for _ in range(3))]
    tokens, chosen, weights = inputs(torch.bfloat16)
    layer = moe_class(experts)
    with pytest.raises(RuntimeError, match=r"self \(Float\) and source \(BFloat16\)"):
        layer.moe(tokens, chosen + 1, weights)
    patches[IDLE].apply()
    assert layer.moe(tokens, chosen + 1, weights).dtype is torch.bfloat16


def test_nothing_changes_where_nothing_is_wrong(moe_class: Any, patches: dict[str, Any]) -> None:
    layer, case = moe_class([Expert(torch.float32) for _ in range(4)]), inputs(torch.float32)
    before = layer.moe(*case)
    for name in (INDEX_ADD, IDLE):
        patches[name].apply()
    assert torch.equal(layer.moe(*case), before)
    # An idle expert stays in the graph: distributed training waits for its gradient.
    layer.moe(*case).sum().backward()
    idle = layer.experts[3].up.grad
    assert idle is not None and not idle.any()


def test_a_class_that_is_loaded_later(moe_class: Any, patches: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    patches[INDEX_ADD].apply()
    second = loaded("another_org", monkeypatch)
    assert patches[INDEX_ADD].probe().status is Status.NEEDED
    patches[INDEX_ADD].apply()
    assert patches[INDEX_ADD].probe().status is Status.APPLIED
    patches[INDEX_ADD].revert()
    for cls in (moe_class, second):
        with pytest.raises(RuntimeError, match="same scalar type"):
            cls([Expert(torch.float32) for _ in range(3)]).moe(*inputs(torch.bfloat16))


def test_without_remote_code_nobody_can_tell(patches: dict[str, Any]) -> None:
    for name in (INDEX_ADD, IDLE):
        assert patches[name].probe().status is Status.CANNOT_TELL


def test_ensure_before_and_after_loading(
    patches: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [entry["after"] for entry in ensure(INDEX_ADD, IDLE)] == ["cannot_tell", "cannot_tell"]
    layer = loaded("some_org", monkeypatch)([Expert(torch.float32, packed=True) for _ in range(4)])
    assert [entry["after"] for entry in ensure(INDEX_ADD, IDLE)] == ["applied", "applied"]
    layer.moe(*inputs(torch.bfloat16))


def test_the_import_of_the_remote_file(patches: dict[str, Patch]) -> None:
    from importlib.util import find_spec

    if find_spec("mamba_ssm") is not None:
        pytest.skip("mamba-ssm is installed, so the import works")
    with pytest.raises(ImportError, match="mamba-ssm is required by the Mamba model"):
        exec(IMPORT_BLOCK, {})
    patches[IMPORT].apply()
    names: dict[str, Any] = {}
    exec(IMPORT_BLOCK, names)
    assert names["rmsnorm_fn"] is rmsnorm_fn
    # Nobody takes mamba-ssm for installed, and its other functions are as absent as before.
    assert find_spec("mamba_ssm") is None and "mamba_ssm" not in sys.modules
    with pytest.raises(ImportError):
        exec("from mamba_ssm.ops.triton.layernorm_gated import RMSNorm", {})
    patches[IMPORT].revert()
    with pytest.raises(ImportError, match="mamba-ssm is required"):
        exec(IMPORT_BLOCK, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group", [None, 4])
def test_gated_norm_by_its_definition(dtype: torch.dtype, before: bool, group: int | None) -> None:
    torch.manual_seed(0)
    x, z = torch.randn(2, 3, 8).to(dtype), torch.randn(2, 3, 8).to(dtype)
    weight, bias = torch.randn(8), torch.randn(8)
    output = rmsnorm_fn(x, weight, bias, z=z, eps=1e-5, group_size=group, norm_before_gate=before)
    assert output.dtype is dtype
    rounding = 2**-8 if dtype is torch.bfloat16 else 1e-5
    for index in [(0, 0), (1, 2)]:
        gates = [float(value) / (1 + 2.718281828459045 ** -float(value)) for value in z[index]]
        values = [float(value) for value in x[index]]
        if not before:
            values = [value * gate for value, gate in zip(values, gates, strict=True)]
        size = group or 8
        for place in range(8):
            members = values[place // size * size : (place // size + 1) * size]
            expected = values[place] / (sum(member**2 for member in members) / size + 1e-5) ** 0.5
            expected = expected * float(weight[place]) + float(bias[place])
            expected *= gates[place] if before else 1
            assert float(output[(*index, place)]) == pytest.approx(expected, rel=rounding, abs=rounding)


def test_gated_norm_against_transformers() -> None:
    """Zamba2RMSNormGated is what Transformers' own nemotron_h uses: gate first, then groups."""
    from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

    torch.manual_seed(0)
    norm = Zamba2RMSNormGated(64, group_size=32, eps=1e-5)
    nn.init.normal_(norm.weight)
    x, gate = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    ours = rmsnorm_fn(x, norm.weight, None, z=gate, eps=1e-5, group_size=32, norm_before_gate=False)
    torch.testing.assert_close(ours, norm(x, gate))
