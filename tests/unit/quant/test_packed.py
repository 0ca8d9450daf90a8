from __future__ import annotations

import gc
import hashlib
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from qat.errors import UserError
from qat.quant.effective import effective_weight
from qat.quant.nvfp4 import dequantize, fake_quant_weight
from qat.quant.packed import (
    PackedWeight,
    add_low_rank_,
    pack,
    packed_base_sha256,
    packed_modules,
    packed_parameter,
    through_nvfp4,
)
from qat.quant.presets import Preset
from qat.quant.products import product
from tests.tiny_models import nemotron_h_tiny
from tests.unit.train.on_meta import Live


def _matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _experts() -> torch.Tensor:
    weights = _matrix(5, 32, 48, seed=1)
    weights[1] *= 100  # ranges of their own
    weights[3] = 0
    return weights


@pytest.mark.parametrize("weight", [_matrix(32, 48), _experts()])
@pytest.mark.parametrize("at_once", [1, 48 * 32 * 2, 1 << 26])
def test_it_is_the_weight_that_quantizing_leaves(
    weight: torch.Tensor, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two other routes: ModelOpt's order of unpacking (`dequantize`), and fake quantization, which never packs."""
    monkeypatch.setattr("qat.quant.packed.UNPACKED_AT_ONCE", at_once)
    packed = packed_parameter(weight)
    amax = weight.abs().amax(dim=(-2, -1)).float()
    amax[amax == 0] = 1.0
    expected = fake_quant_weight(weight, amax)
    assert torch.equal(packed.data.to_dense(), expected)
    assert torch.equal(dequantize(pack(weight), torch.bfloat16), expected)
    assert torch.equal(through_nvfp4(weight), expected)
    assert not torch.equal(expected, weight)


def test_it_is_a_parameter_of_four_and_a_half_bits() -> None:
    packed = packed_parameter(_experts())
    assert isinstance(packed, nn.Parameter) and isinstance(packed, PackedWeight) and not packed.requires_grad
    assert (packed.shape, packed.dtype, packed.dim()) == ((5, 32, 48), torch.bfloat16, 3)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in packed.packed)
    assert kept == packed.numel() * (0.5 + 1 / 16) + 5 * 4


def test_copies_stay_packed_and_sums_do_not() -> None:
    packed = packed_parameter(_matrix(32, 48))
    add_low_rank_(packed, _matrix(2, 48), _matrix(32, 2), 0.5)
    for copied in (packed.detach(), packed.clone(), packed.data, packed.to(torch.device("cpu"), copy=True)):
        assert isinstance(copied, PackedWeight)
        assert torch.equal(copied.to_dense(), packed.to_dense())
    assert type(packed + 0) is torch.Tensor and torch.equal(packed + 0, packed.to_dense())
    assert torch.equal(packed.abs().amax(), packed.to_dense().abs().amax())
    assert torch.equal(packed.float(), packed.to_dense().float())


def test_it_cannot_be_written_to() -> None:
    packed = packed_parameter(_matrix(32, 48))
    for change in (lambda: packed.data.copy_(_matrix(32, 48)), lambda: packed.data.mul_(2)):
        with pytest.raises(RuntimeError, match="changed in place"):
            change()


def test_a_module_moves_with_it() -> None:
    linear = nn.Linear(48, 32, bias=False)
    linear.weight = packed_parameter(_matrix(32, 48))
    add_low_rank_(linear.weight, _matrix(2, 48), _matrix(32, 2), 0.5)
    expected = linear.weight.to_dense()
    linear.to("cpu")
    assert torch.equal(linear.weight.to_dense(), expected)
    linear.to("meta")
    assert isinstance(linear.weight, PackedWeight) and linear.weight.device.type == "meta"
    inner = [*linear.weight.packed, linear.weight.low_rank[0].a, linear.weight.low_rank[0].b]
    assert all(tensor.is_meta for tensor in inner)


def _with_kept(
    function: Any, x: torch.Tensor, gradient: torch.Tensor, *held: torch.Tensor
) -> tuple[list[torch.Tensor], int]:
    """Value, gradient of `x`, and the bytes that the forward made, `held` aside, and keeps in whatever way."""
    leaf = x.clone().requires_grad_()
    with Live(leaf, *held) as live:
        y = function(leaf)
        gc.collect()
        kept = live.now - y.untyped_storage().nbytes()
    y.backward(gradient)
    assert leaf.grad is not None
    return [y.detach(), leaf.grad], kept


def test_a_linear_computes_with_it_and_keeps_nothing_unpacked() -> None:
    """Value and gradient are the dense product's, and of the forward nothing stays beside the value."""
    weight, bias = _matrix(512, 1024), _matrix(512, seed=3)
    linear = nn.Linear(1024, 512)
    linear.weight, linear.bias = packed_parameter(weight), nn.Parameter(bias, requires_grad=False)
    x, gradient = _matrix(3, 4, 1024, seed=2), _matrix(3, 4, 512, seed=4)
    found, kept = _with_kept(linear, x, gradient, *linear.weight.packed)
    assert kept == 0
    expected, kept = _with_kept(lambda x: functional.linear(x, through_nvfp4(weight), bias), x, gradient)
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    assert kept >= 512 * 1024 * 2


def test_experts_compute_with_it_and_keep_nothing_unpacked() -> None:
    """The same for a grouped product, each expert's rows by themselves as the oracle."""
    weight = _matrix(4, 128, 256)
    x, gradient = _matrix(11, 256, seed=2), _matrix(11, 128, seed=4)
    packed, ends = packed_parameter(weight), [3, 3, 10, 11]

    def each(x: torch.Tensor) -> torch.Tensor:
        groups = zip(pairwise([0, *ends]), through_nvfp4(weight), strict=True)
        return torch.cat([x[start:end] @ matrix.mT for (start, end), matrix in groups])

    offsets = torch.tensor(ends, dtype=torch.int32)
    found, kept = _with_kept(lambda x: product(x, packed, offsets), x, gradient, offsets, *packed.packed)
    assert kept == 0
    expected, _ = _with_kept(each, x, gradient)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)
    dense, kept = _with_kept(lambda x: product(x, through_nvfp4(weight), offsets), x, gradient)
    assert all(torch.equal(left, right) for left, right in zip(found, dense, strict=True))
    assert kept >= 4 * 128 * 256 * 2


def test_merged_adapters_are_the_effective_weight_of_the_unpacked_one() -> None:
    for weight, first, second in (
        (_matrix(32, 48), (_matrix(4, 48), _matrix(32, 4)), (_matrix(2, 48), _matrix(32, 2))),
        (_experts(), (_matrix(5, 4, 48), _matrix(5, 32, 4)), (_matrix(5, 2, 48), _matrix(5, 32, 2))),
    ):
        packed = packed_parameter(weight)
        expected = through_nvfp4(weight)
        for (a, b), scale in ((first, 0.25), (second, 2.0)):
            add_low_rank_(packed, a.float(), b.float(), scale)
            expected = effective_weight(expected, a, b, scale)
        assert torch.equal(packed.to_dense(), expected)
        a, b = first
        assert torch.equal(effective_weight(packed, a, b, 1.0), effective_weight(expected, a, b, 1.0))


def test_what_is_packed_has_four_bits_in_every_preset() -> None:
    config = nemotron_h_tiny().config.to_dict() | {"model_type": "nemotron_h"}
    config["hybrid_override_pattern"] = "ME*E"
    config.pop("layers_block_type", None)
    every = Preset("all").quantized_modules(config)
    nano = Preset("nvidia-nano").quantized_modules(config)
    assert packed_modules([], config) == packed_modules([Preset("all")], config) == every
    assert packed_modules([Preset("all"), Preset("nvidia-nano")], config) == nano
    assert set(nano) < set(every)
    wide = Preset("mine", {"backbone.layers.0.mixer.in_proj": "fp8", "backbone.layers.0.mixer.out_proj": "nvfp4"})
    assert packed_modules([wide, Preset("all")], config) == ["backbone.layers.0.mixer.out_proj"]
    with pytest.raises(UserError, match="No module"):
        packed_modules([wide, Preset("mine", {"backbone.layers.0.mixer.in_proj": "nvfp4"})], config)


def test_the_packed_base_has_a_name_of_its_own() -> None:
    """By hand from the definition."""
    assert packed_base_sha256("base", []) == "base"
    expected = hashlib.sha256(b"nvfp4\nbase\na\nb\n").hexdigest()
    assert packed_base_sha256("base", ["b", "a"]) == expected
    assert len({expected, packed_base_sha256("base", ["a"]), packed_base_sha256("other", ["a", "b"])}) == 3
