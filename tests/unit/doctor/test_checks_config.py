"""Configurations with one planted fault each; the library itself says what its defaults are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qat.export.doctor.checks_config import check_config, check_generation
from qat.export.doctor.config_fields import DEFAULTS, MEANINGS, effective, layers
from qat.export.doctor.findings import Severity
from tests.unit.doctor.one_check import codes, copy_texts, findings
from tests.unit.doctor.planting import TINY_BASE, edit_json

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_texts(tmp_path / "checkpoint")


def put(**fields: Any) -> Edit:
    return lambda config: config.update(fields)


def drop(*fields: str) -> Edit:
    return lambda config: [config.pop(field) for field in fields]


OWN: list[tuple[str, Edit]] = [
    ("config_architectures_missing", put(architectures=None)),
    ("config_architectures_missing", drop("architectures")),
    ("config_architectures_missing", put(architectures=[None])),
    ("config_architectures_missing", put(architectures="NemotronHForCausalLM")),
    ("config_model_type_missing", drop("model_type")),
    ("config_model_type_missing", put(model_type="")),
    ("config_remote_code", put(auto_map={"AutoConfig": "configuration_nemotron_h.NemotronHConfig"})),
    ("config_value", put(hidden_size="192")),
    ("config_value", put(num_experts_per_tok=0)),
    ("config_value", put(vocab_size=True)),
    ("config_pattern", put(num_hidden_layers=9)),
    ("config_pattern", put(layers_block_type=["mamba", "hyena"])),
    ("config_pattern", put(layers_block_type=[["mamba"]])),
    ("config_pattern", put(hybrid_override_pattern="MEM*EMEM*M")),
    ("config_pattern", drop("layers_block_type")),
    ("config_heads", put(num_key_value_heads=4)),
    ("config_heads", put(n_groups=5)),
    ("config_heads", put(head_dim=None, hidden_size=190)),
    ("config_experts", put(num_experts_per_tok=9)),
    ("config_experts", put(n_group=3)),
    ("config_experts", put(topk_group=2)),
    ("config_epsilon_value", put(layer_norm_epsilon=0.0)),
    ("config_epsilon_value", put(layer_norm_epsilon="1e-5")),
    ("config_epsilon_value", put(rms_norm_eps=1e-6)),
    ("config_dtype_conflict", put(torch_dtype="float16")),
]


@pytest.mark.parametrize(("code", "edit"), OWN)
def test_a_fault_in_itself(folder: Path, code: str, edit: Edit) -> None:
    assert codes(check_config, folder) == set()
    edit_json("config.json", edit)(folder)
    assert codes(check_config, folder) == {code}


RIGHT: list[Edit] = [
    put(hidden_size=190),  # 6 heads of 32 are the checkpoint's own choice
    put(head_dim=None),
    put(num_hidden_layers=10),
    put(hybrid_override_pattern="MEM*EMEM*E"),
    put(rms_norm_eps=1e-5, norm_eps=1e-5),
    put(torch_dtype="torch.bfloat16"),
    put(n_group=2, topk_group=2),
    put(num_experts_per_tok=8),
]


@pytest.mark.parametrize("edit", RIGHT)
def test_what_is_right(folder: Path, edit: Edit) -> None:
    edit_json("config.json", edit)(folder)
    assert codes(check_config, folder) == set()


AGAINST: list[tuple[str, Edit]] = [
    ("config_architecture", put(architectures=["LlamaForCausalLM"])),
    ("config_epsilon", put(layer_norm_epsilon=1e-6)),
    ("config_time_step_limit", put(time_step_limit=[0.001, 0.1])),
    ("config_time_step_limit", put(time_step_min=0.01)),
    ("config_groups", put(n_groups=4)),
    ("config_router", put(norm_topk_prob=False)),
    ("config_router", put(routed_scaling_factor=1.0)),
    ("config_router", drop("routed_scaling_factor")),
    ("config_layers", lambda config: config["layers_block_type"].reverse()),
    ("config_layers", put(num_nextn_predict_layers=1)),
    ("config_vocabulary", put(vocab_size=3071)),
    ("config_tied", put(tie_word_embeddings=True)),
    ("config_sizes", put(ssm_state_size=16)),
    ("config_sizes", drop("moe_intermediate_size")),
    ("config_function", put(mlp_hidden_act="silu")),
    ("config_dtype", put(dtype="float32")),
    ("config_context", put(max_position_embeddings=512)),
    ("config_token_ids", put(eos_token_id=1)),
    ("config_field_lost", lambda config: config.pop("only_the_base_has_it", None)),
]


@pytest.mark.parametrize(("code", "edit"), AGAINST)
def test_a_difference_from_the_base(folder: Path, tmp_path: Path, code: str, edit: Edit) -> None:
    edit_json("config.json", put(only_the_base_has_it=3))(folder)
    base = shutil.copytree(folder, tmp_path / "base")
    assert codes(check_config, folder, base) == set()
    edit_json("config.json", edit)(folder)
    found = findings(check_config, folder, base)
    assert {finding.code for finding in found} == {code}
    assert all(finding.severity is not Severity.NOTE for finding in found)


def test_rope_matters_where_the_model_has_positions(tmp_path: Path) -> None:
    old = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000}}
    assert effective(old) == effective(new)
    assert effective(old) != effective(old | {"rope_theta": 1e4})
    assert effective(old) != effective(old | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}})
    hybrid = {"model_type": "nemotron_h", "rope_theta": 1e4}
    assert effective(hybrid) == effective({"model_type": "nemotron_h", "partial_rotary_factor": 1.0})


def test_rope_and_fields_of_unknown_effect(folder: Path, tmp_path: Path) -> None:
    edit_json("config.json", put(model_type="llama", rope_theta=5e5, layers_block_type=None))(folder)
    base = shutil.copytree(folder, tmp_path / "base")
    assert codes(check_config, folder, base) == set()
    edit_json("config.json", put(rope_theta=1e4))(folder)
    assert codes(check_config, folder, base) == {"config_rope"}
    edit_json("config.json", put(rope_theta=5e5, novelty=2))(folder)
    [added] = findings(check_config, folder, base)
    assert (added.code, added.severity) == ("config_field", Severity.NOTE)
    edit_json("config.json", put(novelty=1))(base)
    [changed] = findings(check_config, folder, base)
    assert (changed.code, changed.severity) == ("config_field", Severity.WARNING)


def test_what_is_the_same_in_other_words() -> None:
    pairs = [
        ({"torch_dtype": "bfloat16"}, {"dtype": "torch.bfloat16"}),
        ({"num_local_experts": 8}, {"num_experts": 8}),
        ({"eos_token_id": 2}, {"eos_token_id": [2]}),
        ({"num_attention_heads": 4, "hidden_size": 64}, {"num_attention_heads": 4, "hidden_size": 64, "head_dim": 16}),
        ({"hybrid_override_pattern": "ME*-"}, {"layers_block_type": ["mamba", "moe", "full_attention", "mlp"]}),
        ({"time_step_limit": [0.0, {"__float__": "Infinity"}]}, {"time_step_limit": (0.0, float("inf"))}),
        ({}, {"transformers_version": "5.0", "use_cache": True, "pad_token_id": None}),
    ]
    for one, other in pairs:
        for model_type in ("nemotron_h", "mixtral"):
            assert effective({"model_type": model_type} | one) == effective({"model_type": model_type} | other), one


def test_defaults_are_the_librarys() -> None:
    from transformers import AutoConfig

    for model_type, defaults in DEFAULTS.items():
        config = AutoConfig.for_model(model_type)
        for field, value in defaults.items():
            found = getattr(config, field)
            assert (list(found) if isinstance(found, tuple) else found) == value, (model_type, field)


def test_meanings_name_each_field_once() -> None:
    fields = [field for meaning in MEANINGS for field in meaning.fields]
    assert len(fields) == len(set(fields))


def test_a_lost_wrapper(folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(folder, tmp_path / "base")
    edit_json("config.json", lambda config: config.update(model_type="omni", text_config={**config}))(base)
    assert codes(check_config, folder, base) == {"config_wrapper_lost"}


def test_code_may_lie_elsewhere_or_in_the_folder(folder: Path) -> None:
    auto_map = {"AutoModel": "publisher/model--modeling_x.X", "AutoConfig": "configuration_x.X"}
    edit_json("config.json", put(model_type="x", auto_map=auto_map))(folder)
    assert [finding.severity for finding in findings(check_config, folder)] == [Severity.WARNING]
    (folder / "configuration_x.py").write_text("")
    assert codes(check_config, folder) == set()


def test_rows_and_dtype_of_the_weights(folder: Path) -> None:
    shutil.copyfile(TINY_BASE / "model.safetensors", folder / "model.safetensors")
    assert codes(check_config, folder) == set()
    edit_json("config.json", put(vocab_size=4096))(folder)
    assert codes(check_config, folder) == {"config_vocabulary_rows"}
    edit_json("config.json", put(vocab_size=3072, dtype="float32"))(folder)
    assert codes(check_config, folder) == {"config_dtype_stored"}


GENERATION: list[tuple[str, Edit]] = [
    ("token_id_outside", put(eos_token_id=[2, 4000])),
    ("generation_stop_token", put(eos_token_id=[1])),
    ("generation_sampling", put(temperature=0.2)),
]


@pytest.mark.parametrize(("code", "edit"), GENERATION)
def test_generation(folder: Path, code: str, edit: Edit) -> None:
    assert codes(check_generation, folder, TINY_BASE) == set()
    edit_json("generation_config.json", edit)(folder)
    assert code in codes(check_generation, folder, TINY_BASE)


def test_a_forgotten_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert codes(check_generation, folder, TINY_BASE) == {"generation_missing"}
    assert codes(check_generation, folder) == set()


@pytest.mark.parametrize("strange", [None, True, -1, 1.5, "x", [], {}, [[]], {"a": {}}, "\0", 10**400])
def test_any_value_in_any_field(folder: Path, strange: object) -> None:
    """A stranger's file: whatever a field holds, there is an answer and no exception."""
    config = json.loads((folder / "config.json").read_text())
    for field in config:
        (folder / "config.json").write_text(json.dumps(config | {field: strange}))
        for base in (None, TINY_BASE):
            codes(check_config, folder, base)
            codes(check_generation, folder, base)
        layers({field: strange})
