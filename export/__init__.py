"""Export: base checkpoint, adapters and quantizer scales become one deployable checkpoint, proven, then put in place.

`merge` and `adapter` give effective weights, `pack` plans and computes the output, `shards` reads and writes
safetensors, `config` writes the JSON files, `folder` makes it appear whole or not at all, `verify` reads it back and
compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qat.errors import UserError
from qat.export.adapter import Adapter, packed_below, read_adapter
from qat.export.config import (
    copy_companions,
    dump_json,
    exclude_modules,
    quantization_files,
    read_config,
    template_files,
)
from qat.export.folder import REPORT_NAME, require_space, whole_folder
from qat.export.merge import find_modules
from qat.export.pack import Base, Step, check_state, make_plan, write_tensors
from qat.export.report import ExportMismatch, ExportReport, Precision, VerifyReport, census
from qat.export.shards import INDEX_NAME, ShardWriter, file_sha256, read_entries
from qat.export.verify import verify_export
from qat.progress import Progress
from qat.quant.packed import packed_base_sha256
from qat.quant.state import QuantState
from qat.train.base import base_sha256

__all__ = ["ExportMismatch", "ExportReport", "Precision", "VerifyReport", "export_checkpoint", "verify_export"]

# Headers, JSON files and tokenizer come on top of the tensors.
_SPACE_FOR_SMALL_FILES = 64 << 20
# Writing reads, multiplies and packs; checking does the same and unpacks: about half the time each.
_WRITING_PERCENT = 50


def export_checkpoint(
    base: Path,
    out: Path,
    *,
    adapters: Sequence[Path] = (),
    quant_state: Path | None = None,
    chat_template: Path | None = None,
    max_shard_bytes: int = 4 << 30,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a deployable checkpoint and prove that it holds the weights that the forward used.

    The same inputs give the same bytes in every file. Memory holds one module (one projection of all experts of a
    layer) at a time.

    Args:
        base: Folder of the BF16 checkpoint, safetensors, one file or sharded.
        out: The folder to make. A former export there is replaced once the new one is whole; anything else is refused.
        adapters: PEFT LoRA folders in the order of training; each is rounded once to the weight's dtype.
        quant_state: Scales from calibration or distillation: ModelOpt's format is written. None: merged weights in the
            base's dtypes.
        chat_template: Jinja file that the export carries in place of the base's template.
        max_shard_bytes: Tensor bytes in one file; more than one file come with an index.
        progress: Told the percentage that is done (0 to 100), writing and checking together.

    Returns:
        The report that also stands in `out/export.json`.

    Raises:
        UserError: An input is missing, damaged or does not fit the others, the disk is or will be full, or the target
            is no export. Nothing is left behind.
        ExportMismatch: The written files are not what the forward uses; nothing is left behind.
    """
    if max_shard_bytes <= 0:
        raise UserError("The size of a shard must be positive.", where="max_shard_bytes", value=max_shard_bytes)
    if out.resolve() in {path.resolve() for path in (base, *adapters)}:
        raise UserError("The export would overwrite one of its inputs.", where=str(out))
    job = _prepare(base, adapters, quant_state, chat_template)
    with whole_folder(out) as folder:
        require_space(folder, job.size + _SPACE_FOR_SMALL_FILES)
        names = _write(job, folder, max_shard_bytes, progress)
        second_half = _SecondHalf(progress) if progress else None
        verification = verify_export(folder, base, adapters, quant_state, progress=second_half)
        report = ExportReport(
            tensors=sum(len(step.outputs) for step in job.plan),
            packed=sum(len(step.sources) for step in job.plan if step.state is not None),
            merged=sum(len(step.sources) for step in job.plan if step.module is not None and step.state is None),
            copied=sum(step.module is None for step in job.plan),
            bytes=job.size,
            excluded=job.excluded,
            sha256={name: file_sha256(folder / name) for name in names},
            precisions=census(job.plan),
            verification=verification,
            base_sha256=job.digest,
            packed_base=len(job.base.packed),
            adapters=[adapter.sha256 for adapter in job.adapters],
        )
        (folder / REPORT_NAME).write_text(dump_json(report.to_json()), encoding="utf-8")
    return report


class _Job(NamedTuple):
    """Checked inputs and everything that follows from headers: no weight has been read, nothing written.

    Attributes:
        base: The opened base.
        digest: SHA-256 of the base's weights, and of what was packed of them, as adapters and states remember it.
        adapters: The opened adapters.
        plan: What is written for every tensor.
        size: Tensor bytes of the export.
        excluded: `exclude_modules` of the quantization configuration.
        files: Content of the JSON files, and of a chat template of the export's own, by name.
    """

    base: Base
    digest: str
    adapters: list[Adapter]
    plan: list[Step]
    size: int
    excluded: list[str]
    files: dict[str, bytes]


def _prepare(
    folder: Path, adapter_folders: Sequence[Path], quant_state: Path | None, chat_template: Path | None
) -> _Job:
    config = read_config(folder)
    entries = read_entries(folder)
    modules = find_modules(entries, folder)
    adapters = [read_adapter(path, modules, config["model_type"]) for path in adapter_folders]
    packed = packed_below(adapters, adapter_folders)
    base = Base(folder, entries, modules, frozenset(packed))
    state = QuantState.load(quant_state) if quant_state else None
    digest = packed_base_sha256(base_sha256(folder), packed)
    _require_same_base(digest, list(zip(adapter_folders, adapters, strict=True)), state, quant_state)
    excluded: list[str] = []
    files = {"config.json": (folder / "config.json").read_bytes()}
    if state is not None:
        check_state(base, state, config)
        excluded = exclude_modules(entries, base.modules, state.modules)
        layers = {
            tensor.removesuffix(".weight"): module.format
            for name, module in state.modules.items()
            for tensor in base.modules[name].tensors
        }
        written = quantization_files(config, excluded, state.kv_cache, layers)
        files = {name: text.encode() for name, text in written.items()}
    if chat_template is not None:
        files |= template_files(folder, chat_template)
    plan = make_plan(base, adapters, state)
    size = sum(spec.nbytes for step in plan for spec in step.outputs)
    return _Job(base, digest, adapters, plan, size, excluded, files)


def _write(job: _Job, folder: Path, max_shard_bytes: int, progress: Progress | None) -> list[str]:
    """Write everything but the report; the names of the files, sorted."""
    specs = [spec for step in job.plan for spec in step.outputs]
    total, done = sum(entry.nbytes for entry in job.base.entries.values()), 0
    with ShardWriter(folder, specs, max_shard_bytes) as writer:
        for written in write_tensors(job.base, job.plan, job.adapters, writer):
            done += written
            if progress is not None:
                progress.update(_WRITING_PERCENT * done // max(total, 1), "writing")
        writer.finish()
    files = dict(job.files)
    if writer.index is not None:
        files[INDEX_NAME] = dump_json(writer.index).encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    copied = copy_companions(job.base.folder, folder, own_template="chat_template.jinja" in files)
    return sorted([*writer.files, *files, *copied])


class _SecondHalf:
    """Map the verification's percentage onto the part of the export's that writing leaves."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def update(self, completed: int, note: str = "") -> None:
        self._progress.update(_WRITING_PERCENT + completed * (100 - _WRITING_PERCENT) // 100, note or "verifying")


def _require_same_base(
    digest: str, adapters: Sequence[tuple[Path, Adapter]], state: QuantState | None, quant_state: Path | None
) -> None:
    if state is not None:
        state.require_base(digest, str(quant_state))
    below: str | None = None
    for folder, adapter in adapters:
        if adapter.base_sha256 is not None and adapter.base_sha256 != digest:
            raise UserError(
                "The adapter belongs to another base checkpoint.",
                where=str(folder),
                value=f"trained on base {adapter.base_sha256[:12]}…, this base is {digest[:12]}…",
                remedy="Give the base checkpoint that it was trained on.",
            )
        if adapter.parent_sha256 is not None and adapter.parent_sha256 != below:
            raise UserError(
                "The adapter was trained on top of another adapter than the one it is to be merged onto.",
                where=str(folder),
                value=f"trained on {adapter.parent_sha256[:12]}…, given {below[:12] if below else 'the bare base'}",
                remedy="Give the adapters in the order of their training: fine-tuning first, then distillation.",
            )
        below = adapter.sha256
