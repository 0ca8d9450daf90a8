"""Checkpoints to break: copies of the shipped tiny base, edited byte by byte or with the safetensors library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.export.doctor import diagnose

TINY_BASE = Path(__file__).resolve().parents[3] / "data" / "tiny_base"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDINGS = "backbone.embeddings.weight"


def copy_base(folder: Path) -> Path:
    shutil.copytree(TINY_BASE, folder)
    return folder


def shard(folder: Path) -> None:
    """Cut the single file in two, with an index, as the library would name them."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    halves = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, members in halves.items():
        save_file({name: tensors[name] for name in members}, folder / file, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {name: file for file, members in halves.items() for name in members}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def edit_tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    """An edit of the tensors by name."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return edit


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """An edit of the header of the single file; the data stays byte for byte."""

    def edit(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        write_raw(folder / WEIGHTS, json.dumps(header).encode(), raw[8 + length :])

    return edit


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """An edit of a JSON file."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        write_json(folder / name, content)

    return edit


def write_raw(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def codes(folder: Path, base: Path | None = TINY_BASE, deep: bool = False) -> set[str]:
    return {finding.code for finding in diagnose(folder, base, deep).findings}
