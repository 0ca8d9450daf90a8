"""The mended copy: what is mended is right, what is untouched is the same file, the original stays as it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qat.errors import UserError
from qat.export.doctor import diagnose, repair
from tests.unit.doctor.planting import (
    EMBEDDINGS,
    INDEX,
    TINY_BASE,
    WEIGHTS,
    codes,
    copy_base,
    edit_header,
    edit_json,
    edit_tensors,
    shard,
    write_json,
)
from tests.unit.doctor.test_planted import hole, remap, rename, rename_all

SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return copy_base(tmp_path / "checkpoint")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def mend(checkpoint: Path, base: Path | None = TINY_BASE) -> tuple[Path, list[str]]:
    """Mend and check what holds for every repair."""
    before = digests(checkpoint)
    out = checkpoint.parent / "mended"
    steps = repair(checkpoint, base, out)
    assert digests(checkpoint) == before, "the original was changed"
    assert out.exists() == bool(steps)
    assert not [path for path in checkpoint.parent.iterdir() if path.name.startswith(".")], "something was left behind"
    for path in out.iterdir() if steps else ():
        twin = checkpoint / path.name
        changed = not twin.exists() or twin.read_bytes() != path.read_bytes()
        linked = twin.exists() and os.path.samefile(path, twin)
        assert linked == (path.suffix == ".safetensors" and not changed), path.name
    return out, steps


RENAMES = {
    "embeddings": rename(EMBEDDINGS, "backbone.embedding.weight"),
    "all": rename_all(lambda name: name.replace("backbone.", "model.", 1)),
    "a wrapper": rename_all(lambda name: f"base_model.model.{name}"),
}


@pytest.mark.parametrize("base", [TINY_BASE, None], ids=["base", "config"])
@pytest.mark.parametrize("edit", RENAMES.values(), ids=RENAMES)
def test_renamed_tensors_get_their_names_back(checkpoint: Path, edit: object, base: Path | None) -> None:
    edit(checkpoint)  # type: ignore[operator]
    out, _ = mend(checkpoint, base)
    assert codes(out, base) == set()
    expected = load_file(TINY_BASE / WEIGHTS)
    found = load_file(out / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_scales_are_renamed_with_their_weight(checkpoint: Path) -> None:
    weight = "backbone.layers.0.mixer.in_proj.weight"

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        rows, columns = tensors.pop(weight).shape
        tensors["model.layers.0.mixer.in_proj.weight"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        tensors["model.layers.0.mixer.in_proj.weight_scale"] = torch.ones(rows, columns // 16)
        tensors["model.layers.0.mixer.in_proj.input_scale"] = torch.ones(())

    edit_tensors(pack)(checkpoint)
    out, _ = mend(checkpoint)
    names = load_file(out / WEIGHTS).keys()
    assert {weight, f"{weight}_scale", "backbone.layers.0.mixer.in_proj.input_scale"} <= names
    assert not any(name.startswith("model.") for name in names)


@pytest.mark.parametrize(
    "edit",
    [
        lambda folder: (folder / INDEX).unlink(),
        lambda folder: (folder / INDEX).write_text("{"),
        lambda folder: write_json(folder / INDEX, {"weight_map": 7}),
        remap(lambda files: files.update({"lm_head.weight": "model-00001-of-00002.safetensors"})),
        remap(lambda files: files.pop(EMBEDDINGS)),
        edit_json(INDEX, lambda index: index["metadata"].update(total_size=7)),
    ],
)
def test_the_index_is_rebuilt_and_the_shards_are_linked(checkpoint: Path, edit: object) -> None:
    shard(checkpoint)
    expected = json.loads((checkpoint / INDEX).read_text())
    edit(checkpoint)  # type: ignore[operator]
    out, steps = mend(checkpoint)
    assert json.loads((out / INDEX).read_text()) == expected and codes(out) == set()
    assert len(steps) == 1 and all(os.path.samefile(path, checkpoint / path.name) for path in out.glob("*.safetensors"))


def test_only_the_changed_shard_is_written(checkpoint: Path) -> None:
    shard(checkpoint)
    tensors = load_file(checkpoint / SECOND)
    tensors["output.lm_head.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, checkpoint / SECOND, {"format": "pt"})
    out, _ = mend(checkpoint)
    assert codes(out) == set()
    assert not os.path.samefile(out / SECOND, checkpoint / SECOND)
    assert load_all(out).keys() == load_file(TINY_BASE / WEIGHTS).keys()


@pytest.mark.parametrize(
    "edit",
    [
        lambda folder: (folder / WEIGHTS).open("ab").write(b"tail"),
        edit_header(lambda header: header.pop("__metadata__")),
        edit_header(lambda header: header.update(__metadata__={"format": 1})),
    ],
)
def test_a_file_is_written_anew_without_its_fault(checkpoint: Path, edit: object) -> None:
    edit(checkpoint)  # type: ignore[operator]
    out, _ = mend(checkpoint)
    assert codes(out) == set()
    with safe_open(out / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in load_file(TINY_BASE / WEIGHTS).items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_a_hole_is_closed_and_the_lost_tensor_stays_lost(checkpoint: Path) -> None:
    hole(checkpoint)
    out, _ = mend(checkpoint)
    assert codes(out) <= {"tensor_missing", "lm_head_missing"} and codes(out)


def test_configuration_and_companions_come_from_the_base(checkpoint: Path) -> None:
    edit_json(
        "config.json",
        lambda config: config.update(routed_scaling_factor=1.0, architectures=None, layer_norm_epsilon=0.1),
    )(checkpoint)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (checkpoint / name).unlink()
    out, steps = mend(checkpoint)
    assert codes(out) == set() and len(steps) == 5
    assert json.loads((out / "config.json").read_text()) == json.loads((TINY_BASE / "config.json").read_text())
    assert digests(out) | {"config.json": ""} == digests(TINY_BASE) | {"config.json": ""}


def test_a_broken_config_is_replaced(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    out, _ = mend(checkpoint)
    assert codes(out) == set()


def test_the_quantization_stays_the_checkpoints_own(checkpoint: Path) -> None:
    own = {"quant_algo": "NVFP4", "ignore": ["lm_head.\0backbone.pt_name_sentinel", "lm_head", "mixer.gate"]}
    edit_json("config.json", lambda config: config.update(quantization_config=own, n_groups=7))(checkpoint)
    exclude = {"exclude_modules": own["ignore"]}
    write_json(checkpoint / "hf_quant_config.json", {"quantization": exclude})
    out, _ = mend(checkpoint)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {"quant_algo": "NVFP4", "ignore": ["lm_head", "mixer.gate"]}
    assert config["n_groups"] == json.loads((TINY_BASE / "config.json").read_text())["n_groups"]
    mended = json.loads((out / "hf_quant_config.json").read_text())
    assert mended == {"quantization": {"exclude_modules": ["lm_head", "mixer.gate"]}}


def test_fields_of_another_network_are_left_alone(checkpoint: Path) -> None:
    """A grown vocabulary: the base's config.json would contradict the weights."""

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for name in (EMBEDDINGS, "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:16]])

    edit_tensors(grow)(checkpoint)
    edit_json("config.json", lambda config: config.update(vocab_size=config["vocab_size"] + 16))(checkpoint)
    _, steps = mend(checkpoint)
    assert steps == []


def test_architectures_without_a_base(checkpoint: Path) -> None:
    edit_json("config.json", lambda config: config.update(architectures=None))(checkpoint)
    out, _ = mend(checkpoint, None)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["NemotronHForCausalLM"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda folder: None,
        edit_tensors(lambda tensors: tensors.pop("lm_head.weight")),
        edit_tensors(lambda tensors: tensors["lm_head.weight"].fill_(torch.nan)),
        lambda folder: os.truncate(folder / WEIGHTS, 5000),
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b""),
    ],
)
def test_nothing_is_written_where_nothing_can_be_mended(checkpoint: Path, edit: object) -> None:
    edit(checkpoint)  # type: ignore[operator]
    _, steps = mend(checkpoint)
    assert steps == []


def test_an_index_that_names_lost_tensors_is_not_hidden(checkpoint: Path) -> None:
    shard(checkpoint)
    remap(lambda files: files.update(ghost=SECOND))(checkpoint)
    _, steps = mend(checkpoint)
    assert steps == []


def test_what_is_left_out_and_what_comes_along(checkpoint: Path) -> None:
    edit_header(lambda header: header.pop("__metadata__"))(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    (checkpoint / "export.json").write_text("{}")
    (checkpoint / "extra").mkdir()
    (checkpoint / "extra" / "x.jinja").write_text("x")
    (checkpoint / "extra" / "out").symlink_to(checkpoint.parent)
    (checkpoint / "away").symlink_to(checkpoint.parent)
    out, steps = mend_without_link_check(checkpoint)
    assert sorted(path.name for path in out.iterdir()) == sorted([*(p.name for p in TINY_BASE.iterdir()), "extra"])
    assert [path.name for path in (out / "extra").iterdir()] == ["x.jinja"] and len(steps) == 3


def mend_without_link_check(checkpoint: Path) -> tuple[Path, list[str]]:
    out = checkpoint.parent / "mended"
    return out, repair(checkpoint, TINY_BASE, out)


def test_places_that_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    edit_header(lambda header: header.pop("__metadata__"))(checkpoint)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "export.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = digests(checkpoint)
    for out in (checkpoint, checkpoint / "inside", TINY_BASE / "inside", tmp_path / "full", tmp_path / "link"):
        with pytest.raises(UserError):
            repair(checkpoint, TINY_BASE, out)
    assert digests(checkpoint) == before
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["export.json"]
    assert not any(path.exists() for path in (checkpoint / "inside", TINY_BASE / "inside", tmp_path / "nowhere"))


def test_a_full_disk_leaves_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_header(lambda header: header.pop("__metadata__"))(checkpoint)

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(UserError, match="full"):
        repair(checkpoint, TINY_BASE, checkpoint.parent / "mended")
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_another_file_system_gets_copies(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(checkpoint)
    (checkpoint / INDEX).unlink()

    def other_device(source: object, target: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_device)
    out = checkpoint.parent / "mended"
    assert repair(checkpoint, None, out) and not diagnose(out, TINY_BASE).findings
    assert not os.path.samefile(out / SECOND, checkpoint / SECOND)
