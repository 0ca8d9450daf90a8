"""Excluded names, against the exporter's rule for a single name and against vLLM itself."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from qat.export.config import excluding_pattern
from qat.export.doctor.exclusions import Exclusions, Served, served_layers

ROOT = Path(__file__).resolve().parents[3]


def test_matching_many_names_is_matching_each() -> None:
    chooser = random.Random(3)
    parts = ["a", "b", "mixer", "gate", "gate_up_proj", "experts", "0", "1", "11"]

    def name() -> str:
        return ".".join(chooser.choices(parts, k=chooser.randint(1, 4)))

    for _ in range(300):
        patterns = [name() + chooser.choice(["", "", "*", ".*"]) for _ in range(chooser.choice([1, 5, 400]))]
        patterns += chooser.choice([[], [f"*.{name()}"]])
        exclusions = Exclusions(patterns)
        asked = [name() for _ in range(20)]
        for prefix in asked:
            assert exclusions.match(prefix) is (excluding_pattern(prefix, patterns) is not None), (prefix, patterns)
        for stem in exclusions.unmatched(asked):
            assert not any(excluding_pattern(prefix, [stem]) for prefix in asked), (stem, asked)


def test_long_lists_take_no_time_and_hostile_ones_are_not_read() -> None:
    experts = [f"backbone.layers.{layer}.mixer.experts.{expert}" for layer in range(90) for expert in range(512)]
    long = Exclusions(f"{expert}.up_proj" for expert in experts)
    assert long.is_usable
    assert all(long.match(f"backbone.layers.{layer}.mixer.experts.7.up_proj") for layer in range(90))
    assert not any(long.match(f"backbone.layers.{number}.mixer.in_proj") for number in range(6000))
    assert not Exclusions(map(str, range(100_000))).is_usable
    assert not Exclusions(f"*{number}*x" for number in range(1000)).is_usable


VLLM = """
import json, sys
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.models.utils import WeightsMapper
answers = []
for patterns, names in json.load(sys.stdin):
    config = ModelOptNvFp4Config("NVFP4", True, None, patterns, 16)
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]
    }
    config.apply_vllm_mapper(WeightsMapper())
    answers.append([])
    for name in names:
        try:
            answers[-1].append(config.is_layer_excluded(name))
        except ValueError:
            answers[-1].append(None)
print("FOUND" + json.dumps(answers))
"""


@pytest.mark.slow
@pytest.mark.engine
def test_vllm_excludes_the_same_layers() -> None:
    python = Path(os.environ.get("QAT_ENGINE", ROOT / ".venv-vllm")) / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no vLLM environment at {python}")
    chooser = random.Random(5)
    modules = [
        f"m.layers.{layer}.{leaf}"
        for layer in (1, 2, 12)
        for leaf in (
            *("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.gate", "mlp.gate_proj", "mlp.up_proj"),
            *("mlp.down_proj", "moe.experts.0.up_proj", "moe.experts.1.up_proj", "moe.shared_experts.up_proj"),
        )
    ]
    layers: list[Served] = served_layers(modules)
    cases = []
    for _ in range(200):
        patterns = []
        for name in chooser.sample(modules, chooser.randint(1, 6)):
            parent = name.rpartition(".")[0]
            patterns.append(chooser.choice([name, name, f"{name}*", f"{parent}*", f"{parent}.*"]))
        cases.append([patterns + chooser.choice([[], ["*.o_proj"], ["*gate*"]]), [layer.name for layer in layers]])
    run = subprocess.run(
        [python, "-c", VLLM],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=170,
        check=True,
        env=os.environ | {"VLLM_PLUGINS": ""},
    )
    answers = json.loads(run.stdout.rpartition("FOUND")[2])
    seen = set()
    for (patterns, _), answer in zip(cases, answers, strict=True):
        exclusions = Exclusions(patterns)
        for layer, expected in zip(layers, answer, strict=True):
            assert exclusions.exclude(layer) is expected, (patterns, layer, expected)
            seen.add(expected)
    assert seen == {True, False, None}
