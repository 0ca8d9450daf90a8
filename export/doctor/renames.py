"""Tensors that are there under another name: missing and extra names paired by shape and nearness."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from qat.export.doctor.architecture import Shape
from qat.export.doctor.header import TensorInfo
from qat.quant.nvfp4 import BLOCK

#: What stands beside or in place of a quantized module's `weight`: ModelOpt's, compressed-tensors', GPTQ's and FP8's.
SCALE_LEAVES = frozenset(
    "weight_scale weight_scale_2 weight_scale_inv weight_global_scale weight_zero_point weight_shape input_scale "
    "input_global_scale pre_quant_scale output_scale k_scale v_scale q_scale prob_scale qzeros scales g_idx".split()
)
#: Other names under which a quantized weight is stored.
PACKED_LEAVES = ("weight_packed", "qweight")

_WRAPPERS = frozenset(
    "base_model model backbone transformer module language_model base_layer _orig_mod _fsdp_wrapped_module "
    "_checkpoint_wrapped_module".split()
)
_SYNONYMS = {
    **dict.fromkeys(("embedding", "embeddings", "embed_tokens", "word_embeddings", "wte"), "embeddings"),
    **dict.fromkeys(("norm_f", "final_layernorm", "ln_f"), "norm"),
}
_MOST_COMPARED = 200
_NEAR = 0.6


class Expected(NamedTuple):
    """A tensor that ought to be there.

    Attributes:
        shape: Its shape before quantization.
        dtype: safetensors' name of its dtype; None where only the configuration is known.
    """

    shape: Shape
    dtype: str | None


def fits(tensor: TensorInfo, expected: Expected) -> bool:
    """Whether a stored tensor has the expected shape, or that of four-bit values packed in pairs along the rows."""
    if tensor.shape == expected.shape:
        return True
    packed = tensor.dtype in ("U8", "I8") and len(tensor.shape) == 2 == len(expected.shape)
    return packed and tensor.shape == (expected.shape[0], expected.shape[1] // 2) and expected.shape[1] % BLOCK == 0


def find_renames(
    missing: Mapping[str, Expected], extra: Iterable[str], tensors: Mapping[str, TensorInfo]
) -> dict[str, str]:
    """Pair each missing name with the extra one that is the same tensor.

    First by the name without wrappers and prefixes, then, for what is left, by likeness among equal shapes and equal
    layer and expert numbers. A name that fits several is left alone.

    Returns:
        Extra name to missing name; scales of a renamed weight go with it.
    """
    extra = list(extra)
    weights = [name for name in extra if name.rpartition(".")[2] not in SCALE_LEAVES]
    by_core: dict[str, list[str]] = {}
    for name in weights:
        by_core.setdefault(_core(name), []).append(name)
    found: dict[str, str] = {}
    for name, expected in missing.items():
        candidates = by_core.get(_core(name), [])
        if len(candidates) == 1 and fits(tensors[candidates[0]], expected):
            found[candidates[0]] = name
    left = {name: missing[name] for name in missing.keys() - set(found.values())}
    unpaired = [name for name in weights if name not in found]
    if len(left) <= _MOST_COMPARED and len(unpaired) <= _MOST_COMPARED:
        found |= _nearest(left, unpaired, tensors)
    modules = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in found.items()}
    for name in extra:
        module, _, leaf = name.rpartition(".")
        if leaf in SCALE_LEAVES and module in modules:
            found[name] = f"{modules[module]}.{leaf}"
    return found


def _nearest(
    missing: Mapping[str, Expected], extra: Iterable[str], tensors: Mapping[str, TensorInfo]
) -> dict[str, str]:
    pairs = sorted(
        (
            (difflib.SequenceMatcher(None, name, old).ratio(), old, name)
            for name, expected in missing.items()
            for old in extra
            if fits(tensors[old], expected) and _numbers(old) == _numbers(name)
        ),
        reverse=True,
    )
    found: dict[str, str] = {}
    for ratio, old, name in pairs:
        if ratio >= _NEAR and old not in found and name not in found.values():
            found[old] = name
    return found


def _core(name: str) -> str:
    return ".".join(_SYNONYMS.get(part, part) for part in name.split(".") if part not in _WRAPPERS)


def _numbers(name: str) -> list[str]:
    return re.findall(r"\d+", name)
