"""The quantizer state on disk: whole, checked, always the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qat.errors import UserError
from qat.quant.state import ModuleState, QuantState


def state() -> QuantState:
    modules = {
        "backbone.layers.1.mixer.experts.up_proj": ModuleState(torch.tensor([1.5, 2.5, 0.25]), torch.tensor(7.0)),
        "backbone.layers.0.mixer.in_proj": ModuleState(torch.tensor(3.0), torch.tensor(0.1)),
    }
    return QuantState(
        modules=modules,
        preset="all",
        kv_cache="bf16",
        groups=[["a.q_proj", "a.k_proj", "a.v_proj"]],
        excluded=["lm_head"],
        base_sha256="f" * 64,
        adapter="adapter",
    )


def test_round_trip(tmp_path: Path) -> None:
    saved = state()
    saved.save(tmp_path / "quant_state.safetensors")
    loaded = QuantState.load(tmp_path / "quant_state.safetensors")
    assert set(loaded.modules) == set(saved.modules)
    for name, ranges in saved.modules.items():
        assert torch.equal(loaded.modules[name].weight_amax, ranges.weight_amax)
        assert torch.equal(loaded.modules[name].input_amax, ranges.input_amax)
    for field in ("preset", "kv_cache", "groups", "excluded", "base_sha256", "adapter", "qat_version"):
        assert getattr(loaded, field) == getattr(saved, field)
    assert [path.name for path in tmp_path.iterdir()] == ["quant_state.safetensors"]


def test_another_reader_sees_the_documented_layout(tmp_path: Path) -> None:
    state().save(tmp_path / "s")
    with safe_open(tmp_path / "s", "pt") as file:
        assert file.get_tensor("backbone.layers.1.mixer.experts.up_proj.weight_amax").tolist() == [1.5, 2.5, 0.25]
        entry = file.get_tensor("backbone.layers.0.mixer.in_proj.input_amax")
        assert entry.shape == () and entry.dtype == torch.float32
        metadata = file.metadata()
    assert json.loads(metadata["groups"]) == [["a.q_proj", "a.k_proj", "a.v_proj"]]
    assert json.loads(metadata["format_version"]) == 1


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = state(), state()
    second.modules = dict(reversed(second.modules.items()))
    first.save(tmp_path / "a")
    second.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "s"
    state().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged or truncated"):
        QuantState.load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no quantizer state"):
        QuantState.load(tmp_path / "s")


def test_another_version(tmp_path: Path) -> None:
    path = tmp_path / "s"
    state().save(path)
    # the same length, so that the file stays whole
    path.write_bytes(path.read_bytes().replace(b'"format_version":"1"', b'"format_version":"9"'))
    with pytest.raises(UserError, match="another format version"):
        QuantState.load(path)


def rewrite(path: Path, tensors: dict[str, torch.Tensor], **changed: object) -> None:
    content = {
        "format_version": 1,
        "preset": "all",
        "kv_cache": "bf16",
        "groups": [],
        "excluded": [],
        "base_sha256": "f",
        "adapter": None,
        "qat_version": "0",
    }
    save_file(tensors, path, metadata={key: json.dumps(value) for key, value in {**content, **changed}.items()})


def test_files_that_are_no_state(tmp_path: Path) -> None:
    path = tmp_path / "s"
    good = {"m.weight_amax": torch.tensor(1.0), "m.input_amax": torch.tensor(1.0)}
    rewrite(path, good)
    QuantState.load(path)
    rewrite(path, good, groups="none")
    with pytest.raises(UserError, match="no groups"):
        QuantState.load(path)
    rewrite(path, {"m.weight_amax": torch.tensor(1.0)})
    with pytest.raises(UserError, match="lacks one"):
        QuantState.load(path)
    rewrite(path, {**good, "m.weight": torch.tensor(1.0)})
    with pytest.raises(UserError, match="no range"):
        QuantState.load(path)
    for bad in (torch.tensor(0.0), torch.tensor(float("nan")), torch.ones((), dtype=torch.float16), torch.ones(2, 2)):
        rewrite(path, {**good, "m.weight_amax": bad})
        with pytest.raises(UserError, match="positive finite"):
            QuantState.load(path)


def test_only_valid_ranges_are_written(tmp_path: Path) -> None:
    broken = state()
    broken.modules["m"] = ModuleState(torch.tensor(0.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="no valid ranges"):
        broken.save(tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_another_base() -> None:
    state().require_base("f" * 64, "base")
    with pytest.raises(UserError, match="another base checkpoint"):
        state().require_base("0" * 64, "base")


def mixed() -> QuantState:
    found = state()
    one = torch.tensor(1.5)
    found.modules = {
        "a": ModuleState(one, one),
        "b": ModuleState(one, None, "w4a16"),
        "c": ModuleState(one, one, "fp8"),
    }
    found.preset = "mine"
    return found


def test_formats_are_kept_and_raise_the_version(tmp_path: Path) -> None:
    mixed().save(tmp_path / "mixed")
    found = QuantState.load(tmp_path / "mixed")
    assert {name: module.format for name, module in found.modules.items()} == {"a": "nvfp4", "b": "w4a16", "c": "fp8"}
    assert found.modules["b"].input_amax is None
    assert found.precision().own == {"a": "nvfp4", "b": "w4a16", "c": "fp8"}
    # What an older release can read is written as it knows it.
    state().save(tmp_path / "plain")
    headers = [(tmp_path / name).read_bytes() for name in ("mixed", "plain")]
    assert [b'"format_version":"2"' in header for header in headers] == [True, False]
    assert b'"format_version":"1"' in headers[1] and b"formats" not in headers[1]


def test_formats_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "s"
    one = torch.tensor(1.0)
    whole = {"m.weight_amax": one, "m.input_amax": one.clone()}
    for formats in ({"n": "fp8"}, {"m": "int4"}, ["m"], {"m": ["fp8"]}):
        rewrite(path, whole, format_version=2, formats=formats)
        with pytest.raises(UserError, match="formats are none of modules"):
            QuantState.load(path)
    rewrite(path, whole, format_version=2, formats={"m": "w4a16"})
    with pytest.raises(UserError, match="one too many for w4a16"):
        QuantState.load(path)
    broken = mixed()
    broken.modules["b"] = ModuleState(one, one, "w4a16")
    with pytest.raises(ValueError, match="no valid ranges"):
        broken.save(path)
