"""Checks that read every byte (`--deep`): values that are not finite, weights of zeros, and what training changed.

Tensors are read in pieces, beside the base's where there is one: memory holds two pieces, whatever the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import NamedTuple

import torch

from qat.export.doctor.architecture import is_tied
from qat.export.doctor.checks_tensors import HEAD
from qat.export.doctor.findings import Finding, Severity, examples
from qat.export.doctor.folder import CheckpointView, is_adapter
from qat.export.shards import TORCH_DTYPES

_EMBEDDINGS = ("backbone.embeddings.weight", "model.embed_tokens.weight")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Contents(NamedTuple):
    """What reading a tensor's bytes showed.

    Attributes:
        finite: No NaN and no infinity.
        zero: Every value is zero.
        same: Every byte equals the other tensor's; None where none of this dtype and shape was given.
    """

    finite: bool
    zero: bool
    same: bool | None


def check_contents(view: CheckpointView, base: CheckpointView | None) -> Iterator[Finding]:
    """Read all tensors, and the base's where they have the same name, dtype and shape.

    Raises:
        UserError: A file cannot be read.
    """
    if is_adapter(view) or not view.tensors:
        return
    contents = {name: _contents(view, name, base, name) for name in view.tensors}
    yield from _value_findings(view, base, contents)
    embeddings = next((name for name in _EMBEDDINGS if name in view.tensors), None)
    if embeddings and HEAD in view.tensors and is_tied(view.config or {}):
        yield from _head_findings(_contents(view, HEAD, view, embeddings))
    if base is not None:
        yield from _change_findings(contents)


def _contents(view: CheckpointView, name: str, base: CheckpointView | None, counterpart: str) -> Contents:
    tensor, other = view.tensors[name], base.tensors.get(counterpart) if base else None
    comparable = other is not None and (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
    finite, zero, same = True, True, True
    others = base.pieces(counterpart) if base is not None and comparable else repeat(None)
    for piece, compared in zip(view.pieces(name), others, strict=False):
        same = same and piece == compared
        zero = zero and piece.count(0) == len(piece)
        finite = finite and _is_finite(piece, tensor.dtype)
    return Contents(finite, zero and tensor.nbytes > 0, same if comparable else None)


def _is_finite(piece: bytearray, dtype: str) -> bool:
    if dtype not in TORCH_DTYPES or not TORCH_DTYPES[dtype].is_floating_point:
        return True
    values = torch.frombuffer(piece, dtype=TORCH_DTYPES[dtype])
    # Eight-bit floats have no arithmetic of their own.
    return bool(torch.isfinite(values.float() if values.itemsize == 1 else values).all())


def _value_findings(
    view: CheckpointView, base: CheckpointView | None, contents: Mapping[str, Contents]
) -> Iterator[Finding]:
    broken = [name for name, content in contents.items() if not content.finite]
    if broken:
        yield Finding(
            "tensor_not_finite",
            Severity.ERROR,
            view.tensors[broken[0]].shard,
            f"Tensors with NaN or infinite values: {examples(broken)}",
            "Every token that passes them becomes NaN: the server answers with one repeated token or nothing.",
            "Training diverged or the file is damaged: export from an earlier state.",
        )
    known = base.tensors if base is not None else {}
    zero = [
        name
        for name, content in contents.items()
        # What is zero in the base too (a fresh bias) is as it should be; without a base only matrices are judged.
        if content.zero and (content.same is False or (name not in known and _is_matrix(view, name)))
    ]
    if zero:
        yield Finding(
            "tensor_zero",
            Severity.ERROR,
            view.tensors[zero[0]].shard,
            f"Tensors that hold nothing but zeros: {examples(zero)}",
            "Their layers add nothing to any answer; a file that was never written whole looks like this.",
            "Write the checkpoint again.",
        )


def _is_matrix(view: CheckpointView, name: str) -> bool:
    return name.endswith(".weight") and len(view.tensors[name].shape) >= 2


def _head_findings(head: Contents) -> Iterator[Finding]:
    if not head.same:
        yield Finding(
            "lm_head_differs_from_tied",
            Severity.ERROR,
            HEAD,
            "The output layer differs from the embeddings although tie_word_embeddings is true",
            "Loaders use the embeddings in its place: what training changed in the output layer is lost.",
            "Set tie_word_embeddings to false in config.json.",
        )


def _change_findings(contents: Mapping[str, Contents]) -> Iterator[Finding]:
    compared = {name: content.same for name, content in contents.items() if content.same is not None}
    if len(compared) == len(contents) and all(compared.values()):
        yield Finding(
            "equals_base",
            Severity.ERROR,
            "all weight files",
            f"All {len(compared)} tensors equal the base's, byte for byte",
            "Nothing was merged: the server answers as the base does.",
            "Merge the adapter (`qat export`) and look at what it reports as merged.",
        )
        return
    kinds: dict[str, set[bool]] = {}
    for name, same in compared.items():
        if name.endswith("_proj.weight"):
            kinds.setdefault(_NUMBER.sub("*", name), set()).add(bool(same))
    unchanged = sorted(kind for kind, states in kinds.items() if states == {True})
    if unchanged and len(unchanged) < len(kinds):
        yield Finding(
            "kind_unchanged",
            Severity.NOTE,
            "all weight files",
            f"Projections that equal the base's in every layer while others differ: {examples(unchanged)}",
            "As it should be where the adapter leaves them out; else its targets did not match them.",
            "Compare with the adapter's target_modules and target_parameters.",
        )
