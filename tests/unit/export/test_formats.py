"""Checkpoints of several formats, against ModelOpt's packing and converter and vLLM's look-up; planted faults."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.errors import UserError
from qat.export import ExportMismatch, export_checkpoint, verify_export
from qat.export.doctor import diagnose
from qat.export.doctor.folder import open_checkpoint
from qat.export.doctor.precision import census
from qat.quant.presets import Preset
from qat.quant.state import QuantState
from tests.unit.export.builders import make_state
from tests.unit.export.conftest import Persona

ROOT = Path(__file__).resolve().parents[3]
IN_PROJ = "backbone.layers.0.mixer.in_proj"
UP = "backbone.layers.1.mixer.experts.3.up_proj"


@pytest.fixture(scope="module")
def state(persona: Persona, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_state(persona.base, persona.merged, tmp_path_factory.mktemp("state") / "s.safetensors", "lightning")


@pytest.fixture(scope="module")
def exported(persona: Persona, state: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("formats") / "out"
    report = export_checkpoint(persona.base, out, adapters=persona.adapters, quant_state=state)
    assert report.verification.differing_bytes == report.verification.differing_values == 0
    assert report.verification.compared_bytes == report.bytes
    assert {name: share.parameters for name, share in report.precisions.items() if name in ("FP8", "W4A16_NVFP4")} == {
        "FP8": 64 * (2 * 128 + 2 * 2 * 16 + 4) + 128 * 64,
        "W4A16_NVFP4": 2 * (2 * 8 * 64 * 48 + 2 * 64 * 96),
    }
    return out


def test_weights_are_as_modelopt_packs_them(persona: Persona, state: Path, exported: Path) -> None:
    from modelopt.torch.export.quant_utils import to_quantized_weight
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    stored, merged = load_file(exported / "model.safetensors"), load_file(persona.merged / "model.safetensors")
    scales = QuantState.load(state).modules
    w = merged[f"{IN_PROJ}.weight"]
    scale = stored[f"{IN_PROJ}.weight_scale"]
    assert scale.shape == () and scale == scales[IN_PROJ].weight_amax / 448
    assert stored[f"{IN_PROJ}.input_scale"] == scales[IN_PROJ].input_amax / 448  # type: ignore[operator]
    assert torch.equal(stored[f"{IN_PROJ}.weight"].float(), to_quantized_weight(w, scale, "fp8").float())
    assert f"{IN_PROJ}.weight_scale_2" not in stored

    w, amax = merged[f"{UP}.weight"], scales["backbone.layers.1.mixer.experts.up_proj"].weight_amax[3]
    assert stored[f"{UP}.weight_scale_2"] == amax / (6 * 448) and f"{UP}.input_scale" not in stored
    packed = NVFP4QTensor.quantize(w, 16, None, stored[f"{UP}.weight_scale_2"])[0]._quantized_data
    assert torch.equal(stored[f"{UP}.weight"], packed)
    q_proj = "backbone.layers.2.mixer.q_proj.weight"
    assert torch.equal(stored[q_proj], merged[q_proj])


def test_the_files_name_every_module(persona: Persona, exported: Path) -> None:
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    own = json.loads((exported / "hf_quant_config.json").read_text())
    block = json.loads((exported / "config.json").read_text())["quantization_config"]
    assert block == convert_hf_quant_config_format(own)
    layers = own["quantization"]["quantized_layers"]
    stored = load_file(exported / "model.safetensors")
    scaled = {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    assert set(layers) == scaled
    assert layers[IN_PROJ] == {"quant_algo": "FP8"}
    assert layers[UP] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert own["quantization"]["quant_algo"] == "MIXED_PRECISION"
    assert "group_size" not in own["quantization"]
    about = ("quant", "scale", "block", "tensor", "weight")  # the tokenizer files of this base are stand-ins
    assert [
        str(found) for found in diagnose(exported, persona.base, deep=True).findings if found.code.startswith(about)
    ] == []
    found = {(row.kind, row.precision) for row in census(open_checkpoint(exported))}
    assert found >= {("mamba", "FP8"), ("routed experts", "NVFP4"), ("attention", "BF16"), ("output", "BF16")}


@pytest.mark.parametrize(
    ("tensor", "fault", "values"),
    [(f"{IN_PROJ}.weight", "weights differ from the forward's", 1), (f"{IN_PROJ}.weight_scale", "bytes differ", None)],
)
def test_a_changed_byte_is_found(
    persona: Persona, state: Path, exported: Path, tmp_path: Path, tensor: str, fault: str, values: int | None
) -> None:
    out = shutil.copytree(exported, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    if tensors[tensor].dim():
        tensors[tensor].view(torch.uint8)[0, 0] ^= 1
    else:
        tensors[tensor] *= 1.001
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(ExportMismatch) as caught:
        verify_export(out, persona.base, persona.adapters, state)
    assert any(fault in line for line in caught.value.report.faults), caught.value.report.faults
    if values is not None:
        assert caught.value.report.differing_values == values


def test_a_state_of_other_formats_is_refused(persona: Persona, state: Path, tmp_path: Path) -> None:
    saved = QuantState.load(state)
    good = saved.modules[IN_PROJ]
    saved.modules[IN_PROJ] = good._replace(format="nvfp4")
    saved.save(tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="another format than the preset"):
        export_checkpoint(persona.base, tmp_path / "out", quant_state=tmp_path / "s.safetensors")


VLLM = """
import json, sys
from vllm.model_executor.layers.quantization.modelopt import ModelOptMixedPrecisionConfig
from vllm.model_executor.models.nemotron_h import NemotronHForCausalLM
asked, forms = json.load(sys.stdin)
found = []
for form in forms:
    config = ModelOptMixedPrecisionConfig.from_config(form)
    config.packed_modules_mapping = NemotronHForCausalLM.packed_modules_mapping
    config.apply_vllm_mapper(NemotronHForCausalLM.hf_to_vllm_mapper)
    excluded = {name: config.is_layer_excluded(name) for name in asked}
    found.append({name: None if excluded[name] else config._resolve_quant_algo(name) for name in asked})
print("FOUND" + json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.engine
def test_vllm_finds_the_format_of_every_layer(persona: Persona, exported: Path) -> None:
    python = Path(os.environ.get("QAT_ENGINE", ROOT / ".venv-vllm")) / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no vLLM environment at {python}")
    config = json.loads((persona.base / "config.json").read_text())
    algorithms = {"fp8": "FP8", "w4a16": "W4A16_NVFP4", None: None}
    chosen = Preset("lightning").formats(config)
    expected: dict[str, str | None] = {"model.layers.2.mixer.qkv_proj": None, "model.layers.2.mixer.o_proj": None}
    for name, kind in chosen.items():
        asked = name.replace("backbone.", "model.", 1)
        expected[asked.rpartition(".")[0] if ".experts." in asked else asked] = algorithms[kind]
    forms = [
        json.loads((exported / "config.json").read_text())["quantization_config"],
        json.loads((exported / "hf_quant_config.json").read_text()),
    ]
    run = subprocess.run(
        [python, "-c", VLLM],
        input=json.dumps([list(expected), forms]),
        capture_output=True,
        text=True,
        timeout=170,
        check=True,
        env=os.environ | {"VLLM_PLUGINS": ""},
    )
    assert json.loads(run.stdout.rpartition("FOUND")[2]) == [expected, expected]
