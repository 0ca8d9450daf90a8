"""Scales that do not fit the base or cannot be served are refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qat.errors import UserError
from qat.export import export_checkpoint
from qat.export.pack import packed_specs
from qat.quant.state import ModuleState, QuantState
from tests.unit.export.builders import make_state
from tests.unit.export.conftest import Persona

Q, K = "backbone.layers.2.mixer.q_proj", "backbone.layers.2.mixer.k_proj"
UP, IN_PROJ = "backbone.layers.1.mixer.experts.up_proj", "backbone.layers.0.mixer.in_proj"
ONE = torch.tensor(1.0)


def put(**modules: ModuleState) -> Callable[[QuantState], None]:
    names = {
        "q": Q,
        "k": K,
        "up": UP,
        "in_proj": IN_PROJ,
        "conv1d": "backbone.layers.0.mixer.conv1d",
        "mtp": "mtp.layers.0.x",
    }
    return lambda state: state.modules.update({names[name]: value for name, value in modules.items()})


def drop(*names: str, exclude: bool = False) -> Callable[[QuantState], None]:
    def change(state: QuantState) -> None:
        for name in names:
            del state.modules[name]
        if exclude:
            state.excluded.extend(names)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(mtp=ModuleState(ONE, ONE)), "modules that the base does not have"),
        (put(conv1d=ModuleState(ONE, ONE)), "modules that the base does not have"),
        (put(up=ModuleState(ONE, ONE)), "wrong shape"),
        (put(up=ModuleState(torch.ones(7), ONE)), "wrong shape"),
        (put(in_proj=ModuleState(torch.ones(8), ONE)), "wrong shape"),
        (put(k=ModuleState(torch.tensor(0.5), ONE)), "different scales"),
        (drop(IN_PROJ), "no scales for modules that the preset"),
        (drop(Q, exclude=True), "only in part"),
        (drop(UP, exclude=True), "only in part"),
        (lambda state: state.excluded.append(Q), "excludes modules that it has scales for"),
        (lambda state: setattr(state, "kv_cache", "int8"), "KV cache"),
    ],
)
def test_refused(persona: Persona, tmp_path: Path, change: Callable[[QuantState], None], message: str) -> None:
    state = QuantState.load(persona.state)
    change(state)
    state.save(tmp_path / "state.safetensors")
    with pytest.raises(UserError, match=message):
        export_checkpoint(
            persona.base, tmp_path / "out", adapters=persona.adapters, quant_state=tmp_path / "state.safetensors"
        )
    assert not (tmp_path / "out").exists()


def test_input_scales_differ_only_by_themselves_too(persona: Persona, tmp_path: Path) -> None:
    state = QuantState.load(persona.state)
    state.modules[K] = state.modules[K]._replace(input_amax=state.modules[K].input_amax * 2)
    state.save(tmp_path / "state.safetensors")
    with pytest.raises(UserError, match="different scales"):
        export_checkpoint(persona.base, tmp_path / "out", quant_state=tmp_path / "state.safetensors")


def test_a_preset_that_leaves_layers_out(persona: Persona, tmp_path: Path) -> None:
    state = make_state(persona.base, persona.merged, tmp_path / "state.safetensors", preset="conservative")
    report = export_checkpoint(persona.base, tmp_path / "out", adapters=persona.adapters, quant_state=state)
    stored, merged = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", persona.merged))
    for leaf in ("q_proj", "o_proj"):
        name = f"backbone.layers.2.mixer.{leaf}"
        assert torch.equal(stored[f"{name}.weight"], merged[f"{name}.weight"])
        assert name in report.excluded
    assert f"{Q}.input_scale" not in stored
    assert stored["backbone.layers.1.mixer.experts.3.up_proj.weight"].dtype == torch.uint8
    assert (report.packed, report.merged) == (36, 5)


def test_scales_by_hand(persona: Persona, tmp_path: Path) -> None:
    export_checkpoint(persona.base, tmp_path / "out", adapters=persona.adapters, quant_state=persona.state)
    stored, state = load_file(tmp_path / "out" / "model.safetensors"), QuantState.load(persona.state)
    for expert, amax in enumerate(state.modules[UP].weight_amax.tolist()):
        name = f"backbone.layers.1.mixer.experts.{expert}.up_proj"
        assert stored[f"{name}.weight_scale_2"].item() == pytest.approx(amax / 2688, rel=1e-7)
        assert stored[f"{name}.input_scale"].item() == pytest.approx(
            state.modules[UP].input_amax.item() / 2688, rel=1e-7
        )


def test_packed_shapes_by_hand() -> None:
    def found(kind: str, entry: torch.Tensor | None) -> dict[str, tuple[object, ...]]:
        specs = packed_specs("m.weight", (3, 32), ModuleState(torch.tensor(1.0), entry, kind))
        return {spec.name: (spec.dtype, spec.shape, spec.nbytes) for spec in specs}

    four_bits = {
        "m.weight": ("U8", (3, 16), 48),
        "m.weight_scale": ("F8_E4M3", (3, 2), 6),
        "m.weight_scale_2": ("F32", (), 4),
    }
    entry = {"m.input_scale": ("F32", (), 4)}
    assert found("nvfp4", torch.tensor(1.0)) == {**four_bits, **entry}
    assert found("w4a16", None) == four_bits
    eight_bits = {"m.weight": ("F8_E4M3", (3, 32), 96), "m.weight_scale": ("F32", (), 4)}
    assert found("fp8", torch.tensor(1.0)) == {**eight_bits, **entry}


def test_a_damaged_base_leaves_nothing(persona: Persona, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in persona.base.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="truncated"):
        export_checkpoint(base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [base]
