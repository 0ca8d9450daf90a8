"""One fault at a time in a good checkpoint: the doctor names it, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.export.doctor import Severity, diagnose
from tests.unit.doctor.planting import (
    EMBEDDINGS,
    INDEX,
    WEIGHTS,
    codes,
    copy_base,
    edit_header,
    edit_json,
    edit_tensors,
    shard,
    write_json,
    write_raw,
)

Edit = Callable[[Path], object]
FIRST = "model-00001-of-00002.safetensors"
LAYER = "backbone.layers.0.mixer"


def first_of(header: dict[str, Any]) -> dict[str, Any]:
    """The entry whose bytes come first."""
    found: dict[str, Any] = min(
        (entry for name, entry in header.items() if name != "__metadata__"), key=lambda entry: entry["data_offsets"]
    )
    return found


def repeat_name(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.dumps(json.loads(raw[8 : 8 + length])["lm_head.weight"])
    write_raw(folder / WEIGHTS, b'{"lm_head.weight":' + entry.encode() + b"," + raw[9 : 8 + length], raw[8 + length :])


def cut(name: str, count: int) -> Edit:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - count)


def overlap(header: dict[str, Any]) -> None:
    entries = sorted(
        (entry for name, entry in header.items() if name != "__metadata__"), key=lambda entry: entry["data_offsets"]
    )
    entries[1]["data_offsets"] = [entries[1]["data_offsets"][0] - 2, entries[1]["data_offsets"][1] - 2]


def hole(folder: Path) -> None:
    """Bytes of a forgotten tensor that is not the last."""
    edit_header(lambda header: header.pop(next(name for name in header if header[name] is first_of(header))))(folder)


def link_out(folder: Path) -> None:
    outside = folder.parent / "outside.json"
    (folder / "generation_config.json").rename(outside)
    (folder / "generation_config.json").symlink_to(outside)


def pipe(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    os.mkfifo(folder / "generation_config.json")


UNREAD = "names_unchecked"
READING: list[tuple[str, Edit, set[str]]] = [
    ("a shard cut off", cut(WEIGHTS, 100), {"shard_truncated", UNREAD}),
    ("bytes behind the last tensor", lambda f: (f / WEIGHTS).open("ab").write(b"x"), {"shard_trailing_bytes", UNREAD}),
    (
        "a header longer than the file",
        lambda f: (f / WEIGHTS).write_bytes((1 << 20).to_bytes(8, "little") + b"{}"),
        {"header_beyond_file", UNREAD},
    ),
    (
        "a header over the limit",
        lambda f: (f / WEIGHTS).write_bytes((1 << 40).to_bytes(8, "little") + b"{}"),
        {"header_too_large", UNREAD},
    ),
    ("an empty file", lambda f: (f / WEIGHTS).write_bytes(b""), {"header_beyond_file", UNREAD}),
    ("a header that is no JSON", lambda f: write_raw(f / WEIGHTS, b"{nonsense"), {"header_invalid", UNREAD}),
    ("a header that is a list", lambda f: write_raw(f / WEIGHTS, b"[]"), {"header_invalid", UNREAD}),
    ("a header nested without end", lambda f: write_raw(f / WEIGHTS, b"[" * 99999), {"json_bomb", UNREAD}),
    ("a header of too many values", lambda f: write_raw(f / WEIGHTS, b"," * 4_000_001), {"json_bomb", UNREAD}),
    ("a name twice in a header", repeat_name, {"header_repeated_name", UNREAD}),
    (
        "a dtype that does not exist",
        edit_header(lambda header: first_of(header).update(dtype="F12")),
        {"tensor_dtype_unknown", UNREAD},
    ),
    (
        "bytes that do not fit the shape",
        edit_header(lambda header: first_of(header).update(shape=[3])),
        {"tensor_size_wrong", UNREAD},
    ),
    (
        "a shape that is no list of numbers",
        edit_header(lambda header: first_of(header).update(shape=[-1, "x"])),
        {"tensor_entry_invalid", "tensors_hole", UNREAD},
    ),
    ("overlapping tensors", edit_header(overlap), {"tensors_overlap", "tensors_hole", UNREAD}),
    ("a hole between tensors", hole, {"tensors_hole", UNREAD}),
    (
        "metadata that is no text",
        edit_header(lambda header: header.update(__metadata__={"format": 1})),
        {"metadata_invalid", UNREAD},
    ),
    ("no metadata", edit_header(lambda header: header.pop("__metadata__")), {"metadata_format"}),
    ("no config.json", lambda f: (f / "config.json").unlink(), {"config_missing"}),
    ("a config.json that is no JSON", lambda f: (f / "config.json").write_text("{'a': 1}"), {"json_invalid"}),
    ("a config.json that is a list", lambda f: (f / "config.json").write_text("[]"), {"json_invalid"}),
    ("a config.json that is a bomb", lambda f: (f / "config.json").write_text("[" * 100 + "]" * 100), {"json_bomb"}),
    (
        "a huge number",
        lambda f: (f / "generation_config.json").write_text('{"a": ' + "9" * 5000 + "}"),
        {"json_invalid"},
    ),
    (
        "a key twice",
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("{", '{"vocab_size": 7,', 1)),
        {"json_repeated_key"},
    ),
    (
        "a template that is no UTF-8",
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"),
        {"text_invalid", "template_missing"},
    ),
    ("a link out of the folder", link_out, {"link_outside", "generation_missing"}),
    ("a pipe in place of a file", pipe, {"file_unreadable", "generation_missing"}),
    ("a pickle beside", lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), {"pickle_beside"}),
    ("a pickle in place", lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), {"weights_pickled"}),
    ("no weights", lambda f: (f / WEIGHTS).unlink(), {"weights_missing"}),
]


def two_homes(folder: Path) -> None:
    tensors = load_file(folder / FIRST)
    other = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(other) | {EMBEDDINGS: tensors[EMBEDDINGS]}, other, {"format": "pt"})


def remap(change: Callable[[dict[str, str]], object]) -> Edit:
    return edit_json(INDEX, lambda index: change(index["weight_map"]))


SHARDED: list[tuple[str, Edit, set[str]]] = [
    ("a path in the index", remap(lambda files: files.update({EMBEDDINGS: "../../x"})), {"index_path_outside", UNREAD}),
    ("an absolute path", remap(lambda files: files.update({EMBEDDINGS: "/etc/x"})), {"index_path_outside", UNREAD}),
    ("a shard that is missing", lambda f: (f / FIRST).unlink(), {"shard_missing", UNREAD}),
    ("no index", lambda f: (f / INDEX).unlink(), {"index_missing"}),
    ("an index without a map", lambda f: write_json(f / INDEX, {"weight_map": [1]}), {"index_invalid"}),
    (
        "a tensor in another shard",
        remap(lambda files: files.update({"lm_head.weight": FIRST})),
        {"index_wrong_shard"},
    ),
    ("a tensor left out of the index", remap(lambda files: files.pop(EMBEDDINGS)), {"index_tensor_unlisted"}),
    ("a tensor only in the index", remap(lambda files: files.update(ghost=FIRST)), {"index_tensor_missing"}),
    (
        "a wrong total",
        edit_json(INDEX, lambda index: index["metadata"].update(total_size=7)),
        {"index_total_size"},
    ),
    ("a tensor in two shards", two_homes, {"tensor_in_two_shards"}),
    (
        "a single file beside the shards",
        lambda f: save_file(load_file(f / FIRST), f / WEIGHTS, {"format": "pt"}),
        {"single_and_index"},
    ),
    (
        "a shard of another export",
        lambda f: save_file(load_file(f / FIRST), f / "model-00009-of-00009.safetensors", {"format": "pt"}),
        {"shard_unindexed"},
    ),
]


def rename(old: str, new: str) -> Edit:
    return edit_tensors(lambda tensors: tensors.update({new: tensors.pop(old)}))


def rename_all(change: Callable[[str], str]) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return edit_tensors(edit)


def retype(name: str, dtype: torch.dtype) -> Edit:
    return edit_tensors(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


def drop_expert(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "layers.1.mixer.experts.3." in name]:
        del tensors[name]


def fuse_experts(tensors: dict[str, Tensor]) -> None:
    experts = "backbone.layers.1.mixer.experts."
    names = sorted(name for name in tensors if name.startswith(experts) and "up_proj" in name)
    tensors[f"{experts}up_proj"] = torch.stack([tensors.pop(name) for name in names])


def tie(folder: Path) -> None:
    edit_json("config.json", lambda config: config.update(tie_word_embeddings=True))(folder)


NAMES: list[tuple[str, Edit, set[str]]] = [
    ("the embeddings renamed", rename(EMBEDDINGS, "backbone.embedding.weight"), {"tensor_renamed"}),
    ("memory names on disk", rename_all(lambda name: name.replace("backbone.", "model.", 1)), {"tensor_renamed"}),
    ("a wrapper's prefix", rename_all(lambda name: f"base_model.model.{name}"), {"tensor_renamed"}),
    ("a misspelt name", rename(f"{LAYER}.in_proj.weight", f"{LAYER}.in_prj.weight"), {"tensor_renamed"}),
    (
        "another layer's number",
        rename(f"{LAYER}.in_proj.weight", "backbone.layers.9.mixer.in_proj.weight"),
        {"tensor_missing", "tensor_extra"},
    ),
    ("a tensor lost", edit_tensors(lambda tensors: tensors.pop(f"{LAYER}.in_proj.weight")), {"tensor_missing"}),
    ("a tensor too many", edit_tensors(lambda tensors: tensors.update(ghost=torch.ones(2))), {"tensor_extra"}),
    (
        "a wrong shape",
        edit_tensors(lambda tensors: tensors.update({f"{LAYER}.D": torch.ones(3, dtype=torch.bfloat16)})),
        {"tensor_shape"},
    ),
    ("decay in eight bits", retype(f"{LAYER}.A_log", torch.float8_e4m3fn), {"special_dtype"}),
    (
        "the router's bias rounded",
        retype("backbone.layers.1.mixer.gate.e_score_correction_bias", torch.bfloat16),
        {"special_dtype"},
    ),
    ("half precision", retype(f"{LAYER}.in_proj.weight", torch.float16), {"tensor_dtype"}),
    ("single precision", retype(f"{LAYER}.in_proj.weight", torch.float32), {"tensor_dtype_wider"}),
    ("no output layer", edit_tensors(lambda tensors: tensors.pop("lm_head.weight")), {"lm_head_missing"}),
    ("an expert lost", edit_tensors(drop_expert), {"expert_count"}),
    ("experts in one tensor", edit_tensors(fuse_experts), {"experts_fused"}),
    (
        "an adapter beside the weights",
        edit_tensors(lambda tensors: tensors.update({f"{LAYER}.in_proj.lora_A.weight": torch.ones(4, 192)})),
        {"adapter_unmerged"},
    ),
    (
        "a training state",
        edit_tensors(lambda tensors: tensors.update({f"{LAYER}.in_proj.weight_quantizer._amax": torch.ones(1)})),
        {"quantizer_state"},
    ),
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return copy_base(tmp_path / "checkpoint")


def test_the_unbroken_copy_is_clean(checkpoint: Path) -> None:
    assert codes(checkpoint) == set()
    shard(checkpoint)
    assert codes(checkpoint) == set()


@pytest.mark.parametrize(("edit", "expected"), [case[1:] for case in READING], ids=[case[0] for case in READING])
def test_faults_of_reading(checkpoint: Path, edit: Edit, expected: set[str]) -> None:
    edit(checkpoint)
    assert codes(checkpoint) == expected


@pytest.mark.parametrize(("edit", "expected"), [case[1:] for case in SHARDED], ids=[case[0] for case in SHARDED])
def test_faults_of_shards_and_index(checkpoint: Path, edit: Edit, expected: set[str]) -> None:
    shard(checkpoint)
    edit(checkpoint)
    assert codes(checkpoint) == expected


@pytest.mark.parametrize("against", ["base", "config"])
@pytest.mark.parametrize(("edit", "expected"), [case[1:] for case in NAMES], ids=[case[0] for case in NAMES])
def test_faults_of_names_shapes_and_dtypes(checkpoint: Path, edit: Edit, expected: set[str], against: str) -> None:
    edit(checkpoint)
    found = codes(checkpoint) if against == "base" else codes(checkpoint, None)
    # The configuration implies names and shapes, but not which floating point was chosen.
    floats = {"tensor_dtype", "tensor_dtype_wider", "special_dtype"}
    assert found == expected or (against == "config" and expected <= floats and not found)


def test_a_tied_output_layer(checkpoint: Path) -> None:
    tie(checkpoint)
    assert codes(checkpoint, None) == {"lm_head_beside_tied"}
    assert codes(checkpoint, None, deep=True) == {"lm_head_beside_tied", "lm_head_differs_from_tied"}
    edit_tensors(lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDINGS].clone()}))(checkpoint)
    assert codes(checkpoint, None, deep=True) == {"lm_head_beside_tied"}
    edit_tensors(lambda tensors: tensors.pop("lm_head.weight"))(checkpoint)
    assert codes(checkpoint, None, deep=True) == set()


def test_a_tied_base_that_stores_its_output_layer(checkpoint: Path, tmp_path: Path) -> None:
    """Qwen3-0.6B does; a checkpoint without it has lost nothing."""
    tie(checkpoint)
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    edit_tensors(lambda tensors: tensors.pop("lm_head.weight"))(checkpoint)
    assert codes(checkpoint, base) == set()


def test_lost_prediction_layers(checkpoint: Path) -> None:
    edit_json("config.json", lambda config: config.update(num_nextn_predict_layers=1))(checkpoint)
    assert "mtp_missing" in codes(checkpoint, None)
    edit_tensors(lambda tensors: tensors.update({"mtp.layers.0.norm.weight": torch.ones(192)}))(checkpoint)
    assert "mtp_missing" not in codes(checkpoint, None) and "tensor_extra" not in codes(checkpoint, None)


@pytest.mark.parametrize(
    "fields",
    [{"model_type": "gpt_neox"}, {"hidden_size": "many"}, {"n_routed_experts": 2**39}, {"layers_block_type": [[]]}],
)
def test_what_is_not_known_is_said(checkpoint: Path, fields: dict[str, object]) -> None:
    edit_json("config.json", lambda config: config.update(fields))(checkpoint)
    assert "architecture_unknown" in codes(checkpoint, None)


DEEP: list[tuple[str, Edit, set[str]]] = [
    ("NaN", edit_tensors(lambda tensors: tensors[f"{LAYER}.D"].fill_(torch.nan)), {"tensor_not_finite"}),
    (
        "one infinity",
        edit_tensors(lambda tensors: tensors["lm_head.weight"].view(-1)[-1:].fill_(torch.inf)),
        {"tensor_not_finite"},
    ),
    ("zeros", edit_tensors(lambda tensors: tensors[f"{LAYER}.in_proj.weight"].zero_()), {"tensor_zero"}),
    ("nothing merged", lambda f: None, {"equals_base"}),
    # A piece holds 170 rows: what is true of the last piece only is no finding.
    ("one value changed", edit_tensors(lambda tensors: tensors["lm_head.weight"][0, 0].add_(1)), set()),
    ("zeros at the end", edit_tensors(lambda tensors: tensors["lm_head.weight"][-400:].zero_()), set()),
]


@pytest.mark.parametrize(("edit", "expected"), [case[1:] for case in DEEP], ids=[case[0] for case in DEEP])
def test_faults_of_contents(checkpoint: Path, edit: Edit, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.export.doctor.folder.CHUNK_BYTES", 1 << 16)  # several pieces a tensor
    edit(checkpoint)
    assert codes(checkpoint) == set(), "headers tell nothing of it"
    assert codes(checkpoint, deep=True) - {"kind_unchanged"} == expected
    if expected != {"equals_base"}:
        assert codes(checkpoint, None, deep=True) == expected


def test_a_half_merged_checkpoint_names_what_is_unchanged(checkpoint: Path) -> None:
    def merge_attention(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
                tensors[name] += 0.01

    edit_tensors(merge_attention)(checkpoint)
    diagnosis = diagnose(checkpoint, Path(copy_base(checkpoint.parent / "base")), deep=True)
    assert [finding.code for finding in diagnosis.findings] == ["kind_unchanged"] and diagnosis.clean
    assert "experts" in diagnosis.findings[0].problem and "q_proj" not in diagnosis.findings[0].problem


def test_findings_are_ordered_and_only_notes_are_clean(checkpoint: Path) -> None:
    edit_header(lambda header: header.pop("__metadata__"))(checkpoint)
    assert diagnose(checkpoint).clean
    edit_tensors(lambda tensors: tensors.pop("lm_head.weight"))(checkpoint)
    edit_header(lambda header: header.pop("__metadata__"))(checkpoint)
    diagnosis = diagnose(checkpoint)
    assert [finding.severity for finding in diagnosis.findings] == [Severity.ERROR, Severity.NOTE]
    assert not diagnosis.clean
