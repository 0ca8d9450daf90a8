"""Quantized checkpoints with one planted fault each, made from the exporter's good ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qat.export import export_checkpoint
from qat.export.doctor.checks_config import check_config
from qat.export.doctor.checks_quant import check_quantization
from qat.export.doctor.checks_scales import check_blocks, check_scales, read_scalars
from qat.export.doctor.findings import Severity
from qat.export.doctor.folder import open_checkpoint
from qat.export.doctor.precision import CensusRow, census, weight_modules
from tests.tiny_models import qwen3_moe_tiny
from tests.unit.doctor.one_check import Plant, codes, findings
from tests.unit.doctor.planting import edit_json, edit_tensors
from tests.unit.export.builders import make_base, make_state

IN_PROJ = "backbone.layers.0.mixer.in_proj"
ATTENTION = "backbone.layers.2.mixer"
EXPERTS = "backbone.layers.1.mixer.experts"


class Exports(NamedTuple):
    """Good exports: everything at four bits, the published mix, and one of a model with gated experts.

    Attributes:
        base: The tiny Nemotron-H that the first two were made from.
        full: Preset `all`, KV cache in FP8.
        mixed: Preset `nvidia-nano`.
        gated: A Qwen3-MoE, preset `all`.
    """

    base: Path
    full: Path
    mixed: Path
    gated: Path


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    root = tmp_path_factory.mktemp("exports")
    base, gated = make_base(root / "base"), make_base(root / "gated", qwen3_moe_tiny())
    states = [
        make_state(base, base, root / "full.safetensors", kv_cache="fp8"),
        make_state(base, base, root / "mixed.safetensors", "nvidia-nano"),
        make_state(gated, gated, root / "gated.safetensors"),
    ]
    for source, state in zip((base, base, gated), states, strict=True):
        export_checkpoint(source, root / "out" / state.stem, quant_state=state)
    return Exports(base, *(root / "out" / state.stem for state in states))


def test_good_exports_have_no_findings(exports: Exports) -> None:
    for folder in exports:
        for check in (check_config, check_quantization, check_scales, check_blocks):
            severities = {finding.severity for finding in findings(check, folder)}
            assert severities <= {Severity.NOTE}, (folder.name, check.__name__)
    assert codes(check_scales, exports.full) == {"kv_scale_default"}


def says(**fields: Any) -> Plant:
    """Change the same facts in both files; `None` removes a field."""

    def plant(folder: Path) -> None:
        names = {"exclude_modules": "ignore", "kv_cache_quant_algo": "kv_cache_scheme"}

        def edit(block: dict[str, Any], own: bool) -> None:
            for name, value in fields.items():
                block[name if own else names.get(name, name)] = value

        edit_json("config.json", lambda config: edit(config["quantization_config"], own=False))(folder)
        edit_json("hf_quant_config.json", lambda content: edit(content["quantization"], own=True))(folder)

    return plant


def in_config(edit: Callable[[dict[str, Any]], Any]) -> Plant:
    return edit_json("config.json", lambda config: edit(config["quantization_config"]))


def without_block(folder: Path) -> None:
    edit_json("config.json", lambda config: config.pop("quantization_config"))(folder)


def old_form(**fields: Any) -> Plant:
    """Only `hf_quant_config.json` speaks, and says this; `None` removes a field."""

    def edit(content: dict[str, Any]) -> None:
        for name, value in fields.items():
            content["quantization"][name] = value
            if value is None:
                del content["quantization"][name]

    def plant(folder: Path) -> None:
        without_block(folder)
        edit_json("hf_quant_config.json", edit)(folder)

    return plant


def listed(edit: Callable[[list[str]], Any]) -> Plant:
    """Change the list of excluded names in both files."""

    def plant(folder: Path) -> None:
        edit_json("config.json", lambda config: edit(config["quantization_config"]["ignore"]))(folder)
        edit_json("hf_quant_config.json", lambda content: edit(content["quantization"]["exclude_modules"]))(folder)

    return plant


def tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Plant:
    return edit_tensors(edit)


def unpack(*modules: str, scales: Iterable[str] = ("weight_scale", "weight_scale_2", "input_scale")) -> Plant:
    """Put BF16 weights where packed ones were."""

    def edit(found: dict[str, Tensor]) -> None:
        for module in modules:
            rows, columns = found[f"{module}.weight"].shape
            found[f"{module}.weight"] = torch.ones(rows, 2 * columns, dtype=torch.bfloat16)
            for scale in scales:
                del found[f"{module}.{scale}"]

    return tensors(edit)


def remove_files(folder: Path) -> None:
    without_block(folder)
    (folder / "hf_quant_config.json").unlink()


def unquantized(folder: Path) -> None:
    for module in weight_modules(open_checkpoint(folder)).values():
        if module.is_quantized:
            unpack(module.name)(folder)


def sentinel(names: list[str]) -> None:
    names[names.index("lm_head")] = "lm_head.\0backbone.pt_name_sentinel"


FILES: list[tuple[set[str], str, Plant]] = [
    ({"quant_undeclared"}, "full", remove_files),
    ({"quant_declared_only"}, "full", unquantized),
    ({"quant_algorithm"}, "full", says(quant_algo=None)),
    ({"quant_algorithm"}, "full", says(quant_algo="NVFP5")),
    ({"quant_method_missing"}, "full", in_config(lambda block: block.pop("quant_method"))),
    ({"quant_method_unknown"}, "full", in_config(lambda block: (block.clear(), block.update(quant_method="gptq")))),
    ({"quant_fields_missing"}, "full", old_form(kv_cache_quant_algo=None)),
    ({"quant_form"}, "full", old_form(quant_algo="W4A16_NVFP4")),
    ({"quant_group_size"}, "full", says(group_size=32)),
    ({"quant_layers_missing", "quant_excluded_packed"}, "full", says(quant_algo="MIXED_PRECISION")),
    ({"quant_kv_cache"}, "full", says(kv_cache_quant_algo="INT3")),
    ({"quant_exclude_invalid", "quant_not_excluded"}, "full", says(exclude_modules="lm_head")),
    ({"quant_exclude_invalid"}, "full", listed(lambda names: names.append(3))),
    ({"quant_sentinel", "quant_not_excluded"}, "full", listed(sentinel)),
    ({"quant_sentinel"}, "full", listed(lambda names: names.append("backbone.pt_name_sentinel"))),
    ({"quant_sentinel"}, "full", listed(lambda names: names.append("head\0"))),
    ({"quant_files_disagree"}, "full", in_config(lambda block: block.pop("kv_cache_scheme"))),
    ({"quant_files_disagree"}, "full", in_config(lambda block: block["ignore"].remove("backbone.embeddings"))),
    ({"quant_fused_partial"}, "full", unpack(f"{ATTENTION}.k_proj")),
    ({"quant_fused_partial"}, "full", unpack(f"{EXPERTS}.0.up_proj", f"{EXPERTS}.0.down_proj")),
    ({"quant_exclude_partial"}, "mixed", listed(lambda names: names.remove(f"{ATTENTION}.k_proj"))),
    ({"quant_excluded_packed"}, "full", listed(lambda names: names.append(IN_PROJ))),
    ({"quant_excluded_packed"}, "full", listed(lambda names: names.append(f"{EXPERTS}.3.up_proj"))),
    ({"quant_not_excluded"}, "full", unpack(IN_PROJ)),
    ({"quant_not_excluded"}, "full", listed(lambda names: names.remove("lm_head"))),
    ({"quant_not_excluded"}, "gated", listed(lambda names: names.remove("model.layers.0.mlp.gate"))),
    ({"quant_precision"}, "full", says(quant_algo="FP8")),
    ({"quant_exclude_unused"}, "full", listed(lambda names: names.append("backbone.layers.9.mixer.in_proj"))),
    ({"quant_exclude_unused"}, "full", listed(lambda names: names.append("*.layers.9.*"))),
]


@pytest.mark.parametrize(("expected", "kind", "plant"), FILES)
def test_a_fault_of_the_files(exports: Exports, tmp_path: Path, expected: set[str], kind: str, plant: Plant) -> None:
    folder = shutil.copytree(getattr(exports, kind), tmp_path / "checkpoint")
    plant(folder)
    found = findings(check_quantization, folder)
    assert {finding.code for finding in found} == expected
    notes = {"quant_method_unknown"}
    assert all((finding.severity is Severity.NOTE) is (finding.code in notes) for finding in found)


def test_names_of_what_the_checkpoint_does_not_have_at_all(exports: Exports, tmp_path: Path) -> None:
    folder = shutil.copytree(exports.full, tmp_path / "checkpoint")
    listed(lambda names: names.append("mtp*"))(folder)
    assert {(found.code, found.severity) for found in findings(check_quantization, folder)} == {
        ("quant_exclude_unused", Severity.NOTE)
    }


def test_fields_that_only_the_second_file_lacks(exports: Exports, tmp_path: Path) -> None:
    """vLLM reads config.json there, so the other file's fault is not fatal."""
    folder = shutil.copytree(exports.full, tmp_path / "checkpoint")
    edit_json("hf_quant_config.json", lambda content: content["quantization"].pop("group_size"))(folder)
    [found] = findings(check_quantization, folder)
    assert (found.code, found.severity) == ("quant_fields_missing", Severity.WARNING)


def test_eight_bits(exports: Exports, tmp_path: Path) -> None:
    folder = shutil.copytree(exports.base, tmp_path / "checkpoint")

    def convert(found: dict[str, Tensor]) -> None:
        for name in [name for name in found if name.endswith(".weight") and found[name].dim() == 2]:
            if not name.endswith(("embeddings.weight", "lm_head.weight", "gate.weight")):
                found[name] = found[name].to(torch.float8_e4m3fn)
                found |= {name.replace("weight", leaf): torch.tensor(9.0) for leaf in ("weight_scale", "input_scale")}

    edit_tensors(convert)(folder)
    block = {"quant_algo": "FP8", "quant_method": "modelopt", "ignore": ["lm_head"]}
    edit_json("config.json", lambda config: config.update(quantization_config=block))(folder)
    assert codes(check_quantization, folder) == codes(check_scales, folder) == set()
    assert {row.precision for row in census(open_checkpoint(folder)) if row.kind == "mamba"} == {"FP8"}
    # amax is 448 times the scale here, 2688 times in NVFP4: 4 032 is a weight's, 13 440 is none's.
    value(f"{IN_PROJ}.weight_scale", 30.0)(folder)
    assert codes(check_scales, folder) == {"scale_range"}
    tensors(lambda found: found.pop(f"{IN_PROJ}.weight_scale"))(folder)
    assert codes(check_scales, folder) == {"scale_missing"}


def test_mixed_precision_goes_by_module(exports: Exports, tmp_path: Path) -> None:
    folder = shutil.copytree(exports.full, tmp_path / "checkpoint")
    packed = [module.name for module in weight_modules(open_checkpoint(folder)).values() if module.is_quantized]
    layers = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in packed}
    says(quant_algo="MIXED_PRECISION", quantized_layers=layers)(folder)
    assert codes(check_quantization, folder) == set()
    in_config(lambda block: block.pop("quantized_layers"))(folder)
    assert codes(check_quantization, folder) == set()  # vLLM takes the list of the other file then
    says(quantized_layers=layers | {IN_PROJ: {"quant_algo": "FP8"}})(folder)
    assert codes(check_quantization, folder) == {"quant_precision"}
    says(quantized_layers={name: layer for name, layer in layers.items() if name != IN_PROJ})(folder)
    assert codes(check_quantization, folder) == {"quant_excluded_packed"}
    says(quantized_layers=layers | {"lm_head": {"quant_algo": "NVFP4"}})(folder)
    listed(lambda names: names.remove("lm_head"))(folder)
    assert codes(check_quantization, folder) == {"quant_not_excluded"}


def value(name: str, number: float) -> Plant:
    return tensors(lambda found: found.update({name: torch.tensor(number)}))


def scaled(name: str, factor: float) -> Plant:
    return tensors(lambda found: found.update({name: found[name] * factor}))


def as_dtype(name: str, dtype: torch.dtype) -> Plant:
    return tensors(lambda found: found.update({name: found[name].to(dtype)}))


def cache_scales(*names: str) -> Plant:
    return tensors(lambda found: found.update({f"{ATTENTION}.{name}": torch.tensor(0.02) for name in names}))


SCALES: list[tuple[set[str], str, Plant]] = [
    ({"scale_missing"}, "full", tensors(lambda found: found.pop(f"{IN_PROJ}.input_scale"))),
    ({"scale_missing"}, "full", tensors(lambda found: found.pop(f"{IN_PROJ}.weight_scale"))),
    ({"scale_orphan"}, "full", unpack(IN_PROJ, scales=())),
    ({"scale_dtype"}, "full", as_dtype(f"{IN_PROJ}.weight_scale", torch.float32)),
    ({"scale_dtype"}, "full", as_dtype(f"{IN_PROJ}.input_scale", torch.bfloat16)),
    ({"scale_shape"}, "full", tensors(lambda found: found.update({f"{IN_PROJ}.weight_scale_2": torch.ones(3)}))),
    (
        {"scale_shape"},
        "full",
        tensors(lambda found: found.update({(name := f"{IN_PROJ}.weight_scale"): found[name][:, ::2].contiguous()})),
    ),
    ({"scale_value"}, "full", value(f"{IN_PROJ}.weight_scale_2", 0.0)),
    ({"scale_value"}, "full", value(f"{IN_PROJ}.weight_scale_2", -1e-3)),
    ({"scale_value"}, "full", value(f"{IN_PROJ}.input_scale", float("nan"))),
    ({"scale_value"}, "full", value(f"{IN_PROJ}.input_scale", float("inf"))),
    ({"scale_range"}, "full", value(f"{IN_PROJ}.weight_scale_2", 100.0)),
    ({"scale_range"}, "full", value(f"{IN_PROJ}.input_scale", 1e-12)),
    ({"scale_not_shared"}, "full", scaled(f"{ATTENTION}.v_proj.weight_scale_2", 1.5)),
    ({"scale_not_shared"}, "gated", scaled("model.layers.0.mlp.experts.1.up_proj.weight_scale_2", 1.5)),
    ({"scale_input_not_shared"}, "full", scaled(f"{ATTENTION}.v_proj.input_scale", 1.5)),
    ({"scale_experts_input"}, "full", scaled(f"{EXPERTS}.5.down_proj.input_scale", 1.5)),
    ({"kv_scale_missing"}, "full", cache_scales("k_proj.k_scale")),
    ({"kv_scale_ignored"}, "mixed", cache_scales("k_proj.k_scale", "v_proj.v_scale")),
    (set(), "full", cache_scales("k_proj.k_scale", "v_proj.v_scale")),
]


@pytest.mark.parametrize(("expected", "kind", "plant"), SCALES)
def test_a_fault_of_the_scales(exports: Exports, tmp_path: Path, expected: set[str], kind: str, plant: Plant) -> None:
    folder = shutil.copytree(getattr(exports, kind), tmp_path / "checkpoint")
    plant(folder)
    assert codes(check_scales, folder) - {"kv_scale_default"} == expected


def blocks(edit: Callable[[Tensor], Any]) -> Plant:
    """Change the float8 block scales of one weight, seen as bytes."""
    return tensors(lambda found: edit(found[f"{IN_PROJ}.weight_scale"].view(torch.uint8)))


BLOCKS: list[tuple[str, Plant]] = [
    ("block_scale_value", blocks(lambda raw: raw[3, 1:2].fill_(0x7F))),  # E4M3's NaN
    ("block_scale_value", blocks(lambda raw: raw[3, 1:2].bitwise_or_(0x80))),  # the sign
    ("block_scale_zero", blocks(lambda raw: raw[: len(raw) // 2 + 1].zero_())),
    ("block_scale_range", blocks(lambda raw: raw.fill_(0x38))),  # 1.0, of 448
]


@pytest.mark.parametrize(("code", "plant"), BLOCKS)
def test_a_fault_of_the_block_scales(exports: Exports, tmp_path: Path, code: str, plant: Plant) -> None:
    folder = shutil.copytree(exports.full, tmp_path / "checkpoint")
    plant(folder)
    assert codes(check_blocks, folder) == {code}
    assert codes(check_scales, folder) <= {"kv_scale_default"}


def test_scalars_are_what_the_library_reads(exports: Exports, tmp_path: Path) -> None:
    folder = shutil.copytree(exports.full, tmp_path / "checkpoint")
    as_dtype(f"{IN_PROJ}.input_scale", torch.bfloat16)(folder)
    as_dtype(f"{IN_PROJ}.weight_scale_2", torch.float64)(folder)
    as_dtype(f"{ATTENTION}.q_proj.input_scale", torch.float16)(folder)
    view = open_checkpoint(folder)
    expected = {
        name: float(tensor)
        for name, tensor in load_file(folder / "model.safetensors").items()
        if tensor.numel() == 1 and tensor.is_floating_point()
    }
    assert len(expected) > 50
    assert read_scalars(view, view.tensors.values()) == expected


def test_the_census_counts_every_byte_and_weight(exports: Exports) -> None:
    for folder in exports:
        rows = census(open_checkpoint(folder))
        found = load_file(folder / "model.safetensors")
        assert sum(row.bytes for row in rows) == sum(tensor.nbytes for tensor in found.values())
        if folder != exports.base:
            report = json.loads((folder / "export.json").read_text())["precisions"]
            for precision, share in report.items():
                chosen = [row for row in rows if row.precision == precision]
                assert sum(row.bytes for row in chosen) == share["bytes"]
                assert sum(row.parameters for row in chosen) == share["parameters"]
    whole = sum(tensor.numel() for tensor in load_file(exports.base / "model.safetensors").values())
    assert sum(row.parameters for row in census(open_checkpoint(exports.full))) == whole
    four = next(row for row in census(open_checkpoint(exports.full)) if row.kind == "routed experts")
    assert four.precision == "NVFP4" and 4.5 < four.bits_per_weight < 4.6
    # By hand: 4 bits, a byte for 16 weights, and two float32 for 48 x 64.
    assert four.bits_per_weight == pytest.approx(4 + 8 / 16 + 64 / (48 * 64))
    assert CensusRow("x", "BF16", 0, 0, 0).bits_per_weight == 0.0
