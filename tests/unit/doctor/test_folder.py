"""Opening folders of strangers: nothing outside, no waiting, no traceback."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qat.errors import UserError
from qat.export.doctor import Finding, Severity, diagnose
from qat.export.doctor.findings import cleaned, examples
from qat.export.doctor.folder import open_checkpoint, opened, plain_name
from qat.export.doctor.safe_json import JsonBomb, JsonFault, parse_json
from tests.unit.doctor.planting import INDEX, TINY_BASE, WEIGHTS, copy_base, shard, write_json


@pytest.mark.parametrize("make", ["absent", "empty", "file", "unrelated"])
def test_what_is_no_checkpoint_is_a_user_error(tmp_path: Path, make: str) -> None:
    folder = tmp_path / "x"
    if make == "file":
        folder.write_text("{}")
    elif make != "absent":
        folder.mkdir()
    if make == "unrelated":
        (folder / "notes.md").write_text("hello")
    with pytest.raises(UserError):
        open_checkpoint(folder)


def test_loading_gives_the_librarys_tensors() -> None:
    view = open_checkpoint(TINY_BASE)
    expected = load_file(TINY_BASE / WEIGHTS)
    assert view.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(view.load(name), tensor) and view.load(name).dtype == tensor.dtype
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert b"".join(view.pieces(name)) == raw


def test_no_file_outside_the_folder_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_base(tmp_path / "checkpoint")
    shard(folder)
    secret = tmp_path / "secret.safetensors"
    shutil.copy(TINY_BASE / WEIGHTS, secret)
    index = json.loads((folder / INDEX).read_text())
    names = list(index["weight_map"])
    tricks = [f"../{secret.name}", str(secret), "a/../../x", "..", "\0", "linked.safetensors"]
    for name, file in zip(names, tricks, strict=False):
        index["weight_map"][name] = file
    write_json(folder / INDEX, index)
    (folder / "linked.safetensors").symlink_to(secret)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/etc/hostname")
    opened: list[str] = []
    real_open = os.open

    def spy(path: str, *args: int, **kwargs: int) -> int:
        descriptor = real_open(path, *args, **kwargs)
        opened.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        return descriptor

    monkeypatch.setattr(os, "open", spy)
    found = {finding.code for finding in diagnose(folder, deep=True).findings}
    assert {"index_path_outside", "link_outside"} <= found
    assert opened and all(Path(path).is_relative_to(folder.resolve()) for path in opened)


def test_the_hubs_cache_is_no_way_out(tmp_path: Path) -> None:
    """`snapshots/<revision>` holds links into `blobs`: the usual home of a downloaded checkpoint."""
    snapshot = tmp_path / "models--x" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for path in TINY_BASE.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert not diagnose(snapshot, TINY_BASE).findings
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../elsewhere.json")
    (tmp_path / "elsewhere.json").write_text("{}")
    assert "link_outside" in {finding.code for finding in diagnose(snapshot).findings}


def test_what_became_no_regular_file_meanwhile_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "absent"):
        with pytest.raises(OSError), opened(tmp_path, name):
            pass


@pytest.mark.parametrize("name", ["x.safetensors", "a b.safetensors", ".hidden"])
def test_plain_names(name: str) -> None:
    assert plain_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "/x", "a/b", "../x", "a\\b", "a\0b", 7, None])
def test_names_that_are_paths(name: object) -> None:
    assert not plain_name(name)


def test_json_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_json(b'{"a": [1, {"b": null}]}').value == {"a": [1, {"b": None}]}
    assert parse_json(b'{"a": 1, "a": 2, "b": {"c": 1, "c": 1}}').repeated == ["c", "a"]
    for text in (b"", b"{", b"\xff", b"'a'", b"9" * 5000, b"\xef\xbb\xbf{}"):
        with pytest.raises(JsonFault):
            parse_json(text)
    assert parse_json(b"[" * 63 + b"]" * 63).value
    for text in (b"[" * 65 + b"]" * 65, b'{"a":' * 100_000, b"[" * 1_000_000):
        with pytest.raises(JsonBomb):
            parse_json(text)
    monkeypatch.setattr("qat.export.doctor.safe_json.MAX_VALUES", 3)
    with pytest.raises(JsonBomb):
        parse_json(b"[1,2,3,4]")


def test_findings_are_safe_to_print() -> None:
    finding = cleaned(Finding("code", Severity.NOTE, "\x1b[31m\0", "\ud800 \u0ca8", "a\nb", "x" * 5000))
    assert finding.place == "\\x1b[31m\\x00" and finding.problem == "\\ud800 \u0ca8" and finding.consequence == "a\\nb"
    assert len(finding.remedy) < 500
    finding.problem.encode()
    assert examples("abc") == "a, b, c" and examples("abcd") == "a, b, c, … (4 in all)"


def corrupt(value: object, chance: random.Random) -> object:
    """Replace one value somewhere in a document by something of another kind."""
    odd = [None, -1, 2**70, "", "\0", [], [[]], {}, {"a": []}, True, float("inf"), "x" * 1000, [None] * 3]
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        return {**value, key: corrupt(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        return [*value[:place], corrupt(value[place], chance), *value[place + 1 :]]
    return chance.choice(odd)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", INDEX])
def test_any_value_in_a_configuration_is_survived(tmp_path: Path, name: str) -> None:
    """Values of the wrong kind anywhere: findings or none, never an exception."""
    folder = copy_base(tmp_path / "checkpoint")
    (folder / "tokenizer.json").unlink()  # parsing it again and again is what would take the time
    (folder / "chat_template.jinja").unlink()
    if name == INDEX:
        shard(folder)
    content = json.loads((folder / name).read_text())
    chance = random.Random(name)
    for _ in range(60):
        write_json(folder / name, corrupt(content, chance))
        diagnosis = diagnose(folder, TINY_BASE)
        json.dumps(diagnosis.to_json(), allow_nan=False).encode()
