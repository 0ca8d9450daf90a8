"""The safe header parser against the safetensors library, on thousands of damaged files."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from qat.export.doctor.findings import Severity
from qat.export.doctor.header import DTYPE_BITS, Shard, read_shard
from tests.unit.doctor.planting import write_raw

SAMPLES = {"a": torch.ones(3, 2), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.tensor(1.0), "d": torch.ones(0)}


def read(path: Path) -> Shard:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_shard(descriptor, path.name)
    finally:
        os.close(descriptor)


def is_refused(path: Path) -> bool:
    return any(finding.severity is Severity.ERROR for finding in read(path).findings)


def library_refuses(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return False
    except SafetensorError:
        return True


def test_a_good_file_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    save_file(SAMPLES, tmp_path / "x.safetensors", {"format": "pt"})
    shard = read(tmp_path / "x.safetensors")
    assert shard.findings == () and shard.metadata == {"format": "pt"}
    raw = (tmp_path / "x.safetensors").read_bytes()
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert {tensor.name for tensor in shard.tensors} == set(file.keys())
        for tensor in shard.tensors:
            expected = file.get_tensor(tensor.name)
            assert tensor.shape == expected.shape and tensor.nbytes == expected.nbytes
            assert raw[tensor.start : tensor.end] == expected.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_has_the_librarys_size(tmp_path: Path, dtype: str) -> None:
    """24 values: a whole number of bytes for 4, 6 and 8 bits; the right size is accepted, one byte more is not."""
    path = tmp_path / "x.safetensors"
    for surplus in (0, 1):
        size = 24 * DTYPE_BITS[dtype] // 8 + surplus
        header = {"a": {"dtype": dtype, "shape": [24], "data_offsets": [0, size]}}
        write_raw(path, json.dumps(header).encode(), bytes(size))
        assert is_refused(path) == library_refuses(path) == bool(surplus)


def test_damaged_bytes_are_refused_where_the_library_refuses(tmp_path: Path) -> None:
    whole, path = save(SAMPLES, {"format": "pt"}), tmp_path / "x.safetensors"
    length = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(7)
    refused = 0
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(length)] = chance.choice(b'0123456789"[]{},:abFU \x00\xff')
        path.write_bytes(damaged)
        theirs, ours = library_refuses(path), is_refused(path)
        refused += theirs
        # Two tensors of one name are an error here and unseen there.
        repeated = any(finding.code == "header_repeated_name" for finding in read(path).findings)
        assert ours == theirs or (ours and repeated), bytes(damaged)
    assert 300 < refused < 1500


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole, path = save(SAMPLES), tmp_path / "x.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert is_refused(path) and library_refuses(path)
        assert all(tensor.end <= length for tensor in read(path).tensors)


VALUES = ["1e99", "-1", "18446744073709551616", "null", "true", "[]", "[[]]", '"x"', "{}", "NaN", "1.0", "[1,2,3]"]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_values_of_the_wrong_kind(tmp_path: Path, key: str, value: str) -> None:
    entry = {"dtype": '"U8"', "shape": "[4]", "data_offsets": "[0,4]"} | {key: value}
    header = '{"a": {' + ", ".join(f'"{name}": {text}' for name, text in entry.items()) + "}}"
    write_raw(tmp_path / "x.safetensors", header.encode(), bytes(4))
    assert is_refused(tmp_path / "x.safetensors") and library_refuses(tmp_path / "x.safetensors")


def test_findings_of_a_million_faults_stay_short(tmp_path: Path) -> None:
    header = json.dumps({f"name{number}": {} for number in range(100_000)}).encode()
    write_raw(tmp_path / "x.safetensors", header)
    shard = read(tmp_path / "x.safetensors")
    assert [finding.code for finding in shard.findings] == ["metadata_format", "tensor_entry_invalid"]
    assert all(len(finding.problem) < 300 for finding in shard.findings)
