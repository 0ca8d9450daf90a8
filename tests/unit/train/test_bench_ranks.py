"""The benchmark on several GPUs: its arithmetic by hand, and all of it but the times on CPUs over gloo."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from qat.errors import UserError
from qat.train.bench import process, ranks
from qat.train.bench.arms import configuration
from qat.train.bench.process import Measurements, Span, occupancy
from qat.train.bench.run import Shape


def test_where_the_time_goes_by_hand() -> None:
    """Kernels from 0 to 10 and 20 to 30 ms, NCCL from 8 to 14 and 22 to 24, a copy within the first kernel."""
    spans = [
        ("gemm", 0, 10),
        ("Memcpy DtoD", 2, 3),
        ("gemm", 20, 30),
        ("ncclDevKernel_AllGather", 8, 14),
        ("nccl", 22, 24),
    ]
    found = occupancy(Span(name, 1000.0 * begin, 1000.0 * end) for name, begin, end in spans)
    assert found == {"span_ms": 30, "computing_ms": 20, "communicating_ms": 8, "exposed_ms": 4, "idle_ms": 6}
    assert occupancy([]) == {}


def _row(gpus: int, mode: str, speed: float, **more: Any) -> dict[str, Any]:
    row = {
        "layers": 13,
        "arm": "experts",
        "batch": 8,
        "length": 2048,
        "checkpointing": True,
        "gpus": gpus,
        "mode": mode,
    }
    return row | {"median": 0.5, "low": 0.4, "high": 0.6, "tokens_per_second": speed, "peak_gib": 70.0} | more


def test_the_table_compares_with_one_gpu_of_the_same_arm(tmp_path: Path) -> None:
    file = Measurements(tmp_path / "ranks.json")
    file.begin({"device": "H"})
    for row in (_row(1, "alone", 100.0), _row(2, "shard", 150.0), _row(2, "shard", 400.0, arm="attention")):
        file.add("step", **row)
    file.begin({"device": "H"})  # another call goes on with the file
    file.add("step", **_row(2, "replicate", 190.0))
    file.add("profile", **_row(2, "replicate", 0), communicating_ms=12.5, exposed_ms=1.5)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ranks.markdown(file.file).splitlines()]
    assert {len(line) for line in lines} == {13}
    assert [(line[4], line[5], line[9]) for line in lines[2:]] == [
        ("1", "alone", "1.00"),
        ("2", "shard", "1.50"),
        ("2", "shard", "–"),
        ("2", "replicate", "1.90"),
    ]
    assert lines[-1][-2:] == ["12.5", "1.5"] and lines[2][-2:] == ["–", "–"]


def test_runs_in_one_file(tmp_path: Path) -> None:
    """A row is compared with one GPU of its own run, and with another run's only where that has none."""
    files = {name: Measurements(tmp_path / f"{name}.json") for name in ("a", "b", "c")}
    for file in files.values():
        file.begin({"device": "H"})
    files["a"].add("step", **_row(1, "alone", 100.0))
    files["a"].add("step", **_row(2, "shard", 150.0))
    files["b"].add("step", **_row(1, "alone", 80.0))
    files["c"].add("step", **_row(2, "shard", 160.0))
    files["c"].add("profile", **_row(2, "shard", 0), communicating_ms=9.0, exposed_ms=2.0)
    out, paths = tmp_path / "out.json", {name: file.file for name, file in files.items()}

    def compared() -> list[tuple[str, str]]:
        lines = [[cell.strip() for cell in line.split("|")] for line in ranks.markdown(out).splitlines()[2:]]
        return [(line[10], line[12]) for line in lines]

    ranks.merge(out, {"first": [paths["a"]], "second": [paths["b"], paths["c"]]})
    assert compared() == [("1.00", "–"), ("1.50", "–"), ("1.00", "–"), ("2.00", "9.0")]
    ranks.merge(out, {"first": [paths["a"]], "second": [paths["c"]]})
    assert compared()[-1] == ("1.60", "9.0")
    assert json.loads(out.read_text(encoding="utf-8"))["runs"] == {"first": {"device": "H"}, "second": {"device": "H"}}
    files["c"].begin({"device": "another"})
    with pytest.raises(UserError, match="one device"):
        ranks.merge(out, {"first": [paths["a"], paths["c"]]})


_CONFIG = {
    **{"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "ME*EM"},
    **{"num_hidden_layers": 5, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 48, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "ssm_state_size": 16, "mamba_num_heads": 4},
    **{"mamba_head_dim": 32, "n_groups": 2, "chunk_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 96, "n_shared_experts": 1},
}


def test_an_arm_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(_CONFIG), encoding="utf-8")
    parameters: list[weakref.ref[Any]] = []
    build = process.build

    def watched(*args: Any) -> process.Arm:
        arm = build(*args)
        parameters.extend(map(weakref.ref, arm.model.parameters()))
        return arm

    monkeypatch.setattr(process, "build", watched)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    for text in ("distillation:1:16:yes:2", "attention:1:16:no:2"):
        found = process.run_arm(configuration(config, 4), Shape.parse(text), accelerator)
        profiled = ["profile"] if torch.cuda.is_available() else []
        assert list(found) == ["step", "guard", *profiled] and len(parameters) > 30
        assert [parameter for parameter in parameters if parameter() is not None] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "program"), [("replicate", ranks.PROGRAM), ("shard", "tests.unit.train.sharded_benchmark")]
)
def test_two_processes(mode: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    monkeypatch.setattr(ranks, "environment", lambda: {"device": "cpu", "command": "this test"})
    monkeypatch.setattr(ranks, "PROGRAM", program)
    config, out = tmp_path / "config.json", tmp_path / "out.json"
    config.write_text(json.dumps(_CONFIG), encoding="utf-8")
    arms = ["attention:2:64:no:2", "distillation:2:64:yes:2", "nothing:1:8:no:2", "experts:2:64:yes:2"]
    ranks.bench_ranks(config, out, 4, [2], [mode], arms, 120)
    content = json.loads(out.read_text(encoding="utf-8"))
    kinds = [(row["kind"], row.get("arm")) for row in content["measurements"]]
    parts = [(kind, arm) for arm in ("attention", "distillation", "experts") for kind in ("step", "guard")]
    assert kinds == [*parts[:4], ("failed", "nothing"), *parts[4:], ("launch", None)]
    launched = content["measurements"][-1]
    assert (launched["status"], launched["gpus"], launched["mode"]) == (0, 2, mode)
    for row in content["measurements"]:
        if row["kind"] == "guard":
            assert row["dead"] == {} and row["trained_parameters"] == row["parameters"] == 8
            assert row["quantizers_ran"] == row["quantizers"] == (28 if row["arm"] == "distillation" else 0)
