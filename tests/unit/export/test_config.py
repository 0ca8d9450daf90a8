"""JSON files and the exclude list, against ModelOpt's converter, vLLM's matching and NVIDIA's published checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qat.errors import UserError
from qat.export.config import (
    copy_companions,
    exclude_modules,
    excluding_pattern,
    quantization_files,
    read_config,
    template_files,
)
from qat.export.merge import Module, find_modules
from qat.export.shards import TensorEntry
from qat.quant.presets import Preset

ROOT = Path(__file__).resolve().parents[3]
TINY_BASE = ROOT / "data" / "tiny_base"


def entries(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    return {name: TensorEntry(Path("model.safetensors"), "BF16", shape, 0, 0) for name, shape in shapes.items()}


def nemotron(config: dict[str, Any]) -> dict[str, TensorEntry]:
    """The weights of a Nemotron-H checkpoint of two experts a layer, with shapes that only have the right rank."""
    shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (8, 16), "lm_head.weight": (8, 16)}
    for layer, kind in enumerate(config["hybrid_override_pattern"]):
        mixer = f"backbone.layers.{layer}.mixer"
        leaves = {
            "M": ["in_proj", "out_proj"],
            "*": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "E": ["gate", "shared_experts.up_proj", "shared_experts.down_proj"]
            + [f"experts.{expert}.{leaf}" for expert in range(2) for leaf in ("up_proj", "down_proj")],
        }[kind]
        shapes |= {f"{mixer}.{leaf}.weight": (16, 16) for leaf in leaves}
        shapes[f"backbone.layers.{layer}.norm.weight"] = (16,)
        if kind == "M":
            shapes |= {f"{mixer}.conv1d.weight": (16, 1, 4), f"{mixer}.A_log": (4,)}
    return entries(shapes)


@pytest.fixture
def nano(real_data: Path) -> tuple[dict[str, Any], list[str]]:
    """The published BF16 configuration and the exclude list published with the NVFP4 checkpoint."""
    folder = real_data / "model_configs"
    config = json.loads((folder / "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16_config.json").read_text())
    published = json.loads((folder / "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4_hf_quant_config.json").read_text())
    return config, published["quantization"]["exclude_modules"]


def test_the_published_list_plus_what_modelopt_names_today(nano: tuple[dict[str, Any], list[str]]) -> None:
    config, published = nano
    tensors = nemotron(config)
    found = exclude_modules(tensors, find_modules(tensors, Path()), Preset("nvidia-nano").quantized_modules(config))
    gates = {name.removesuffix(".weight") for name in tensors if name.endswith(".gate.weight")}
    assert set(found) == set(published) | gates | {"backbone.embeddings"}


def test_experts_left_out_are_named_as_vllm_asks(nano: tuple[dict[str, Any], list[str]]) -> None:
    tensors = nemotron(nano[0])
    modules = find_modules(tensors, Path())
    packed = [name for name in Preset("all").quantized_modules(nano[0]) if not name.startswith("backbone.layers.1.")]
    found = exclude_modules(tensors, modules, packed)
    assert "backbone.layers.1.mixer.experts*" in found
    assert excluding_pattern("backbone.layers.1.mixer.experts", found)
    assert excluding_pattern("backbone.layers.3.mixer.experts", found) is None
    assert excluding_pattern("backbone.layers.13.mixer.experts", found) is None


VLLM = """
import json, sys
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.models.nemotron_h import NemotronHForCausalLM
asked, forms = json.load(sys.stdin)
found = []
for form in forms:
    config = ModelOptNvFp4Config.from_config(form)
    config.packed_modules_mapping = NemotronHForCausalLM.packed_modules_mapping
    config.apply_vllm_mapper(NemotronHForCausalLM.hf_to_vllm_mapper)
    assert config.group_size == 16 and config.quant_method == "NVFP4" and config.is_checkpoint_nvfp4_serialized
    found.append([config.kv_cache_quant_algo, [name for name in asked if config.is_layer_excluded(name)]])
print("FOUND" + json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.engine
def test_vllm_excludes_just_what_is_not_packed(nano: tuple[dict[str, Any], list[str]]) -> None:
    python = Path(os.environ.get("QAT_ENGINE", ROOT / ".venv-vllm")) / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no vLLM environment at {python}")
    config = nano[0]
    tensors = nemotron(config)
    modules = find_modules(tensors, Path())
    packed = set(Preset("nvidia-nano").quantized_modules(config)) - {
        "backbone.layers.1.mixer.experts.up_proj",
        "backbone.layers.1.mixer.experts.down_proj",
    }
    files = quantization_files(config, exclude_modules(tensors, modules, packed), "fp8")
    forms = [json.loads(files["config.json"])["quantization_config"], json.loads(files["hf_quant_config.json"])]
    # Names as vLLM's model has them: q, k and v are one layer, all experts of a layer are one.
    expected: dict[str, bool] = {}
    for name in modules:
        asked = name.replace("backbone.", "model.", 1).replace("embeddings", "embed_tokens")
        asked = asked.rpartition(".")[0] if ".experts." in asked else asked
        expected[re.sub(r"\.[qkv]_proj$", ".qkv_proj", asked)] = name not in packed
    run = subprocess.run(
        [python, "-c", VLLM],
        input=json.dumps([list(expected), forms]),
        capture_output=True,
        text=True,
        timeout=170,
        check=True,
        env=os.environ | {"VLLM_PLUGINS": ""},
    )
    answer = json.loads(run.stdout.rpartition("FOUND")[2])
    for kv_cache, excluded in answer:
        assert kv_cache == "FP8"
        assert set(excluded) == {name for name, left_out in expected.items() if left_out}


@pytest.mark.parametrize("kv_cache", ["bf16", "fp8"])
def test_both_forms_agree_as_modelopt_converts_them(kv_cache: str) -> None:
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    config = {"architectures": ["X"], "model_type": "nemotron_h", "torch_dtype": "bfloat16", "chat": "\u0ca8"}
    files = quantization_files(config, ["a", "lm_head"], kv_cache)
    written = json.loads(files["config.json"])
    assert written.pop("quantization_config") == convert_hf_quant_config_format(
        json.loads(files["hf_quant_config.json"])
    )
    assert written == config
    assert "\u0ca8" in files["config.json"]


@pytest.mark.parametrize("limit", ['[0.0, {"__float__": "Infinity"}]', "[0.0, Infinity]"])
def test_time_step_limit_stays_loadable(tmp_path: Path, limit: str) -> None:
    """Transformers writes infinity as a tagged string, older files hold it bare; both forms survive and load."""
    from transformers import AutoConfig

    from tests.tiny_models import nemotron_h_tiny

    nemotron_h_tiny().config.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    raw = json.loads(path.read_text()) | {"architectures": ["NemotronHForCausalLM"], "time_step_limit": "HERE"}
    path.write_text(json.dumps(raw).replace('"HERE"', limit))
    (tmp_path / "out").mkdir()
    text = quantization_files(read_config(tmp_path / "base"), [], "bf16")["config.json"]
    (tmp_path / "out" / "config.json").write_text(text)
    assert AutoConfig.from_pretrained(tmp_path / "out").time_step_limit[1] == float("inf")
    assert json.loads(text)["time_step_limit"] == json.loads(limit)


@pytest.mark.parametrize(
    ("prefix", "pattern", "excluded"),
    [
        ("model.layers.1.mlp.gate", "model.layers.1.mlp.gate", True),
        ("model.layers.1.mlp.gate_up_proj", "model.layers.1.mlp.gate", True),
        ("model.layers.11.mlp.gate", "model.layers.1.mlp.gate", False),
        ("mtp.layers.0.x", "mtp*", True),
        ("a.b", "a.*", True),
        ("ab", "a.*", False),
        ("a.b.c", "*.c", True),
        ("a.b.c", "*.d", False),
    ],
)
def test_matching_rules(prefix: str, pattern: str, excluded: bool) -> None:
    assert (excluding_pattern(prefix, [pattern]) == pattern) is excluded


def test_a_name_that_would_swallow_another_is_refused() -> None:
    names = ("m.gate", "m.gate_proj", "m.up_proj")
    modules = {name: Module(name, (f"{name}.weight",), (16, 16), "BF16") for name in names}
    tensors = entries({f"{name}.weight": (16, 16) for name in names})
    with pytest.raises(UserError, match="would be excluded by the name of another"):
        exclude_modules(tensors, modules, names[1:])


def test_a_tied_head_is_excluded_without_a_tensor() -> None:
    assert exclude_modules({}, {}, []) == ["lm_head"]


def test_experts_with_gaps_or_unequal_shapes_are_refused() -> None:
    shapes = {"m.experts.0.up_proj.weight": (4, 16), "m.experts.2.up_proj.weight": (4, 16)}
    with pytest.raises(UserError, match="without gaps"):
        find_modules(entries(shapes), Path())
    with pytest.raises(UserError, match="differ in shape"):
        find_modules(entries({"m.experts.0.up_proj.weight": (4, 16), "m.experts.1.up_proj.weight": (5, 16)}), Path())
    with pytest.raises(UserError, match="without gaps"):
        find_modules(entries({"m.experts.0.gate_proj.weight": (4, 16), "m.experts.1.up_proj.weight": (4, 16)}), Path())


def test_module_order_with_more_than_ten_experts() -> None:
    tensors = entries({f"m.experts.{expert}.up_proj.weight": (4, 16) for expert in (0, 1, 10, 11, *range(2, 10))})
    module = find_modules(tensors, Path())["m.experts.up_proj"]
    assert module.tensors == tuple(f"m.experts.{expert}.up_proj.weight" for expert in range(12))
    assert module.shape == (12, 4, 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json"),
        ("{", "not valid JSON"),
        ("[]", "lacks"),
        ('{"architectures": null, "model_type": "x"}', "lacks"),
        ('{"architectures": ["X"]}', "lacks"),
        ('{"architectures": ["X"], "model_type": "x", "quantization_config": {}}', "quantized already"),
    ],
)
def test_bases_without_a_usable_config(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


def test_companions_are_copied_and_nothing_else(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    out.mkdir()
    wanted = [
        "LICENSE.txt",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "merges.txt",
        "tokenizer.json",
    ]
    for name in (*wanted, "README.md", "pytorch_model.bin", "modeling.py", "config.json", "optimizer.pt"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(name.encode() + b"\r\n\xff")
    assert copy_companions(base, out) == wanted
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == set(wanted)
    assert all((out / name).read_bytes() == name.encode() + b"\r\n\xff" for name in wanted)


@pytest.mark.parametrize(
    "inside",
    [
        None,
        "{{ 'inside' }}",
        [{"name": "default", "template": "{{ 'inside' }}"}, {"name": "tool_use", "template": "{{ 'tools' }}"}],
    ],
    ids=["beside", "inside", "named"],
)
def test_the_recipes_template_is_the_one_that_a_reader_finds(tmp_path: Path, inside: Any) -> None:
    """Transformers reads the export: one template, with tools and without, whatever the base carried and where."""
    from transformers import AutoTokenizer

    base, out, template = tmp_path / "base", tmp_path / "out", tmp_path / "mine.jinja"
    shutil.copytree(TINY_BASE, base, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    if inside is not None:
        settings["chat_template"] = inside
        (base / "chat_template.jinja").unlink()
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 'tools' }}")
    template.write_bytes("{{ 'ಕ' }}\r\n{{ messages[0].content }}".encode())
    out.mkdir()
    files = template_files(base, template)
    for name, content in files.items():
        (out / name).write_bytes(content)
    assert not {*copy_companions(base, out, own_template=True)} & {*files}
    tokenizer = AutoTokenizer.from_pretrained(out)
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        assert tokenizer.get_chat_template(None, tools).encode().splitlines() == template.read_bytes().splitlines()
    assert (out / "chat_template.jinja").read_bytes() == template.read_bytes()
    kept = json.loads((out / "tokenizer_config.json").read_text())
    assert kept == {key: value for key, value in settings.items() if key != "chat_template"}
    if inside is None:
        assert files["tokenizer_config.json"] == (base / "tokenizer_config.json").read_bytes()


def test_templates_that_cannot_be_exported(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    with pytest.raises(UserError, match="cannot be read"):
        template_files(tmp_path, template)
    template.write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        template_files(tmp_path, template)
    template.write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        template_files(tmp_path, template)
    template.write_text("{{ messages }}")
    assert template_files(tmp_path, template) == {"chat_template.jinja": b"{{ messages }}"}
    for content in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match="is no JSON"):
            template_files(tmp_path, template)
