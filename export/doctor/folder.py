"""A stranger's checkpoint folder, opened: headers and configurations only, nothing outside it, faults as findings."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.errors import UserError
from qat.export.doctor.findings import Finding, Severity, examples
from qat.export.doctor.header import REFUSED, WRITE_AGAIN, Shard, TensorInfo, read_shard
from qat.export.doctor.safe_json import JsonBomb, JsonFault, parse_json
from qat.export.shards import CHUNK_BYTES, INDEX_NAME, SINGLE_NAME, TensorEntry, read_tensor

ADAPTER_WEIGHTS = "adapter_model.safetensors"
CHAT_TEMPLATE = "chat_template.jinja"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

_NUMBERED = re.compile(r"(?P<stem>.+)-\d{1,6}-of-(?P<total>\d{1,6})\.safetensors")

#: The largest published tokenizer.json takes 35 MB; every other text of a checkpoint is smaller.
_MAX_TEXT_BYTES = 64 << 20


@dataclass
class CheckpointView:
    """What the headers and configurations of a checkpoint or adapter folder say.

    Attributes:
        folder: The folder, resolved.
        files: Names of the regular files in it that may be opened; links out of it are findings instead.
        config: `config.json`; like the next five None where the file is missing or unusable (then a finding says so).
        generation_config: `generation_config.json`.
        hf_quant_config: `hf_quant_config.json`.
        tokenizer_config: `tokenizer_config.json`.
        adapter_config: `adapter_config.json`: the folder holds a PEFT adapter.
        index: `model.safetensors.index.json`.
        chat_template: Text of `chat_template.jinja`; a template in `tokenizer_config` is not looked for.
        shards: The safetensors files that loaders read, by name.
        tensors: Their usable tensors by name, in the order of files and bytes.
        findings: Faults of reading; `read_bytes`, `read_text` and `read_json` add theirs.
    """

    folder: Path
    files: frozenset[str]
    config: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = None
    hf_quant_config: dict[str, Any] | None = None
    tokenizer_config: dict[str, Any] | None = None
    adapter_config: dict[str, Any] | None = None
    index: dict[str, Any] | None = None
    chat_template: str | None = None
    shards: dict[str, Shard] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    _json: dict[str, dict[str, Any] | None] = field(default_factory=dict, repr=False)

    @property
    def whole(self) -> bool:
        """Whether every weight file was found and read without an error: only then a missing tensor is missing."""
        return not any(
            finding.code in ("shard_missing", "index_path_outside")
            or (finding.severity is Severity.ERROR and finding.place.endswith(".safetensors"))
            for finding in self.findings
        )

    def load(self, name: str) -> Tensor:
        """Read one tensor into memory that it owns; its dtype and shape are those of `tensors[name]`.

        Raises:
            UserError: Its dtype is one that torch cannot hold here, or the file changed meanwhile.
        """
        info = self.tensors[name]
        path = openable(self.folder, info.shard)
        return read_tensor(TensorEntry(path, info.dtype, info.shape, info.start, info.nbytes))

    def pieces(self, name: str) -> Iterator[bytearray]:
        """Read one tensor's bytes in pieces of at most `CHUNK_BYTES`, which every dtype's size divides.

        Raises:
            UserError: The file cannot be read or changed meanwhile.
        """
        info = self.tensors[name]
        try:
            with opened(self.folder, info.shard) as descriptor:
                for position in range(info.start, info.end, CHUNK_BYTES):
                    piece = bytearray(min(CHUNK_BYTES, info.end - position))
                    if os.preadv(descriptor, [piece], position) != len(piece):
                        raise OSError(errno.EIO, "it became shorter while it was read")
                    yield piece
        except OSError as error:
            raise UserError(
                "A weight file cannot be read.", where=str(self.folder / info.shard), value=error.strerror
            ) from error

    def read_text(self, name: str) -> str | None:
        """Read a UTF-8 file of the folder; None where it is missing or unusable (then a finding says so)."""
        raw = self.read_bytes(name)
        try:
            return None if raw is None else raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.findings.append(_unusable("text_invalid", Severity.ERROR, name, f"The file is not UTF-8: {error}"))
            return None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON object of the folder, once; None where it is missing or unusable (then a finding says so)."""
        if name not in self._json:
            self._json[name] = self._parse(name)
        return self._json[name]

    def _parse(self, name: str) -> dict[str, Any] | None:
        raw = self.read_bytes(name)
        if raw is None:
            return None
        try:
            value, repeated = parse_json(raw)
        except JsonFault as fault:
            code = "json_bomb" if isinstance(fault, JsonBomb) else "json_invalid"
            self.findings.append(_unusable(code, Severity.ERROR, name, f"The file is not usable JSON: {fault}"))
            return None
        if not isinstance(value, dict):
            self.findings.append(_unusable("json_invalid", Severity.ERROR, name, "The file holds no JSON object"))
            return None
        if repeated:
            problem = f"Keys that stand twice in one object: {examples(repeated)}"
            self.findings.append(_unusable("json_repeated_key", Severity.WARNING, name, problem))
        return value

    def read_bytes(self, name: str) -> bytes | None:
        """Read a small file of the folder; None where it is missing or unusable (then a finding says so)."""
        if name not in self.files:
            return None
        try:
            with opened(self.folder, name) as descriptor:
                if os.fstat(descriptor).st_size > _MAX_TEXT_BYTES:
                    problem = f"The file is larger than {_MAX_TEXT_BYTES >> 20} MiB"
                    self.findings.append(_unusable("file_too_large", Severity.ERROR, name, problem))
                    return None
                with os.fdopen(os.dup(descriptor), "rb") as file:
                    return file.read(_MAX_TEXT_BYTES)
        except OSError as error:
            self.findings.append(_unreadable(name, error))
            return None


def open_checkpoint(folder: Path) -> CheckpointView:
    """Read the headers and configurations of a checkpoint or adapter folder.

    Raises:
        UserError: The folder cannot be listed, or holds neither a configuration nor weights.
    """
    root = Path(os.path.realpath(folder))
    files, findings = _list(root, folder)
    view = CheckpointView(root, files, findings=findings)
    if not any(_belongs(file) for file in files) and not findings:
        raise UserError(
            "The folder holds no checkpoint.",
            where=str(folder),
            remedy="Give a folder with config.json and safetensors, or with a PEFT adapter.",
        )
    view.config = view.read_json("config.json")
    view.generation_config = view.read_json("generation_config.json")
    view.hf_quant_config = view.read_json("hf_quant_config.json")
    view.tokenizer_config = view.read_json("tokenizer_config.json")
    view.adapter_config = view.read_json("adapter_config.json")
    view.index = view.read_json(INDEX_NAME)
    view.chat_template = view.read_text(CHAT_TEMPLATE)
    for name in _loaded_files(view):
        try:
            with opened(root, name) as descriptor:
                shard = read_shard(descriptor, name)
        except OSError as error:
            view.findings.append(_unreadable(name, error))
            continue
        view.shards[name] = shard
        view.findings.extend(shard.findings)
        view.tensors.update({tensor.name: tensor for tensor in shard.tensors})
    return view


def openable(root: Path, name: str) -> Path:
    """Resolve a file of the folder.

    Raises:
        OSError: It does not exist, or a link leads out of the folder. The hub's cache is no way out: there a folder of
            `snapshots` links into `blobs` beside it.
    """
    path = Path(os.path.realpath(root / name, strict=True))
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if not path.is_relative_to(root) and path.parent != blobs:
        raise OSError(errno.EXDEV, "the link leads out of the folder")
    return path


@contextmanager
def opened(root: Path, name: str) -> Iterator[int]:
    """Open a file of the folder for reading; the descriptor is closed in the end.

    Raises:
        OSError: As `openable`, or it is no regular file (a pipe would wait for a writer without end).
    """
    descriptor = os.open(openable(root, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def is_adapter(view: CheckpointView) -> bool:
    """Whether the folder holds a PEFT adapter and no model."""
    return view.adapter_config is not None and view.config is None


def plain_name(name: object) -> bool:
    """Whether this names a file right in a folder: no path, nothing special."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _list(root: Path, given: Path) -> tuple[frozenset[str], list[Finding]]:
    """The files of the folder that may be opened, and the ones that may not."""
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        raise UserError(
            "The checkpoint folder cannot be read.",
            where=str(given),
            value=error.strerror,
            remedy="Give a folder on this machine with config.json and safetensors.",
        ) from error
    files: set[str] = set()
    findings: list[Finding] = []
    for name in names:
        try:
            path = openable(root, name)
            if path.is_file():
                files.add(name)
            elif _belongs(name):
                raise OSError(errno.EINVAL, "no regular file")
        except OSError as error:
            if _belongs(name):
                findings.append(_unreadable(name, error))
    return frozenset(files), findings


def _belongs(name: str) -> bool:
    return name.endswith((".json", ".jinja", ".safetensors", *PICKLES))


def _loaded_files(view: CheckpointView) -> list[str]:
    """Name the safetensors files that loaders read; what is wrong with the choice goes to the findings."""
    found = sorted(file for file in view.files if file.endswith(".safetensors"))
    if is_adapter(view):
        return [file for file in found if file == ADAPTER_WEIGHTS]
    weights = [file for file in found if file != ADAPTER_WEIGHTS]
    if view.index is not None:
        indexed = _indexed_files(view)
        if indexed is not None:
            return indexed
    if SINGLE_NAME in weights:
        return [SINGLE_NAME]
    _check_series(view, weights)
    return weights


def _check_series(view: CheckpointView, weights: list[str]) -> None:
    """Without an index the numbers in the names alone say how many files there were."""
    present: dict[tuple[str, int], int] = {}
    for file in weights:
        if match := _NUMBERED.fullmatch(file):
            series = (match["stem"], int(match["total"]))
            present[series] = present.get(series, 0) + 1
    for (stem, total), count in present.items():
        if count < total:
            view.findings.append(_missing(stem, f"The names announce {total} files, {count} are there"))


def weight_map_of(view: CheckpointView) -> dict[str, str] | None:
    """The index's tensor names with their files; None where there is no usable index."""
    weight_map = (view.index or {}).get("weight_map")
    if isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values()):
        return weight_map
    return None


def _indexed_files(view: CheckpointView) -> list[str] | None:
    """The existing files of the index, sorted; None where it has no usable map."""
    weight_map = weight_map_of(view)
    if weight_map is None:
        problem = "The index has no `weight_map` of tensor names to file names"
        view.findings.append(_unusable("index_invalid", Severity.ERROR, INDEX_NAME, problem))
        return None
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if not plain_name(name)]
    if outside:
        view.findings.append(
            Finding(
                "index_path_outside",
                Severity.ERROR,
                INDEX_NAME,
                f"The index names paths instead of files of this folder: {examples(outside)}",
                "A careless reader would open a file outside the checkpoint; nothing of it was opened here.",
                "Do not load this checkpoint; fetch it from a source that you trust.",
            )
        )
    missing = {name for name in names if plain_name(name) and name not in view.files}
    if missing:
        lost = sum(file in missing for file in weight_map.values())
        problem = f"Files of the index are not in the folder: {examples(sorted(missing))}; they hold {lost} tensors"
        view.findings.append(_missing(INDEX_NAME, problem))
    return [name for name in names if plain_name(name) and name in view.files]


def _missing(place: str, problem: str) -> Finding:
    consequence = "The checkpoint cannot be loaded."
    return Finding("shard_missing", Severity.ERROR, place, problem, consequence, "Fetch the missing files.")


def _unusable(code: str, severity: Severity, name: str, problem: str) -> Finding:
    return Finding(code, severity, name, problem, "Readers refuse the file or understand it differently.", WRITE_AGAIN)


def _unreadable(name: str, error: OSError) -> Finding:
    if error.errno == errno.EXDEV:
        return Finding(
            "link_outside",
            Severity.ERROR,
            name,
            "The file is a link to a place outside the folder",
            "The checkpoint does not hold what it seems to hold; the link was not followed.",
            "Replace the link by the file, where you trust its target.",
        )
    problem = f"The file cannot be read: {error.strerror}"
    return Finding("file_unreadable", Severity.ERROR, name, problem, REFUSED, WRITE_AGAIN)
