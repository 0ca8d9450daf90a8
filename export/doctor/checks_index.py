"""Checks of the files of a checkpoint: the index against the shards' headers, what is missing, what lies beside."""

from __future__ import annotations

from collections.abc import Iterator

from qat.export.doctor.findings import Finding, Severity, examples
from qat.export.doctor.folder import ADAPTER_WEIGHTS, PICKLES, CheckpointView, is_adapter, weight_map_of
from qat.export.shards import INDEX_NAME, SINGLE_NAME

_REBUILD = "Rebuild the index from the shards' headers: `--fix` does."


def check_index(view: CheckpointView, base: CheckpointView | None) -> Iterator[Finding]:
    """Check which weight files there are and whether the index tells the truth about them."""
    yield from _weights_findings(view)
    yield from _repeated_tensors(view)
    weight_map = weight_map_of(view)
    if weight_map is not None:
        yield from _map_findings(view, weight_map)
        yield from _total_size_findings(view, weight_map)
    elif INDEX_NAME not in view.files and view.shards.keys() - {SINGLE_NAME, ADAPTER_WEIGHTS}:
        yield Finding(
            "index_missing",
            Severity.ERROR,
            INDEX_NAME,
            f"Weight files and no index: {examples(view.shards)}",
            "Transformers and every loader that asks the index for a tensor's file cannot load the checkpoint.",
            _REBUILD,
        )


def _weights_findings(view: CheckpointView) -> Iterator[Finding]:
    if view.config is None and not is_adapter(view) and "config.json" not in view.files:
        yield Finding(
            "config_missing",
            Severity.ERROR,
            "config.json",
            "The folder has weights and no config.json",
            "No server knows which network to build.",
            "Copy the base's config.json: `--base … --fix` does.",
        )
    pickles = sorted(file for file in view.files if file.endswith(PICKLES))
    safetensors = [file for file in view.files if file.endswith(".safetensors")]
    if not safetensors:
        found = f": only pickled ones ({examples(pickles)})" if pickles else ""
        yield Finding(
            "weights_pickled" if pickles else "weights_missing",
            Severity.ERROR,
            str(view.folder.name),
            f"The folder holds no safetensors{found}",
            "Reading a pickle runs whatever code it carries; it was not opened." if pickles else "Nothing to serve.",
            "Write the weights as safetensors in a place without secrets or network." if pickles else "Fetch them.",
        )
    elif pickles:
        yield Finding(
            "pickle_beside",
            Severity.NOTE,
            examples(pickles),
            "Pickled files lie beside the safetensors",
            "Servers prefer safetensors; another tool that reads the pickles runs whatever code they carry.",
            "Leave them out of what you publish.",
        )
    idle = sorted(set(safetensors) - set(view.shards) - {ADAPTER_WEIGHTS})
    if view.index is not None and SINGLE_NAME in idle:
        yield Finding(
            "single_and_index",
            Severity.WARNING,
            SINGLE_NAME,
            f"The folder holds {SINGLE_NAME} and an index of other files",
            "Transformers loads the one, vLLM the other.",
            "Remove the one that is out of date.",
        )
        idle.remove(SINGLE_NAME)
    if view.shards and idle:
        yield Finding(
            "shard_unindexed",
            Severity.WARNING if any(file.startswith("model") for file in idle) else Severity.NOTE,
            examples(idle),
            "Safetensors files that no loader is told to read",
            "Their tensors are not served; a left-over of another export misleads whoever copies the folder.",
            "Remove them, or rebuild the index with `--fix` where they belong to the checkpoint.",
        )


def _repeated_tensors(view: CheckpointView) -> Iterator[Finding]:
    repeated = [
        tensor.name for shard in view.shards.values() for tensor in shard.tensors if view.tensors[tensor.name] != tensor
    ]
    if repeated:
        yield Finding(
            "tensor_in_two_shards",
            Severity.ERROR,
            view.tensors[repeated[0]].shard,
            f"Tensors that another file holds too: {examples(repeated)}",
            "Which of the two is served depends on the order in which a loader reads the files.",
            "Write the checkpoint again into an empty folder.",
        )


def _map_findings(view: CheckpointView, weight_map: dict[str, str]) -> Iterator[Finding]:
    missing: list[str] = []
    wrong: list[str] = []
    held = {
        file: {tensor.name for tensor in shard.tensors}
        for file, shard in view.shards.items()
        if all(finding.severity is not Severity.ERROR for finding in shard.findings)
    }
    for name, file in weight_map.items():
        if name not in held.get(file, {name}):
            (wrong if name in view.tensors else missing).append(name)
    if missing:
        yield Finding(
            "index_tensor_missing",
            Severity.ERROR,
            INDEX_NAME,
            f"The index names tensors that no file holds: {examples(missing)}",
            "Loaders stop, or start these weights at random.",
            "Write the checkpoint again: these weights are lost.",
        )
    if wrong:
        yield Finding(
            "index_wrong_shard",
            Severity.ERROR,
            INDEX_NAME,
            f"The index places tensors in files that do not hold them: {examples(wrong)}",
            "Loaders that fetch single tensors by the index stop.",
            _REBUILD,
        )
    unlisted = [name for name in view.tensors if name not in weight_map]
    if unlisted:
        yield Finding(
            "index_tensor_unlisted",
            Severity.WARNING,
            INDEX_NAME,
            f"The files hold tensors that the index does not name: {examples(unlisted)}",
            "Loaders that go by the index leave them out; others load them.",
            _REBUILD,
        )


def _total_size_findings(view: CheckpointView, weight_map: dict[str, str]) -> Iterator[Finding]:
    metadata = view.index.get("metadata") if view.index else None
    announced = metadata.get("total_size") if isinstance(metadata, dict) else None
    if set(weight_map) != set(view.tensors) or announced is None:
        return
    found = sum(tensor.nbytes for tensor in view.tensors.values())
    if announced != found:
        yield Finding(
            "index_total_size",
            Severity.NOTE,
            f"{INDEX_NAME}: metadata.total_size",
            f"The index announces {announced} bytes of tensors, the files hold {found}",
            "No server reads the number, but a wrong one often shows that the files of two exports were mixed.",
            _REBUILD,
        )
