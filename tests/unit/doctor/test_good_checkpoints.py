"""No false alarm: checkpoints by Transformers, by this project and by ModelOpt; and the time that a big one takes."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from math import prod
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from qat.export import export_checkpoint
from qat.export.doctor import diagnose, repair
from qat.export.doctor.architecture import expected_tensors
from qat.export.shards import TensorSpec, shard_names, split_into_shards
from tests.unit.doctor.planting import INDEX, TINY_BASE, codes, write_json, write_raw
from tests.unit.doctor.test_architecture import CASES
from tests.unit.export.builders import make_adapter, make_state
from tests.unit.export.test_export import modelopt_checkpoint

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def save_with_transformers(case: str, folder: Path, shard_size: str) -> Path:
    """A random model with the tiny base's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = CASES[case]
    base = json.loads((TINY_BASE / "config.json").read_text())
    shared = {key: base[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields | shared), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard_size)
    for name in COMPANIONS:
        shutil.copy(TINY_BASE / name, folder / name)
    return folder


@pytest.mark.parametrize("shard_size", ["1GB", "50KB"])
@pytest.mark.parametrize("case", CASES)
def test_what_transformers_writes(case: str, shard_size: str, tmp_path: Path) -> None:
    folder = save_with_transformers(case, tmp_path / "x", shard_size)
    assert (folder / INDEX).exists() == (shard_size == "50KB")
    diagnosis = diagnose(folder, deep=True)
    assert not diagnosis.findings
    assert repair(folder, None, tmp_path / "mended") == []


@pytest.mark.parametrize("limit", [4 << 30, 400_000])
@pytest.mark.parametrize("quantized", [False, True])
def test_what_this_project_exports(quantized: bool, limit: int, tmp_path: Path) -> None:
    adapters = [] if quantized else [make_adapter(TINY_BASE, tmp_path / "adapter", seed=1)]
    state = make_state(TINY_BASE, TINY_BASE, tmp_path / "state.safetensors") if quantized else None
    export_checkpoint(TINY_BASE, tmp_path / "out", adapters=adapters, quant_state=state, max_shard_bytes=limit)
    diagnosis = diagnose(tmp_path / "out", TINY_BASE, deep=True)
    assert {finding.code for finding in diagnosis.findings} <= {"kind_unchanged"}
    assert {row.precision for row in diagnosis.census} >= ({"NVFP4"} if quantized else {"BF16"})
    assert not diagnose(tmp_path / "out").findings
    assert repair(tmp_path / "out", TINY_BASE, tmp_path / "mended") == []


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3", "qwen3_moe", "nemotron_h"])
def test_what_modelopt_exports(case: str, tmp_path: Path) -> None:
    """Nothing but the sentinel that ModelOpt 0.47 leaves in Nemotron-H's names, which `--fix` cuts."""
    base = TINY_BASE if case == "nemotron_h" else save_with_transformers(case, tmp_path / "base", "1GB")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as clean:
        clean.submit(modelopt_checkpoint, base, tmp_path / "out").result()
    for name in COMPANIONS:
        shutil.copy(base / name, tmp_path / "out" / name)
    found = {(finding.code, str(finding.severity)) for finding in diagnose(tmp_path / "out", base, deep=True).findings}
    alarms = {code for code, severity in found if severity != "note"}
    if case == "nemotron_h":
        assert "quant_sentinel" in alarms
        assert repair(tmp_path / "out", base, tmp_path / "mended")
        assert diagnose(tmp_path / "mended", base, deep=True).clean
    else:
        assert not alarms


def sparse_checkpoint(folder: Path, config: dict[str, object], limit: int) -> int:
    """Headers as they are, tensors as holes; the number of tensor bytes."""
    folder.mkdir()
    write_json(folder / "config.json", config)
    specs = [TensorSpec(name, "BF16", shape, 2 * prod(shape)) for name, shape in expected_tensors(config).items()]
    shards = split_into_shards(specs, limit)
    weight_map = {}
    for name, members in zip(shard_names(len(shards)), shards, strict=True):
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for spec in members:
            place = [start, start + spec.nbytes]
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": place}
            start += spec.nbytes
            weight_map[spec.name] = name
        write_raw(folder / name, json.dumps(header).encode())
        with (folder / name).open("ab") as file:
            file.truncate(file.tell() + start)
    total = sum(spec.nbytes for spec in specs)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def test_63_gigabytes_take_less_than_five_seconds(real_data: Path, tmp_path: Path) -> None:
    """The published 30B in 300 files; the time is mostly that of its 6,243 headers."""
    name = "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16_config.json"
    config = json.loads((real_data / "model_configs" / name).read_text())
    assert sparse_checkpoint(tmp_path / "big", config, 200_000_000) > 63e9
    start = time.process_time()
    assert not codes(tmp_path / "big", tmp_path / "big") & {"names_unchecked", "tensor_missing", "tensor_extra"}
    assert time.process_time() - start < 5
