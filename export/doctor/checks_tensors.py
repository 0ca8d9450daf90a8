"""Checks of tensor names, shapes and dtypes against the base, or against the list that `config.json` implies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qat.export.doctor.architecture import UnknownArchitectureError, expected_tensors, is_tied
from qat.export.doctor.findings import Finding, Severity, examples
from qat.export.doctor.folder import CheckpointView, is_adapter
from qat.export.doctor.header import DTYPE_BITS
from qat.export.doctor.renames import PACKED_LEAVES, SCALE_LEAVES, Expected, find_renames, fits
from qat.quant.names import is_fused_experts

CONFIG = "config.json"
HEAD = "lm_head.weight"
PREDICTION = "mtp."
#: Tensors of a few values that steer the whole layer: servers want them in floating point, as the base has them.
SPECIAL_LEAVES = ("A_log", "D", "dt_bias", "e_score_correction_bias")

Explanation = tuple[Finding, set[str]]
"""A finding and the missing or extra names that it accounts for."""

_FLOATS = ("BF16", "F16", "F32", "F64")
_EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<expert>\d+)\.(?P<rest>.+)")
_COMPANIONS = SCALE_LEAVES.union(PACKED_LEAVES)
# Buffers that old releases saved and every loader recomputes.
_IGNORED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


class Reference(NamedTuple):
    """What a checkpoint ought to hold.

    Attributes:
        source: `the base` or `CONFIG`.
        tensors: Expected tensors by name.
    """

    source: str
    tensors: dict[str, Expected]


class Difference(NamedTuple):
    """How a checkpoint's names differ from a reference.

    Attributes:
        missing: Expected names that are not there under any name.
        extra: Names that are there and not expected.
        renames: Name that is there to the expected one.
    """

    missing: set[str]
    extra: set[str]
    renames: dict[str, str]


def reference_of(view: CheckpointView, base: CheckpointView | None) -> Reference:
    """Take the base's tensors, or without a base the list that the configuration implies.

    Raises:
        UnknownArchitectureError: There is no base and the configuration does not tell.
    """
    if base is not None and base.tensors:
        return Reference(
            "the base",
            {
                name: Expected(tensor.shape, tensor.dtype)
                for name, tensor in base.tensors.items()
                if name.rpartition(".")[2] not in SCALE_LEAVES
            },
        )
    if view.config is None:
        raise UnknownArchitectureError("there is no config.json")
    listed = expected_tensors(view.config)
    return Reference(CONFIG, {name: Expected(shape, None) for name, shape in listed.items()})


def compare_names(view: CheckpointView, reference: Reference) -> Difference:
    """Find missing, extra and renamed tensors; companions of a quantized weight count with it."""
    absent = {name: expected for name, expected in reference.tensors.items() if not _is_there(view, name)}
    if is_tied(view.config or {}):
        absent.pop(HEAD, None)
    surplus = [name for name in view.tensors if not _is_expected(name, reference)]
    renames = find_renames(absent, surplus, view.tensors)
    found = set(renames.values())
    return Difference(absent.keys() - found, set(surplus) - renames.keys(), renames)


def check_tensors(view: CheckpointView, base: CheckpointView | None) -> Iterator[Finding]:
    """Check names, shapes, dtypes, expert counts and the output layer."""
    if is_adapter(view):
        return
    try:
        reference = reference_of(view, base)
    except UnknownArchitectureError as error:
        if view.tensors:
            problem = f"The list of tensors could not be derived: {error}"
            remedy = "Give the checkpoint that this one was made from: `--base`."
            yield _unchecked("architecture_unknown", CONFIG, problem, remedy)
        return
    if not view.whole:
        problem = "Not all weight files could be read"
        yield _unchecked("names_unchecked", view.folder.name, problem, "Mend the files first, then ask again.")
    elif view.tensors:
        yield from _name_findings(view, reference, compare_names(view, reference))
    yield from _shape_findings(view, reference)
    yield from _dtype_findings(view, reference)


def _unchecked(code: str, place: str, problem: str, remedy: str) -> Finding:
    consequence = "Missing, extra and renamed tensors were not looked for."
    return Finding(code, Severity.NOTE, place, problem, consequence, remedy)


def _is_there(view: CheckpointView, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    packed = leaf == "weight" and any(f"{module}.{other}" in view.tensors for other in PACKED_LEAVES)
    return packed or name in view.tensors


def _is_expected(name: str, reference: Reference) -> bool:
    module, _, leaf = name.rpartition(".")
    if name in reference.tensors or name == HEAD or leaf in ("k_scale", "v_scale") or _IGNORED.search(name):
        return True
    if name.startswith(PREDICTION) and reference.source == CONFIG:
        return True
    return leaf in _COMPANIONS and f"{module}.weight" in reference.tensors


def _name_findings(view: CheckpointView, reference: Reference, difference: Difference) -> Iterator[Finding]:
    if difference.renames:
        shown = examples(f"{old} (expected {new})" for old, new in difference.renames.items())
        yield Finding(
            "tensor_renamed",
            Severity.ERROR,
            view.tensors[next(iter(difference.renames))].shard,
            f"Tensors under other names than in {reference.source}: {shown}",
            "A loader does not find them: it stops, or starts these weights at random.",
            "Rename them: `--fix` does, shard by shard.",
        )
    explained: set[str] = set()
    for finding, names in (
        *_head_findings(view, difference),
        *_expert_findings(view, reference, difference),
        *_leftover_findings(view, difference),
        *_prediction_findings(view, difference),
    ):
        yield finding
        explained |= names
    missing, extra = sorted(difference.missing - explained), sorted(difference.extra - explained)
    if missing:
        yield Finding(
            "tensor_missing",
            Severity.ERROR,
            view.folder.name,
            f"Tensors of {reference.source} that no file holds: {examples(missing)}",
            "A loader stops, or starts these weights at random and serves noise.",
            "Write the checkpoint again from the trained model; nothing here can restore them.",
        )
    if extra:
        yield Finding(
            "tensor_extra",
            Severity.WARNING,
            view.tensors[extra[0]].shard,
            f"Tensors that {reference.source} does not have: {examples(extra)}",
            "Strict loaders stop at them; others leave them out, and with them what training changed.",
            "Find out which step added them; leave them out where nothing needs them.",
        )


def _head_findings(view: CheckpointView, difference: Difference) -> Iterator[Explanation]:
    if HEAD in difference.missing:
        finding = Finding(
            "lm_head_missing",
            Severity.ERROR,
            HEAD,
            "The output layer is not in the checkpoint and not tied to the embeddings",
            "Transformers starts it at random and answers with noise; vLLM stops.",
            "Copy lm_head.weight from the trained model; set tie_word_embeddings only where the base has it.",
        )
        yield finding, {HEAD}
    if HEAD in view.tensors and is_tied(view.config or {}):
        finding = Finding(
            "lm_head_beside_tied",
            Severity.NOTE,
            HEAD,
            "The output layer is in the checkpoint although tie_word_embeddings is true",
            "Loaders use the embeddings in its place; if the two differ, what training changed in it is lost.",
            "`--deep` compares the two. Where they differ, set tie_word_embeddings to false.",
        )
        yield finding, {HEAD}


def _expert_findings(view: CheckpointView, reference: Reference, difference: Difference) -> Iterator[Explanation]:
    fused = sorted(name for name in difference.extra if is_fused_experts(name) and len(view.tensors[name].shape) == 3)
    if fused:
        finding = Finding(
            "experts_fused",
            Severity.ERROR,
            view.tensors[fused[0]].shard,
            f"All experts of a layer are one tensor: {examples(fused)}",
            "The published form has one tensor an expert; a loader that follows it does not find these.",
            "Save with Transformers' original format (`save_original_format=True`), or export with `qat export`.",
        )
        yield finding, {*fused, *_of_layers(difference.missing, {name.rpartition(".")[0] for name in fused})}
    wanted, there = _experts_by_layer(reference.tensors), _experts_by_layer(view.tensors)
    wrong = sorted(layer for layer in wanted.keys() & there.keys() if wanted[layer] != there[layer])
    if wrong:
        first = wrong[0]
        others = f"; {len(wrong) - 1} more layers differ too" if len(wrong) > 1 else ""
        finding = Finding(
            "expert_count",
            Severity.ERROR,
            first,
            f"{len(there[first])} routed experts in place of the {len(wanted[first])} of {reference.source}{others}",
            "The router sends tokens to experts that have no weights, or never to those that have.",
            "Write the checkpoint again with all experts, numbered from 0.",
        )
        yield finding, _of_layers(difference.missing | difference.extra, set(wrong))


def _experts_by_layer(names: Iterable[str]) -> dict[str, set[int]]:
    """The numbers of the routed experts of every layer."""
    layers: dict[str, set[int]] = {}
    for name in names:
        if match := _EXPERT.fullmatch(name):
            layers.setdefault(match["layer"], set()).add(int(match["expert"][:9]))
    return layers


def _of_layers(names: set[str], layers: set[str]) -> set[str]:
    return {name for name in names if (match := _EXPERT.fullmatch(name)) and match["layer"] in layers}


def _leftover_findings(view: CheckpointView, difference: Difference) -> Iterator[Explanation]:
    factors = sorted(name for name in difference.extra if ".lora_" in name)
    if factors:
        finding = Finding(
            "adapter_unmerged",
            Severity.ERROR,
            view.tensors[factors[0]].shard,
            f"The factors of an adapter lie beside the weights: {examples(factors)}",
            "A server ignores them and answers as the base does: the training has no effect.",
            "Merge the adapter (`qat export`) and serve the result.",
        )
        yield finding, set(factors)
    quantizers = sorted(name for name in difference.extra if "_quantizer." in name)
    if quantizers:
        finding = Finding(
            "quantizer_state",
            Severity.ERROR,
            view.tensors[quantizers[0]].shard,
            f"Ranges of fake quantization lie beside the weights: {examples(quantizers)}",
            "This is a training state, not an export: a server refuses the names or serves unquantized weights.",
            "Export the model (`qat export`, or ModelOpt's export_hf_checkpoint) and serve the result.",
        )
        yield finding, set(quantizers)


def _prediction_findings(view: CheckpointView, difference: Difference) -> Iterator[Explanation]:
    """Layers for multi-token prediction: Transformers drops them when it saves."""
    lost = {name for name in difference.missing if name.startswith(PREDICTION)}
    announced = (view.config or {}).get("num_nextn_predict_layers")
    if lost or (announced and not any(name.startswith(PREDICTION) for name in view.tensors)):
        finding = Finding(
            "mtp_missing",
            Severity.WARNING,
            "config.json: num_nextn_predict_layers",
            "The layers for multi-token prediction are not in the checkpoint",
            "Speculative decoding with the model's own head does not start; everything else works.",
            "Copy the mtp tensors from the base, or set num_nextn_predict_layers to 0.",
        )
        yield finding, lost


def _shape_findings(view: CheckpointView, reference: Reference) -> Iterator[Finding]:
    wrong = [
        f"{name} is {view.tensors[name].shape}, expected {expected.shape}"
        for name, expected in reference.tensors.items()
        if name in view.tensors and not fits(view.tensors[name], expected)
    ]
    if wrong:
        yield Finding(
            "tensor_shape",
            Severity.ERROR,
            wrong[0].partition(" is ")[0],
            f"Shapes that differ from {reference.source}: {examples(wrong)}",
            "Loaders stop with a size mismatch.",
            "Take weights and config.json from one and the same model.",
        )


def _dtype_findings(view: CheckpointView, reference: Reference) -> Iterator[Finding]:
    """Compare dtypes; that a matrix is quantized is no fault here."""
    special: list[str] = []
    narrower: list[str] = []
    wider: list[str] = []
    for name, expected in reference.tensors.items():
        tensor = view.tensors.get(name)
        if tensor is None or tensor.dtype == expected.dtype:
            continue
        change = f"{name} is {tensor.dtype}" + (f" in place of {expected.dtype}" if expected.dtype else "")
        if name.endswith(SPECIAL_LEAVES):
            if tensor.dtype not in _FLOATS or (expected.dtype and _bits(tensor.dtype) < _bits(expected.dtype)):
                special.append(change)
            elif expected.dtype:
                wider.append(change)
        elif expected.dtype in _FLOATS and tensor.dtype in _FLOATS:
            lossless = _bits(tensor.dtype) > _bits(expected.dtype)
            (wider if lossless else narrower).append(change)
        elif tensor.dtype not in _FLOATS and len(tensor.shape) != 2:
            special.append(change)
    for code, severity, changes, consequence in (
        (
            "special_dtype",
            Severity.ERROR,
            special,
            "Small tensors that steer a whole layer (decay, skip, step size, routing, norms) lost precision.",
        ),
        (
            "tensor_dtype",
            Severity.WARNING,
            narrower,
            "Values were rounded, or can overflow (F16): the server computes with other weights than training did.",
        ),
        (
            "tensor_dtype_wider",
            Severity.NOTE,
            wider,
            "No value is lost; the file is larger than it needs to be.",
        ),
    ):
        if changes:
            problem = f"Dtypes that differ from {reference.source}: {examples(changes)}"
            place = changes[0].partition(" is ")[0]
            yield Finding(code, severity, place, problem, consequence, "Export again and keep the base's dtypes.")


def _bits(dtype: str) -> int:
    return DTYPE_BITS.get(dtype, 0)
