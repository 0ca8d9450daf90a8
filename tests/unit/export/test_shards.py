"""Reading and writing safetensors against the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qat.errors import UserError
from qat.export.shards import (
    ShardWriter,
    TensorSpec,
    chunks,
    read_entries,
    read_header,
    read_tensor,
    split_into_shards,
    tensor_spec,
)


def samples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(5, 7, generator=generator)
    return {
        "bf16": wide.bfloat16(),
        "odd bytes": torch.arange(3, dtype=torch.uint8),
        "fp8": wide.to(torch.float8_e4m3fn),
        "scalar": torch.tensor(0.1),
        "float64": wide.double(),
        "int64": torch.tensor([-(2**40), 7]),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "transposed": wide.t(),
        "unicode \u0ca8": wide.half(),
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], limit: int = 1 << 30) -> ShardWriter:
    specs = [tensor_spec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    with ShardWriter(folder, specs, limit) as writer:
        for name in reversed(list(tensors)):  # any order of writing gives the same file
            writer.write(name, tensors[name])
        writer.finish()
    return writer


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    write(tmp_path, samples())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in samples().items():
            assert file.get_tensor(name).dtype == tensor.dtype
            assert torch.equal(file.get_tensor(name).contiguous().view(-1), tensor.contiguous().view(-1)), name
            assert file.get_tensor(name).shape == tensor.shape
    for name, entry in read_header(tmp_path / "model.safetensors").items():
        assert entry.offset % samples()[name].element_size() == 0, f"{name} is not aligned to its dtype"


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in samples().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    entries = read_entries(tmp_path)
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = read_tensor(entries[name])
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert b"".join(chunks(entries[name])) == raw
        assert found.numel() == 0 or found.reshape(-1).view(torch.uint8).numpy().tobytes() == raw


def test_a_tensor_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.export.shards.CHUNK_BYTES", 5)
    save_file({"w": torch.arange(33)}, tmp_path / "model.safetensors")
    entry = read_entries(tmp_path)["w"]
    assert torch.equal(read_tensor(entry), torch.arange(33))
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    with ShardWriter(fresh, [TensorSpec("x", entry.dtype, entry.shape, entry.nbytes)], 1 << 20) as writer:
        writer.write_bytes("x", chunks(entry))
        writer.finish()
    assert torch.equal(load_file(fresh / "model.safetensors")["x"], torch.arange(33))


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((10,), float(number)) for number in range(7)}  # 40 bytes each
    writer = write(tmp_path, tensors, limit=100)
    assert writer.files == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert writer.index is not None
    assert writer.index["metadata"] == {"total_size": 280}
    found: dict[str, torch.Tensor] = {}
    for name in writer.files:
        found |= load_file(tmp_path / name)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(writer.index))
    assert read_entries(tmp_path).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("sizes", "limit", "groups"),
    [([3, 3, 3], 6, [2, 1]), ([3, 3, 3], 9, [3]), ([9, 1, 1], 4, [1, 2]), ([1, 9, 1], 4, [1, 1, 1]), ([0, 0], 1, [2])],
)
def test_splitting_by_hand(sizes: list[int], limit: int, groups: list[int]) -> None:
    specs = [TensorSpec(str(number), "U8", (size,), size) for number, size in enumerate(sizes)]
    shards = split_into_shards(specs, limit)
    assert [len(shard) for shard in shards] == groups
    assert [spec for shard in shards for spec in shard] == specs


def test_a_forgotten_or_wrong_tensor_is_a_bug_not_a_hole(tmp_path: Path) -> None:
    specs = [tensor_spec("a", torch.float32, (2,)), tensor_spec("b", torch.float32, (2,))]
    with ShardWriter(tmp_path, specs, 1 << 20) as writer:
        writer.write("a", torch.ones(2))
        with pytest.raises(RuntimeError, match="not written"):
            writer.finish()
        with pytest.raises(RuntimeError, match="announced"):
            writer.write("b", torch.ones(3))
        with pytest.raises(RuntimeError, match="announced"):
            writer.write("b", torch.ones(1))


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(3, dtype=torch.uint8)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            read_entries(tmp_path)
        assert str(path) in str(caught.value)
    path.write_bytes(whole + b"x")
    with pytest.raises(UserError, match="behind its last tensor"):
        read_entries(tmp_path)
    path.write_bytes(whole)
    assert set(read_entries(tmp_path)) == {"a", "b"}


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": 1}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, -1]}}',
        b'{"a": {"dtype": "U8", "shape": null, "data_offsets": [0, 1]}}',
    ],
)
def test_a_damaged_header_is_a_user_error(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UserError):
        read_entries(tmp_path)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        read_entries(tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        read_entries(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="pickled weights are not read"):
        read_entries(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="index"):
        read_entries(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for content, message in (
        ("{", "cannot be read"),
        ('{"weight_map": {"a": "../part.safetensors"}}', "outside"),
        ('{"weight_map": {"a": "part.safetensors", "b": "part.safetensors"}}', "does not hold"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "missing"),
    ):
        index.write_text(content)
        with pytest.raises(UserError, match=message):
            read_entries(tmp_path)
    index.write_text('{"weight_map": {"a": "part.safetensors"}}')
    assert set(read_entries(tmp_path)) == {"a"}


def test_an_unknown_dtype_can_be_copied_but_not_computed_with(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x7f\x01")
    entry = read_entries(tmp_path)["a"]
    assert b"".join(chunks(entry)) == b"\x7f\x01"
    with pytest.raises(UserError, match="computed with"):
        read_tensor(entry)
