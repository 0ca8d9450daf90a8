"""A carried folder: what is missing, cut, swapped or altered is named; `sha256sum` is the oracle of the hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from qat.errors import UserError
from qat.fetch.folder import SUMS, check_folder, place
from qat.recipe.schema import BaseBlock
from tests.unit.fetch.conftest import checkpoint
from tests.unit.fetch.stub_hub import blob_id

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BLOCK = BaseBlock(model="someone/small", family="llama")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    where = tmp_path / "carried"
    for name, content in checkpoint().items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(content)
    return where


def test_a_whole_folder_without_hashes_says_so(folder: Path) -> None:
    checked = check_folder(folder, BLOCK)
    assert checked.hashed == 0 and "no hashes" in checked.by
    assert FIRST in checked.files and "pytorch_model.bin" not in checked.files and "modeling.py" not in checked.files


def test_what_place_writes_sha256sum_and_check_accept(folder: Path, tmp_path: Path) -> None:
    out = place(folder, check_folder(folder, BLOCK).files, tmp_path / "out")
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == len(list(out.iterdir())) - 1
    checked = check_folder(out, BLOCK)
    assert checked.hashed == len(checked.files) and checked.by == SUMS
    assert (out / FIRST).stat().st_ino == (folder / FIRST).stat().st_ino  # a link: no second 63 GB
    assert place(out, checked.files, out) == out  # onto itself


def test_across_disks_it_copies(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "other disk")

    monkeypatch.setattr(os, "link", refuse)
    out = place(folder, [FIRST], tmp_path / "out")
    assert (out / FIRST).read_bytes() == (folder / FIRST).read_bytes()
    assert (out / FIRST).stat().st_ino != (folder / FIRST).stat().st_ino


def test_an_altered_byte_is_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = place(folder, check_folder(folder, BLOCK).files, tmp_path / "out")
    content = (out / SECOND).read_bytes()
    (out / SECOND).unlink()
    (out / SECOND).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="other bytes than its hash") as fault:
        check_folder(out, BLOCK)
    assert SECOND in fault.value.where


def test_the_traces_of_hf_download_are_used(folder: Path) -> None:
    traces = folder / ".cache" / "huggingface" / "download"
    traces.mkdir(parents=True)
    config, shard = (folder / "config.json").read_bytes(), (folder / FIRST).read_bytes()
    for name, digest in (("config.json", blob_id(config)), (FIRST, hashlib.sha256(shard).hexdigest())):
        (traces / f"{name}.metadata").write_text(f"{'c' * 40}\n{digest}\n1700000000.0\n")
    assert check_folder(folder, BLOCK).hashed == 2
    (folder / "config.json").write_bytes(config + b" ")
    with pytest.raises(UserError, match="other bytes"):
        check_folder(folder, BLOCK)


def test_a_cut_shard(folder: Path) -> None:
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        check_folder(folder, BLOCK)


def test_a_shard_that_is_none(folder: Path) -> None:
    (folder / FIRST).write_bytes(b"<html>not found</html>" * 10)
    with pytest.raises(UserError, match="no safetensors file"):
        check_folder(folder, BLOCK)


def test_a_missing_shard(folder: Path) -> None:
    (folder / SECOND).unlink()
    with pytest.raises(UserError, match="1 of 2 weight files are missing"):
        check_folder(folder, BLOCK)


def test_index_and_shards_of_two_downloads(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w1": FIRST, "other": SECOND}}))
    with pytest.raises(UserError, match="lacks 1 tensors"):
        check_folder(folder, BLOCK)


def test_another_family(folder: Path) -> None:
    with pytest.raises(UserError, match="no nemotron_h model"):
        check_folder(folder, BLOCK.model_copy(update={"family": "nemotron_h"}))


def test_hashes_that_do_not_name_every_file(folder: Path) -> None:
    (folder / SUMS).write_text(f"{'0' * 64}  {FIRST}\n")
    with pytest.raises(UserError, match="different files"):
        check_folder(folder, BLOCK)
    (folder / SUMS).write_text("nonsense\n")
    with pytest.raises(UserError, match="no hash and name"):
        check_folder(folder, BLOCK)
