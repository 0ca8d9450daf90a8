"""Adapters that PEFT wrote, with one planted fault each; the export's own reader is asked about the shapes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.export import export_checkpoint
from qat.export.doctor import checks_adapter
from qat.export.doctor.checks_adapter import check_adapter, check_adapter_values
from qat.export.doctor.findings import Severity
from tests.tiny_models import qwen3_tiny
from tests.unit.doctor.one_check import Plant, codes, findings
from tests.unit.doctor.planting import edit_json, edit_tensors
from tests.unit.export.builders import make_adapter, make_base, make_state

WEIGHTS = "adapter_model.safetensors"
IN_PROJ = "base_model.model.model.layers.0.mixer.in_proj"
EXPERTS = "base_model.model.model.layers.1.mixer.experts"


class World(NamedTuple):
    """A base, its export at four bits, and adapters of it.

    Attributes:
        base: The tiny Nemotron-H.
        packed: The same at four bits.
        adapter: Attention, Mamba, shared and routed experts.
        linears: The same without routed experts, targets given by name.
    """

    base: Path
    packed: Path
    adapter: Path
    linears: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("adapters")
    base = make_base(root / "base")
    state = make_state(base, base, root / "state.safetensors")
    export_checkpoint(base, root / "packed", quant_state=state)
    adapter = make_adapter(base, root / "adapter", seed=1)
    linears = make_adapter(base, root / "linears", seed=2, linears=["q_proj", "in_proj"], experts=[])
    return World(base, root / "packed", adapter, linears)


@pytest.mark.parametrize("base", [None, "base", "packed"])
def test_an_adapter_by_peft_is_clean(world: World, base: str | None) -> None:
    found = findings(check_adapter, world.adapter, getattr(world, base) if base else None)
    assert [(finding.code, finding.severity) for finding in found] == [("adapter_base_unnamed", Severity.NOTE)]
    assert codes(check_adapter, world.base) == set()


def setting(**fields: Any) -> Plant:
    return edit_json("adapter_config.json", lambda config: config.update(fields))


def factors(edit: Callable[[dict[str, Tensor]], Any]) -> Plant:
    def plant(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        edit(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return plant


def fill(number: float, *endings: str) -> Plant:
    return factors(lambda found: [found[name].fill_(number) for name in found if name.endswith(endings)])


def wider(found: dict[str, Tensor]) -> None:
    """One factor of another rank than its partner."""
    name = f"{IN_PROJ}.lora_A.weight"
    found[name] = torch.cat([found[name], found[name]])


def other_rank(found: dict[str, Tensor]) -> None:
    for side, rows in (("A", 0), ("B", 1)):
        name = f"{IN_PROJ}.lora_{side}.weight"
        found[name] = torch.cat([found[name], found[name][:1] if rows == 0 else found[name][:, :1]], dim=rows)


def other_input(found: dict[str, Tensor]) -> None:
    name = f"{IN_PROJ}.lora_A.weight"
    found[name] = found[name][:, :32].contiguous()


def other_output(found: dict[str, Tensor]) -> None:
    name = f"{IN_PROJ}.lora_B.weight"
    found[name] = found[name][:32].contiguous()


def other_expert_rank(found: dict[str, Tensor]) -> None:
    """One column more than eight experts of rank four have."""
    for name in [name for name in found if name.startswith(EXPERTS)]:
        found[name] = (
            torch.cat([found[name], found[name][:1]])
            if "lora_A" in name
            else torch.cat([found[name], found[name][:, :1]], dim=1)
        )


def renamed(found: dict[str, Tensor]) -> None:
    for side in "AB":
        found[f"{IN_PROJ}_z.lora_{side}.weight"] = found.pop(f"{IN_PROJ}.lora_{side}.weight")


FAULTS: list[tuple[str, str, Plant]] = [
    ("adapter_kind", "adapter", setting(peft_type="IA3")),
    ("adapter_config_value", "adapter", setting(lora_alpha=0)),
    ("adapter_config_value", "adapter", setting(lora_alpha=None)),
    ("adapter_empty", "adapter", factors(lambda found: (found.clear(), found.update(x=torch.ones(2))))),
    ("adapter_extra", "adapter", factors(lambda found: found.update({"base_model.model.x.weight": torch.ones(2)}))),
    ("adapter_factor_missing", "adapter", factors(lambda found: found.pop(f"{IN_PROJ}.lora_B.weight"))),
    ("adapter_shapes", "adapter", factors(wider)),
    ("adapter_shapes", "adapter", factors(other_input)),
    ("adapter_rank", "adapter", factors(other_rank)),
    ("adapter_shapes", "adapter", factors(other_output)),
    ("adapter_rank", "adapter", setting(r=3)),
    ("adapter_module_unknown", "adapter", factors(renamed)),
    ("adapter_target_unmatched", "linears", setting(target_modules=["q_proj", "in_proj", "gate_proj"])),
    ("adapter_target_unmatched", "linears", setting(target_parameters=["mixer.experts.up_proj"])),
    ("adapter_experts_missed", "linears", setting(target_modules=["q_proj", "in_proj", "up_proj"])),
    ("adapter_value", "adapter", factors(lambda found: found[f"{IN_PROJ}.lora_A.weight"][0].fill_(float("nan")))),
    ("adapter_value", "adapter", fill(float("inf"), "experts.lora_B.weight")),
    ("adapter_untrained", "adapter", fill(0.0, "lora_B.weight")),
    ("adapter_dead", "adapter", fill(0.0, "in_proj.lora_B.weight")),
]


@pytest.mark.parametrize(("code", "kind", "plant"), FAULTS)
def test_a_fault(world: World, tmp_path: Path, code: str, kind: str, plant: Plant) -> None:
    folder = shutil.copytree(getattr(world, kind), tmp_path / "adapter")
    plant(folder)
    companions = {"adapter_base_unnamed"}
    if kind == "linears":
        companions |= {"adapter_experts_missed", "adapter_target_unmatched"}
    found = codes(check_adapter, folder, world.base)
    assert code in found and found <= {code} | companions


def test_experts_whose_columns_do_not_divide(world: World, tmp_path: Path) -> None:
    folder = shutil.copytree(world.adapter, tmp_path / "adapter")
    factors(other_expert_rank)(folder)
    assert {"adapter_rank", "adapter_shapes"} <= codes(check_adapter, folder, world.base)
    assert "adapter_rank" in codes(check_adapter, folder)


def test_experts_left_out_are_a_note_unless_they_were_meant(world: World, tmp_path: Path) -> None:
    """`up_proj` in target_modules reaches the shared expert alone; the routed ones are parameters."""
    [missed] = [f for f in findings(check_adapter, world.linears, world.base) if f.code == "adapter_experts_missed"]
    assert missed.severity is Severity.NOTE
    total = sum(tensor.numel() for tensor in load_file(world.base / "model.safetensors").values() if tensor.dim() == 2)
    adapted = 2 * (64 * 64) // 2 + 64 * (128 + 128 + 64 + 4)  # one q_proj and one in_proj, by hand
    assert f"{adapted / total:.1%}" in missed.problem
    meant = make_adapter(world.base, tmp_path / "meant", seed=3, linears=["up_proj", "down_proj"], experts=[])
    [missed] = [f for f in findings(check_adapter, meant, world.base) if f.code == "adapter_experts_missed"]
    assert missed.severity is Severity.WARNING and "shared experts" in missed.problem


def test_an_adapter_of_another_base(world: World, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", qwen3_tiny())
    assert "adapter_module_unknown" in codes(check_adapter, world.adapter, other)


def test_a_base_with_gaps(world: World, tmp_path: Path) -> None:
    base = shutil.copytree(world.base, tmp_path / "base")
    edit_tensors(lambda found: found.pop("backbone.layers.1.mixer.experts.3.up_proj.weight"))(base)
    assert "adapter_base_unusable" in codes(check_adapter, world.adapter, base)


def test_large_adapters_are_read_only_when_asked(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(world.adapter, tmp_path / "adapter")
    fill(0.0, "lora_B.weight")(folder)
    assert codes(check_adapter_values, folder) == set()
    monkeypatch.setattr(checks_adapter, "_READ_ALWAYS", 0)
    assert "adapter_untrained" not in codes(check_adapter, folder)
    assert codes(check_adapter_values, folder) == {"adapter_untrained"}


@pytest.mark.parametrize("strange", [None, True, -1, float("nan"), "(a+)+$", [], {}, [[]], {"a": {}}, "\0", 10**400])
def test_any_value_in_any_field(world: World, tmp_path: Path, strange: object) -> None:
    folder = shutil.copytree(world.linears, tmp_path / "adapter")
    for field in ("peft_type", "r", "lora_alpha", "rank_pattern", "target_modules", "target_parameters"):
        setting(**{field: strange})(folder)
        codes(check_adapter, folder, world.base)
