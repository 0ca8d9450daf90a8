"""A mended copy of a checkpoint: untouched shards as hard links, everything else written anew, the original as it was.

What can be mended without guessing is planned first; where the plan is empty nothing is written. A plan step says in
one line what it does; what is left to mend shows when the copy is examined.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qat.errors import UserError
from qat.export.config import dump_json
from qat.export.doctor.architecture import UnknownArchitectureError
from qat.export.doctor.checks_tensors import compare_names, reference_of
from qat.export.doctor.findings import examples
from qat.export.doctor.folder import PICKLES, CheckpointView, is_adapter, open_checkpoint, openable, weight_map_of
from qat.export.doctor.header import Shard
from qat.export.doctor.repair_texts import mended_texts
from qat.export.folder import REPORT_NAME, require_space, whole_folder
from qat.export.shards import INDEX_NAME, SINGLE_NAME

#: Faults of a file that writing its tensors one after the other mends; with any other the file is left alone.
_MENDED_BY_WRITING = frozenset(("metadata_format", "metadata_invalid", "shard_trailing_bytes", "tensors_hole"))
_SPACE_FOR_SMALL_FILES = 64 << 20
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass
class Plan:
    """What a mended copy differs in.

    Attributes:
        texts: New content of small files, by name.
        shards: Weight files that are written anew: new tensor names by old ones.
        dropped: Files that are not carried over.
        steps: What is done, one line each.
    """

    texts: dict[str, bytes] = field(default_factory=dict)
    shards: dict[str, dict[str, str]] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    steps: list[str] = field(default_factory=list)


def repair(checkpoint: Path, base: Path | None, out: Path) -> list[str]:
    """Write a mended copy of a checkpoint.

    Args:
        checkpoint: The folder to mend; it is not changed.
        base: The checkpoint that it was made from; without it only what the checkpoint itself tells is mended.
        out: The folder to make. It appears whole or not at all.

    Returns:
        What was mended, one line each; empty where nothing could be, and then nothing was written.

    Raises:
        UserError: The checkpoint or base is unreadable, `out` exists, is one of them or lies inside, or the disk is
            full.
    """
    _require_fresh(out, [folder for folder in (checkpoint, base) if folder is not None])
    view = open_checkpoint(checkpoint)
    plan = make_plan(view, open_checkpoint(base) if base is not None else None)
    if plan.steps:
        with whole_folder(out) as folder:
            written = sum(tensor.nbytes for name in plan.shards for tensor in view.shards[name].tensors)
            require_space(folder, written + _SPACE_FOR_SMALL_FILES)
            _write(view, plan, folder)
    return plan.steps


def make_plan(view: CheckpointView, base: CheckpointView | None) -> Plan:
    """Decide what can be mended, from headers and configurations alone."""
    plan = Plan()
    if is_adapter(view):
        return plan
    renames = _renames(view, base)
    for shard in view.shards.values():
        own = {tensor.name: renames[tensor.name] for tensor in shard.tensors if tensor.name in renames}
        codes = {finding.code for finding in shard.findings}
        if codes <= _MENDED_BY_WRITING and (codes or own) and _holds_all(view, shard):
            plan.shards[shard.name] = own
            done = [f"{len(own)} tensors renamed ({examples(f'{a} → {b}' for a, b in own.items())})"] if own else []
            plan.steps.append(f"{shard.name}: {', '.join([*done, *sorted(codes)])}")
    _plan_index(view, plan)
    for name, (content, what) in mended_texts(view, base).items():
        plan.texts[name] = content
        plan.steps.append(f"{name}: {what}")
    if plan.steps:
        plan.dropped = {file for file in view.files if file.endswith(PICKLES)}
        if plan.dropped:
            plan.steps.append(f"pickled files left out: {examples(sorted(plan.dropped))}")
        if REPORT_NAME in view.files:
            plan.dropped.add(REPORT_NAME)
            plan.steps.append(f"{REPORT_NAME} left out: its digests are those of the files before")
    return plan


def _renames(view: CheckpointView, base: CheckpointView | None) -> dict[str, str]:
    """New tensor names by old ones; none where files are missing, since a name could then be taken twice."""
    if not view.tensors or not _readable(view):
        return {}
    try:
        return compare_names(view, reference_of(view, base)).renames
    except UnknownArchitectureError:
        return {}


def _readable(view: CheckpointView) -> bool:
    """Whether every tensor of every file is known, though a file may have faults that writing it anew mends."""
    codes = {finding.code for shard in view.shards.values() for finding in shard.findings}
    lost = {finding.code for finding in view.findings} & {"shard_missing", "file_unreadable", "link_outside"}
    return codes <= _MENDED_BY_WRITING and not lost


def _holds_all(view: CheckpointView, shard: Shard) -> bool:
    return all(view.tensors[tensor.name] is tensor for tensor in shard.tensors)


def _plan_index(view: CheckpointView, plan: Plan) -> None:
    """Rebuild the index from the headers where it is missing or wrong and the headers are whole."""
    files = list(view.shards)
    if not files or not _readable(view) or not all(_holds_all(view, shard) for shard in view.shards.values()):
        return
    new_name = {old: new for renames in plan.shards.values() for old, new in renames.items()}
    rebuilt = {new_name.get(name, name): tensor.shard for name, tensor in view.tensors.items()}
    found = weight_map_of(view)
    if found is not None and not found.keys() <= rebuilt.keys():
        return  # it names tensors that are lost: a smaller index would hide that
    size = sum(tensor.nbytes for tensor in view.tensors.values())
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(rebuilt.items()))}
    if files == [SINGLE_NAME] and INDEX_NAME not in view.files:
        return
    announced = view.index.get("metadata") if view.index is not None else None
    if found == rebuilt and isinstance(announced, dict) and announced.get("total_size", size) == size:
        return
    plan.texts[INDEX_NAME] = dump_json(content).encode()
    plan.steps.append(f"{INDEX_NAME}: rebuilt from the headers of {len(files)} files")


def _write(view: CheckpointView, plan: Plan, folder: Path) -> None:
    for name, content in plan.texts.items():
        (folder / name).write_bytes(content)
    for name, renames in plan.shards.items():
        _write_shard(view, view.shards[name], renames, folder / name)
    for name in sorted(view.files - plan.texts.keys() - plan.shards.keys() - plan.dropped):
        _carry(openable(view.folder, name), folder / name)
    for root, folders, files in os.walk(view.folder):
        folders[:] = [name for name in folders if not (Path(root) / name).is_symlink()]
        if Path(root) != view.folder:
            inside = folder / Path(root).relative_to(view.folder)
            inside.mkdir()
            for file in files:
                source = Path(root) / file
                if source.is_file() and not source.is_symlink() and not file.endswith(PICKLES):
                    _carry(source, inside / file)


def _write_shard(view: CheckpointView, shard: Shard, renames: Mapping[str, str], path: Path) -> None:
    """Write the tensors of a shard one after the other, in their order and under their new names."""
    header: dict[str, object] = {"__metadata__": {**(shard.metadata or {}), "format": "pt"}}
    start = 0
    for tensor in shard.tensors:
        place = [start, start + tensor.nbytes]
        name = renames.get(tensor.name, tensor.name)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
        start += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in shard.tensors:
            for piece in view.pieces(tensor.name):
                file.write(piece)


def _carry(source: Path, target: Path) -> None:
    """Link a weight file, copy anything else: a small file is edited in place too easily."""
    if source.name.endswith(".safetensors") or target.name.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
    shutil.copyfile(source, target)


def _require_fresh(out: Path, inputs: Sequence[Path]) -> None:
    place = out.resolve()
    if any(place == folder.resolve() or place.is_relative_to(folder.resolve()) for folder in inputs):
        raise UserError("The mended copy would lie in the checkpoint itself.", where=str(out))
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(
            "The folder for the mended copy exists; it is not overwritten.",
            where=str(out),
            remedy="Choose another folder or remove this one.",
        )
