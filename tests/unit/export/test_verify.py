"""Every way in which an export can be wrong is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.errors import UserError
from qat.export import ExportMismatch, export_checkpoint, verify_export
from tests.unit.export.builders import make_state
from tests.unit.export.conftest import Persona

UP = "backbone.layers.3.mixer.experts.6.up_proj"
OTHER_UP = "backbone.layers.3.mixer.experts.5.up_proj"
IN_PROJ = "backbone.layers.0.mixer.in_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def exported(persona: Persona, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export_checkpoint(persona.base, out, adapters=persona.adapters, quant_state=persona.state)
    return out


def flip(name: str, byte: int = 0, mask: int = 1) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].reshape(-1).view(torch.uint8)[byte] ^= mask

    return change


def swap(one: str, other: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


def drop(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


@pytest.mark.parametrize(
    ("change", "fault", "differing_bytes"),
    [
        (flip(f"{UP}.weight", 3), f"{UP}.weight: 1 of 1536 bytes differ", 1),
        (flip(f"{IN_PROJ}.weight_scale", 7), f"{IN_PROJ}.weight_scale: 1 of", 1),
        (flip(f"{UP}.weight_scale_2"), f"{UP}.weight_scale_2: 1 of 4", 1),
        (flip(f"{UP}.input_scale"), f"{UP}.input_scale: 1 of 4", 1),
        (flip("backbone.layers.0.mixer.A_log"), "backbone.layers.0.mixer.A_log: 1 of", 1),
        (flip("backbone.layers.1.mixer.gate.e_score_correction_bias"), "e_score_correction_bias: 1 of 32", 1),
        (swap(f"{UP}.weight", f"{OTHER_UP}.weight"), f"{OTHER_UP}.weight:", None),
        (drop(f"{UP}.input_scale"), f"{UP}.input_scale: missing", 4),
        (drop("lm_head.weight"), "lm_head.weight: missing", 512 * 64 * 2),
        (put("stray.lora_A.weight", torch.ones(2)), "stray.lora_A.weight: neither in the base", 0),
        (put(f"{IN_PROJ}.weight", torch.ones(324, 64).bfloat16()), "instead of torch.uint8", 324 * 32),
        (put("backbone.norm_f.weight", torch.ones(64)), "backbone.norm_f.weight: F32", 128),
        (put(f"{UP}.weight_scale_2", torch.tensor(float("nan"))), "zero, negative or not finite", None),
        (put(f"{UP}.weight_scale_2", torch.tensor(0.0)), "zero, negative or not finite", None),
    ],
)
def test_damage_is_found(
    persona: Persona,
    exported: Path,
    tmp_path: Path,
    change: Callable[[Tensors], None],
    fault: str,
    differing_bytes: int | None,
) -> None:
    out = shutil.copytree(exported, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(ExportMismatch) as caught:
        verify_export(out, persona.base, persona.adapters, persona.state)
    report = caught.value.report
    assert any(fault in line for line in report.faults), report.faults
    if differing_bytes is not None:
        assert report.differing_bytes == differing_bytes


def test_a_flipped_code_is_also_a_differing_weight(persona: Persona, exported: Path, tmp_path: Path) -> None:
    out = shutil.copytree(exported, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors[f"{UP}.weight"][0, 0] ^= 0x22  # the second bit of both codes in the byte
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(ExportMismatch) as caught:
        verify_export(out, persona.base, persona.adapters, persona.state)
    assert caught.value.report.differing_values == 2


def test_other_inputs_do_not_verify(persona: Persona, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportMismatch, match="differs"):
        verify_export(exported, persona.base, persona.adapters[:1], persona.state)
    with pytest.raises(ExportMismatch, match="differs"):
        verify_export(exported, persona.base, persona.adapters, None)
    other = make_state(persona.base, persona.base, tmp_path / "state.safetensors")
    with pytest.raises(ExportMismatch, match="differs"):
        verify_export(exported, persona.base, persona.adapters, other)


def test_a_truncated_shard_is_a_user_error(persona: Persona, exported: Path, tmp_path: Path) -> None:
    out = shutil.copytree(exported, tmp_path / "out")
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(UserError, match="truncated") as caught:
        verify_export(out, persona.base, persona.adapters, persona.state)
    assert "model.safetensors" in str(caught.value)


def test_a_wrong_writer_cannot_publish(persona: Persona, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that is broken on purpose, packing the base's weight and not the effective one, leaves nothing."""
    from qat.export import pack
    from qat.export.merge import effective

    monkeypatch.setattr(pack, "effective", lambda module, read, deltas, **packed: effective(module, read, [], **packed))
    with pytest.raises(ExportMismatch):
        export_checkpoint(persona.base, tmp_path / "out", adapters=persona.adapters, quant_state=persona.state)
    assert list(tmp_path.iterdir()) == []
