"""Bases, PEFT adapters and scales for the export's tests, made with Transformers, PEFT and plain torch only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qat.quant.presets import Preset
from qat.quant.state import ModuleState, QuantState
from tests.tiny_models import save_tiny

LINEARS = r".*\.(q_proj|k_proj|v_proj|o_proj|in_proj|shared_experts\.up_proj|shared_experts\.down_proj)"
EXPERTS = ["mixer.experts.up_proj", "mixer.experts.down_proj"]
COMPANIONS = {
    "tokenizer.json": b'{"model": 1}\r\n',
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": "{{- '\u0ca8' -}}\n".encode(),
}


def base_digest(folder: Path) -> str:
    """The digest that training records: name, NUL, SHA-256 and newline of every weight file, hashed again."""
    lines = "".join(
        f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n"
        for file in sorted(folder.glob("*.safetensors"))
    )
    return hashlib.sha256(lines.encode()).hexdigest()


def make_base(folder: Path, model: Any = None) -> Path:
    save_tiny(folder, model)
    for name, content in COMPANIONS.items():
        (folder / name).write_bytes(content)
    return folder


def load_model(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)


def make_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int,
    linears: str | list[str] = LINEARS,
    experts: Sequence[str] = EXPERTS,
    sidecar: dict[str, str] | None = None,
    **settings: Any,
) -> Path:
    """A PEFT adapter with random factors, saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 7, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"} | settings
    config = LoraConfig(target_modules=linears, target_parameters=list(experts), **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(load_model(base), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder)
    if sidecar is not None:
        (folder / "qat_adapter.json").write_text(json.dumps(sidecar))
    return folder


def merge_reference(base: Path, adapters: Sequence[Path], folder: Path) -> Path:
    """Merge with PEFT's own factors and one torch call per weight, and let Transformers write the checkpoint."""
    from peft import PeftModel
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    model = load_model(base)
    for adapter in adapters:
        wrapped = PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            for layer in [module for module in wrapped.modules() if isinstance(module, LoraLayer)]:
                if isinstance(layer, ParamWrapper):
                    left, right, scale = layer.get_delta_factors("default")
                    weight = layer.get_param()
                    weight.data = torch.baddbmm(weight, left, right, alpha=scale)
                else:
                    weight = layer.base_layer.weight
                    a, b = (part["default"].weight.to(weight.dtype) for part in (layer.lora_A, layer.lora_B))
                    weight.data = torch.addmm(weight, b, a, alpha=layer.scaling["default"])
        model = wrapped.unload()
    model.save_pretrained(folder)
    return folder


def peft_merged(base: Path, adapter: Path, folder: Path) -> Path:
    """PEFT's own merge in float32."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(load_model(base, torch.float32), adapter).merge_and_unload()
    merged.save_pretrained(folder)
    return folder


def make_state(base: Path, merged: Path, path: Path, preset: str = "all", **changes: Any) -> Path:
    """Scales as calibration would find them: amax of the merged weights, shared over q, k, v and gate, up."""
    weights = load_file(merged / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    modules: dict[str, ModuleState] = {}
    for number, (name, kind) in enumerate(Preset(preset).formats(config).items()):
        entry = None if kind == "w4a16" else torch.tensor(1.5 + number / 7)
        modules[name] = ModuleState(_weight_amax(name, weights), entry, kind)
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for first in [name for name in modules if name.endswith(group[0]) and "experts" not in name]:
            members = [first.removesuffix(group[0]) + leaf for leaf in group]
            shared = torch.stack([modules[name].weight_amax for name in members]).max()
            entry, kind = modules[first].input_amax, modules[first].format
            modules.update({name: ModuleState(shared, entry, kind) for name in members})
    fields = {
        "preset": preset,
        "kv_cache": "bf16",
        "groups": [],
        "excluded": ["lm_head"],
        "base_sha256": base_digest(base),
    }
    QuantState(modules, **(fields | changes)).save(path)
    return path


def _weight_amax(name: str, weights: dict[str, Tensor]) -> Tensor:
    if ".experts." not in name:
        return weights[f"{name}.weight"].abs().max().float()
    prefix, _, leaf = name.rpartition(".")
    leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    count = sum(1 for tensor in weights if tensor.startswith(f"{prefix}.") and tensor.endswith(f".{leaves[0]}.weight"))
    return torch.stack(
        [
            torch.stack([weights[f"{prefix}.{expert}.{part}.weight"].abs().max() for part in leaves]).max().float()
            for expert in range(count)
        ]
    )
