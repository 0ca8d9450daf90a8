"""A base that is kept in NVFP4 while it is trained on (QLoRA): packed weights that the network sees as BF16 ones.

`PackedWeight` stands in the place of a frozen parameter. Whatever is done with it is done with the BF16 weight that it
unpacks to, for that one call; nothing but codes and scales (4.5 bits a number) stays. `F.linear` and the experts'
grouped product are taught not to keep the unpacked weight for the backward either.

The weight that counts is dequant(Q(W)), with W's own largest magnitude (one an expert) as range: training sees it,
merging adds s B A to it, and export starts from it. Adapters and quantizer states remember the packed base by
`packed_base_sha256`, so none of them can be put on the unpacked one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

from qat.errors import UserError
from qat.quant.effective import effective_weight
from qat.quant.nvfp4 import BLOCK, Packed, dequantize, quantize_weight
from qat.quant.presets import NVFP4, W4A16, Preset

if TYPE_CHECKING:
    from torch import nn

UNPACKED_AT_ONCE = 1 << 26
"""Numbers that a CPU unpacks together: float32 work space of a few hundred megabytes beside the BF16 result."""

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_PARTS = ("weight", "weight_scale", "weight_scale_2")


class LowRank(NamedTuple):
    """What a merged adapter adds: `scale * b @ a`, in the shapes of `effective_weight` and in the weight's dtype."""

    a: Tensor
    b: Tensor
    scale: float


def pack(w: Tensor) -> Packed:
    """Quantize a base weight with its own range: one, or one for each expert.

    Args:
        w: (out, in) or (experts, out, in), bfloat16.

    Returns:
        Codes and scales on the weight's device. The range of a matrix of zeros is 1: all its codes are zero.
    """
    if w.dim() == 3:  # one after the other: the work space is some twenty bytes a number
        return Packed(*(torch.stack(parts) for parts in zip(*map(pack, w), strict=True)))
    amax = w.abs().amax().float()
    return quantize_weight(w, torch.where(amax > 0, amax, 1.0))


def through_nvfp4(w: Tensor) -> Tensor:
    """The weight that a packed base stands for: what is left of `w` after packing and unpacking, in its dtype."""
    if w.dim() == 2:
        return _unpack(pack(w), w.dtype)
    out = torch.empty_like(w)
    for expert, matrix in zip(out, w, strict=True):
        expert.copy_(_unpack(pack(matrix), w.dtype))
    return out


def packed_modules(presets: Iterable[Preset], config: Mapping[str, Any]) -> list[str]:
    """Say what is packed for a set of precision presets: the modules to which all of them give four bits.

    A module that some preset keeps wider stays in BF16: four bits would be a loss that this arm is not to have. So does
    `lm_head`, whose weight the loss multiplies with itself.

    Args:
        presets: The presets; none stands for `all`.
        config: The base's `config.json`.

    Returns:
        Checkpoint names in the order of the layers.

    Raises:
        UserError: A preset does not fit the model, or no module has four bits in all of them.
    """
    chosen = [
        [name for name, kind in preset.formats(config).items() if kind in (NVFP4, W4A16) and name != "lm_head"]
        for preset in (list(presets) or [Preset("all")])
    ]
    common = set(chosen[0]).intersection(*chosen[1:])
    if not common:
        raise UserError("No module has four bits in all of the recipe's presets.", where="train.memory", value="nvfp4")
    return [name for name in chosen[0] if name in common]


def packed_base_sha256(base_sha256: str, modules: Sequence[str]) -> str:
    """Name a base with packed modules: what adapters and quantizer states that stand on it remember.

    Args:
        base_sha256: Of the base's weights on disk.
        modules: Names of the packed modules, in any order; none stands for the base itself.

    Returns:
        `base_sha256` where nothing is packed; else the SHA-256, in hexadecimal, of "nvfp4", `base_sha256` and the
        sorted names, each followed by a line feed.
    """
    if not modules:
        return base_sha256
    return hashlib.sha256(
        "".join(f"{line}\n" for line in ("nvfp4", base_sha256, *sorted(modules))).encode()
    ).hexdigest()


class PackedWeight(Tensor):
    """A frozen weight in NVFP4 that behaves as its unpacked form.

    Args:
        packed: Codes and scales.
        dtype: Of the unpacked form.
        low_rank: Merged adapters, first the one that was trained first; each is rounded once, as merging rounds.
    """

    packed: Packed
    low_rank: tuple[LowRank, ...]

    @staticmethod
    def __new__(cls, packed: Packed, dtype: torch.dtype, low_rank: Sequence[LowRank] = ()) -> PackedWeight:
        """Make the empty shell; what it holds comes in `__init__`."""
        shape = (*packed.weight.shape[:-1], packed.weight.shape[-1] * 2)
        shell: PackedWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=packed.weight.device, requires_grad=False
        )
        return shell

    def __init__(self, packed: Packed, dtype: torch.dtype, low_rank: Sequence[LowRank] = ()) -> None:
        self.packed, self.low_rank = packed, tuple(low_rank)

    def to_dense(self, dtype: torch.dtype | None = None, *, masked_grad: bool | None = None) -> Tensor:
        """The unpacked weight with merged adapters, made anew in every call; in its own dtype, or cast to `dtype`."""
        with torch.no_grad():
            weight = _unpack(self.packed, self.dtype)
            for a, b, scale in self.low_rank:
                weight = effective_weight(weight, a, b, scale)
        return weight if dtype is None else weight.to(dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape and dtype; no value is unpacked for it."""
        return f"PackedWeight({tuple(self.shape)}, {self.dtype}, {self.device}, merged={len(self.low_rank)})"

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """Name the tensors inside (torch's protocol of wrapper tensors: moving a module swaps them as one)."""
        for part, tensor in zip(_PARTS, self.packed, strict=True):
            self.__dict__[f"_{part}"] = tensor
        for index, factors in enumerate(self.low_rank):
            self.__dict__[f"_a{index}"], self.__dict__[f"_b{index}"] = factors.a, factors.b
        names = [f"_{part}" for part in _PARTS]
        names += [f"_{side}{index}" for index in range(len(self.low_rank)) for side in "ab"]
        return names, {"dtype": self.dtype, "scales": [factors.scale for factors in self.low_rank]}

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], context: dict[str, Any], size: object, stride: object
    ) -> PackedWeight:
        """The inverse of `__tensor_flatten__`."""
        packed = Packed(*(inner[f"_{part}"] for part in _PARTS))
        low_rank = [LowRank(inner[f"_a{i}"], inner[f"_b{i}"], scale) for i, scale in enumerate(context["scales"])]
        return PackedWeight(packed, context["dtype"], low_rank)

    def _each(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> PackedWeight:
        """A packed weight whose inner tensors went through `function`."""
        low_rank = [LowRank(function(a), function(b), scale) for a, b, scale in self.low_rank]
        return PackedWeight(Packed(*map(function, self.packed)), dtype or self.dtype, low_rank)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """`F.linear` unpacks in the backward again; everything else comes to `__torch_dispatch__`."""
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own annotation leaves out `func`
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute with the unpacked weight; detaching, copying and moving keep it packed."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        aten = torch.ops.aten
        if isinstance(first, PackedWeight):
            if func in (aten.detach.default, aten.alias.default):
                return return_and_correct_aliasing(func, args, kwargs, first._each(lambda tensor: tensor.detach()))
            if func is aten.clone.default:
                return first._each(lambda tensor: tensor.clone())
            if func is aten._to_copy.default and kwargs.get("dtype") in (None, first.dtype):
                where = {"device": kwargs.get("device"), "non_blocking": kwargs.get("non_blocking", False)}
                return first._each(lambda tensor: tensor.to(**where, copy=True))
        if func._schema.is_mutable:
            raise RuntimeError(f"a packed weight cannot be changed in place ({func})")
        return func(*tree_map(dense, tuple(args)), **tree_map(dense, dict(kwargs)))


def dense(value: Any) -> Any:
    """Unpack a packed weight; anything else is given back as it is."""
    return value.to_dense() if isinstance(value, PackedWeight) else value


def packed_parameter(w: Tensor) -> nn.Parameter:
    """Pack a BF16 weight into a frozen parameter."""
    return torch.nn.Parameter(PackedWeight(pack(w), w.dtype), requires_grad=False)


@torch.no_grad()
def add_low_rank_(weight: PackedWeight, a: Tensor, b: Tensor, scale: float) -> None:
    """Merge an adapter into a packed weight: its factors are kept and added in every unpacking.

    Merging into the codes would round the persona to four bits a second time; kept apart, the weight is bit for bit
    the one that merging into the unpacked base gives.

    Args:
        weight: Changed in place.
        a: (rank, in) or (experts, rank, in).
        b: (out, rank) or (experts, out, rank).
        scale: alpha / rank.
    """
    factors = LowRank(a.detach().to(weight.dtype).contiguous(), b.detach().to(weight.dtype).contiguous(), scale)
    weight.low_rank = (*weight.low_rank, factors)


def packed_product(
    x: Tensor, weight: PackedWeight, offsets: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Multiply with the unpacked weight, which is not kept: the backward unpacks it again.

    Args:
        x: (…, in); for experts (pairs, in), sorted by expert.
        weight: (out, in) or (experts, out, in).
        offsets: int32 (experts,), where each expert's rows end; for experts only.
        bias: (out,); not for experts.

    Returns:
        (…, out).
    """
    y: Tensor = _Product.apply(x, weight, offsets, bias)  # type: ignore[no-untyped-call]
    return y


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, whose argument names these are."""
    if isinstance(weight, PackedWeight):
        return packed_product(dense(input), weight, None, bias)
    return F.linear(dense(input), weight, bias)


class _Product(torch.autograd.Function):
    """x W^T, of experts each group of rows with its own W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, offsets: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.weight, ctx.has_bias = weight, bias is not None
        w = weight.to_dense()
        return F.linear(x, w, bias) if offsets is None else F.grouped_mm(x, w.mT, offs=offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        (gradient,), (offsets,) = gradients, ctx.saved_tensors
        to_x = None
        if ctx.needs_input_grad[0]:
            w = ctx.weight.to_dense()
            to_x = gradient.matmul(w) if offsets is None else F.grouped_mm(gradient.contiguous(), w, offs=offsets)
        wanted = ctx.has_bias and ctx.needs_input_grad[3]
        return to_x, None, None, gradient.flatten(0, -2).sum(dim=0) if wanted else None


def _unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """`qat.quant.nvfp4.dequantize`, number for number, some matrices at a time and straight into the result."""
    codes, scale, scale_2 = packed
    if codes.is_cuda:
        return dequantize(packed, dtype)  # one kernel, nothing between
    out = torch.empty((*codes.shape[:-1], codes.shape[-1] * 2), dtype=dtype, device=codes.device)
    values = torch.tensor(_VALUES, device=codes.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)  # by byte: low code, high code
    rows = out.shape[-2] if out.dim() == 2 else out.shape[0]
    several = max(1, UNPACKED_AT_ONCE * rows // max(1, out.numel()))
    for start in range(0, rows, several):
        part = slice(start, start + several)
        own = scale_2 if scale_2.dim() == 0 else scale_2[part, None, None]
        step = scale[part].float() * own
        unpacked = pairs[codes[part].int()].view(*step.shape, BLOCK).mul_(step.unsqueeze(-1))
        out[part].copy_(unpacked.view(out[part].shape))
    return out
