"""No false alarm on published configurations, alone and rewritten by Transformers; what is alarmed, vLLM confirms."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qat.export.doctor.checks_config import check_config, check_generation
from qat.export.doctor.checks_quant import check_quantization
from qat.export.doctor.checks_scales import check_scales
from qat.export.doctor.findings import Finding, Severity
from qat.export.doctor.folder import open_checkpoint

ROOT = Path(__file__).resolve().parents[3]
CHECKS = (check_config, check_generation, check_quantization, check_scales)

#: Published pairs of files that vLLM 0.32 does not take for what they are: what the doctor says and what vLLM does.
#: (Their repositories may hold more; these are the two files as they stand.)
ALARMS = {
    "Qwen--Qwen3-32B-FP8-Static-PerTensor": ({"quant_method_missing"}, "None"),
    "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4": ({"quant_method_missing", "quant_fields_missing"}, "None"),
    "nvidia--NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4": ({"quant_form"}, "Unknown ModelOpt quant algo"),
}
RECOGNIZED = {
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4": "modelopt_fp4",
    "nvidia--Llama-3.1-70B-Instruct-FP8": "modelopt",
}


@pytest.fixture(scope="module")
def published(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each published configuration, with the (empty) code files that its repository holds."""
    root = tmp_path_factory.mktemp("published")
    folders: dict[str, Path] = {}
    for file in sorted((real_data / "model_configs").glob("*.json")):
        match = re.fullmatch(r"(.+?)_((?:hf_quant_)?config\.json)", file.name)
        assert match is not None
        folder = folders.setdefault(match[1], root / match[1])
        folder.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / match[2])
        for entry in (json.loads(file.read_text()).get("auto_map") or {}).values():
            (folder / f"{entry.partition('.')[0]}.py").touch()
    assert len(folders) >= 10
    return folders


def alarms(folder: Path, base: Path | None = None) -> list[Finding]:
    view, other = open_checkpoint(folder), open_checkpoint(base) if base else None
    found = [finding for check in CHECKS for finding in check(view, other)]
    return [finding for finding in (*view.findings, *found) if finding.severity is not Severity.NOTE]


def test_published_configurations(published: dict[str, Path]) -> None:
    for name, folder in published.items():
        expected, _ = ALARMS.get(name, (set(), ""))
        assert {finding.code for finding in alarms(folder)} == expected, name
    assert ALARMS.keys() <= published.keys()


def test_published_configurations_as_transformers_writes_them(published: dict[str, Path], tmp_path: Path) -> None:
    """Release 5 renames, moves and adds fields: none of it is a difference, in either direction."""
    from transformers import AutoConfig

    rewritten = 0
    for name, folder in published.items():
        if json.loads((folder / "config.json").read_text())["model_type"] == "nemotron-nas":
            continue  # exists only as code of its publisher
        AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / name)
        if name not in ALARMS:
            shutil.copytree(folder, tmp_path / name, dirs_exist_ok=True, ignore=lambda *_: ["config.json"])
            assert alarms(tmp_path / name, folder) == [], name
            assert alarms(folder, tmp_path / name) == [], name
            rewritten += 1
    assert rewritten >= 10


def test_a_persona_of_one_model_is_not_taken_for_another(published: dict[str, Path]) -> None:
    nano = published["nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"]
    lightning = published["nvidia--NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4"]
    differences = {finding.code: finding for finding in alarms(nano, lightning)}
    # Lightning reads 1 M tokens instead of 262 144 and has layers for multi-token prediction; nothing else differs.
    assert set(differences) == {"config_context", "config_layers"}
    assert "1048576" in differences["config_context"].problem


VLLM = """
import sys
from vllm.config.load import LoadConfig
from vllm.config.model import ModelConfig
from vllm.model_executor.model_loader.weight_utils import get_quant_config
for folder in sys.argv[1:]:
    try:
        config = ModelConfig(model=folder, tokenizer=folder, skip_tokenizer_init=True)
        if config.quantization:
            get_quant_config(config, LoadConfig())
        print("FOUND", config.quantization)
    except Exception as error:
        print("FOUND", " ".join(str(error).split()))
"""


@pytest.mark.slow
@pytest.mark.engine
def test_vllm_takes_them_as_the_doctor_says(published: dict[str, Path]) -> None:
    python = Path(os.environ.get("QAT_ENGINE", ROOT / ".venv-vllm")) / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no vLLM environment at {python}")
    expected = {name: answer for name, (_, answer) in ALARMS.items()} | RECOGNIZED
    run = subprocess.run(
        [python, "-c", VLLM, *(str(published[name]) for name in expected)],
        capture_output=True,
        text=True,
        timeout=170,
        check=True,
        env=os.environ | {"VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1"},
    )
    answers = [line.removeprefix("FOUND ") for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    for (name, answer), found in zip(expected.items(), answers, strict=True):
        assert found == answer or (answer not in ("None", *RECOGNIZED.values()) and answer in found), (name, found)
