"""Whole exports against Transformers, PEFT and ModelOpt."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qat.errors import UserError
from qat.export import export_checkpoint, verify_export
from tests.tiny_models import qwen3_moe_tiny, qwen3_tiny, token_ids
from tests.unit.export.builders import (
    COMPANIONS,
    load_model,
    make_adapter,
    make_base,
    make_state,
    merge_reference,
    peft_merged,
)
from tests.unit.export.conftest import Persona


def raw(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint as dtype, shape and bytes, through the safetensors library."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                tensor = tensors.get_tensor(name)
                content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                found[name] = (str(tensor.dtype), tuple(tensor.shape), content)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def slow_unpack(codes: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """NVFP4 by its definition: sign, two exponent bits with bias 1, one mantissa bit; low nibble first."""

    def value(code: int) -> float:
        sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
        return -magnitude if sign else magnitude

    rows = [[value(code) for byte in row for code in (byte & 15, byte >> 4)] for row in codes.tolist()]
    steps = scale.double().repeat_interleave(16, dim=-1) * scale_2.double()
    return torch.tensor(rows, dtype=torch.float64) * steps


def test_merged_bf16_equals_transformers_own_checkpoint(persona: Persona, tmp_path: Path) -> None:
    report = export_checkpoint(persona.base, tmp_path / "out", adapters=persona.adapters)
    assert raw(tmp_path / "out") == raw(persona.merged)
    # q, k, v, o, in_proj, 2 x (shared up, down) and 2 layers x 2 projections x 8 experts
    assert report.merged == 4 + 1 + 4 + 32
    assert (report.packed, report.copied) == (0, report.tensors - report.merged)
    assert report.verification.differing_bytes == 0
    assert report.verification.compared_bytes == report.bytes


def test_merged_export_loads_with_the_same_logits(persona: Persona, tmp_path: Path) -> None:
    export_checkpoint(persona.base, tmp_path / "out", adapters=persona.adapters)
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(ids).logits, load_model(persona.merged)(ids).logits)


def test_float32_merge_equals_peft(tmp_path: Path) -> None:
    from tests.tiny_models import nemotron_h_tiny

    base = make_base(tmp_path / "base", nemotron_h_tiny(dtype=torch.float32))
    for number, settings in enumerate(
        ({}, {"use_rslora": True}, {"rank_pattern": {"o_proj": 3}, "alpha_pattern": {"in_proj": 5}})
    ):
        adapter = make_adapter(base, tmp_path / f"adapter{number}", seed=3, **settings)
        export_checkpoint(base, tmp_path / f"out{number}", adapters=[adapter])
        expected = load_file(peft_merged(base, adapter, tmp_path / f"peft{number}") / "model.safetensors")
        found = load_file(tmp_path / f"out{number}" / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6, msg=name)


def test_packed_weights_are_the_merged_ones_rounded(persona: Persona, tmp_path: Path) -> None:
    """Unpacked by definition, every weight lies within half a step of the merged one, and the names are complete."""
    report = export_checkpoint(persona.base, tmp_path / "out", adapters=persona.adapters, quant_state=persona.state)
    stored, merged = load_file(tmp_path / "out" / "model.safetensors"), load_file(persona.merged / "model.safetensors")
    packed = [name.removesuffix("_scale_2") for name in stored if name.endswith(".weight_scale_2")]
    assert len(packed) == report.packed == 4 + 2 + 4 + 32
    scales = ("weight_scale", "weight_scale_2", "input_scale")
    expected = set(merged) | {name.removesuffix("weight") + suffix for name in packed for suffix in scales}
    assert set(stored) == expected
    for name in packed:
        unpacked = slow_unpack(stored[name], stored[f"{name}_scale"], stored[f"{name}_scale_2"])
        step = stored[f"{name}_scale"].double().repeat_interleave(16, dim=-1) * stored[f"{name}_scale_2"].double()
        # Values up to 6 steps, at most 2 steps apart; the block's scale itself is rounded by at most 1/16.
        assert ((unpacked - merged[name].double()).abs() <= step * 1.0 + 0.4 * step).all(), name
        assert (unpacked - merged[name].double()).abs().mean() < 0.35 * step.mean(), name
    for name in set(merged) - set(packed):
        assert torch.equal(stored[name], merged[name]), name


def modelopt_checkpoint(base: Path, out: Path) -> dict[str, Any]:
    """Calibrate and export with ModelOpt; the amax of every quantizer, shared over q, k, v beforehand."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    model = load_model(base)
    model.config.dtype = model.dtype
    model = mtq.quantize(
        model, mtq.NVFP4_DEFAULT_CFG, forward_loop=lambda m: [m(token_ids(4, 64, seed)) for seed in range(2)]
    )
    amaxes = {name: module._amax for name, module in model.named_modules() if hasattr(module, "_amax")}
    for name in [name for name in amaxes if name.endswith("q_proj.weight_quantizer")]:
        members = [name.replace("q_proj", leaf) for leaf in ("q_proj", "k_proj", "v_proj")]
        shared = torch.stack([amaxes[member] for member in members]).max()
        for member in members:
            amaxes[member].copy_(shared)
    found = {name: amax.float().tolist() for name, amax in amaxes.items()}
    export_hf_checkpoint(model, export_dir=out)
    return found


def state_from_modelopt(base: Path, amaxes: dict[str, Any], path: Path) -> Path:
    from qat.quant.presets import Preset
    from qat.quant.state import ModuleState, QuantState
    from tests.unit.export.builders import base_digest

    modules = {}
    for name in Preset("all").quantized_modules(json.loads((base / "config.json").read_text())):
        inside = name.replace("backbone.", "model.")
        if ".experts." in name:
            weight = torch.stack([amaxes[f"{inside}_weight_quantizers.{expert}"] for expert in range(8)])
            modules[name] = ModuleState(weight, amaxes[f"{inside}_input_quantizer"])
        else:
            modules[name] = ModuleState(amaxes[f"{inside}.weight_quantizer"], amaxes[f"{inside}.input_quantizer"])
    QuantState(modules, "all", "bf16", [], ["lm_head"], base_digest(base)).save(path)
    return path


def test_nvfp4_export_equals_modelopt(persona: Persona, tmp_path: Path) -> None:
    """Same amax, same base: every byte of every tensor and the quantization configuration as ModelOpt writes them."""
    # ModelOpt keeps one registry of quantized modules a process, and other tests have put qat's into it.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as clean:
        found = clean.submit(modelopt_checkpoint, persona.base, tmp_path / "modelopt").result()
    amaxes = {name: torch.tensor(values) for name, values in found.items()}
    state = state_from_modelopt(persona.base, amaxes, tmp_path / "state.safetensors")
    report = export_checkpoint(persona.base, tmp_path / "out", quant_state=state)
    assert raw(tmp_path / "out") == raw(tmp_path / "modelopt")
    assert report.packed == 42
    theirs = json.loads((tmp_path / "modelopt" / "config.json").read_text())["quantization_config"]
    ours = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    # ModelOpt 0.47 appends a private sentinel to the names that Transformers' weight renaming touches.
    theirs["ignore"] = sorted(name.split(".\0")[0] for name in theirs["ignore"])
    assert ours == theirs
    hf_theirs = json.loads((tmp_path / "modelopt" / "hf_quant_config.json").read_text())
    hf_theirs["quantization"]["exclude_modules"] = theirs["ignore"]
    assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text()) == hf_theirs


@pytest.mark.parametrize("quantized", [False, True])
def test_files_shards_and_reproducibility(persona: Persona, tmp_path: Path, quantized: bool) -> None:
    state = persona.state if quantized else None
    for name, limit in (("one", 4 << 30), ("two", 4 << 30), ("many", 40_000)):
        export_checkpoint(
            persona.base, tmp_path / name, adapters=persona.adapters, quant_state=state, max_shard_bytes=limit
        )
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert raw(tmp_path / "one") == raw(tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "many" / file, framework="pt") as tensors:
            assert name in tensors.keys()  # noqa: SIM118 - no mapping
    assert index["metadata"]["total_size"] == sum(len(content) for _, _, content in raw(tmp_path / "one").values())
    written = files(tmp_path / "one")
    for name, content in (
        COMPANIONS | {"generation_config.json": (persona.base / "generation_config.json").read_bytes()}
    ).items():
        assert written[name] == content
    report = json.loads(written.pop("export.json"))
    assert report["sha256"] == {name: hashlib.sha256(content).hexdigest() for name, content in written.items()}
    base_config = json.loads((persona.base / "config.json").read_text())
    config = json.loads(written["config.json"])
    assert config.pop("quantization_config", None) is None or quantized
    assert config == base_config
    if not quantized:
        assert written["config.json"] == (persona.base / "config.json").read_bytes()
        assert load_model(tmp_path / "many") is not None


def test_sharded_base(persona: Persona, tmp_path: Path) -> None:
    model = load_model(persona.base)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    export_checkpoint(tmp_path / "sharded", tmp_path / "a")
    export_checkpoint(persona.base, tmp_path / "b")
    assert raw(tmp_path / "a") == raw(tmp_path / "b") == raw(persona.base)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_gated_families(tmp_path: Path, family: str) -> None:
    """Gate and up share their scales; in a mixture both lie in one fused parameter, adapted as one."""
    base = make_base(tmp_path / "base", qwen3_tiny() if family == "qwen3" else qwen3_moe_tiny())
    # Transformers 5.19 writes `num_local_experts`; the published checkpoints have `num_experts`.
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(text.replace('"num_local_experts"', '"num_experts"'))
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if family == "qwen3_moe" else []
    linears = r".*\.(q_proj|o_proj|gate_proj|down_proj)" if family == "qwen3" else r".*\.(q_proj|o_proj)"
    adapter = make_adapter(base, tmp_path / "adapter", seed=4, linears=linears, experts=experts)
    merged = merge_reference(base, [adapter], tmp_path / "merged")
    export_checkpoint(base, tmp_path / "bf16", adapters=[adapter])
    assert raw(tmp_path / "bf16") == raw(merged)
    state = make_state(base, merged, tmp_path / "state.safetensors")
    export_checkpoint(base, tmp_path / "nvfp4", adapters=[adapter], quant_state=state)
    stored = load_file(tmp_path / "nvfp4" / "model.safetensors")
    gate = [name for name in stored if name.endswith("gate_proj.weight_scale_2")]
    assert gate
    assert all(torch.equal(stored[name], stored[name.replace("gate_proj", "up_proj")]) for name in gate)
    excluded = json.loads((tmp_path / "nvfp4" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(2)] if family == "qwen3_moe" else []
    assert excluded == sorted(["lm_head", "model.embed_tokens", *routers])


def test_census_counts_every_weight_once(persona: Persona, tmp_path: Path) -> None:
    report = export_checkpoint(persona.base, tmp_path / "out", adapters=persona.adapters, quant_state=persona.state)
    weights = load_file(persona.base / "model.safetensors")
    total = sum(tensor.numel() for tensor in weights.values())
    assert sum(precision.parameters for precision in report.precisions.values()) == total
    assert sum(precision.bytes for precision in report.precisions.values()) == report.bytes
    nvfp4 = report.precisions["NVFP4"]
    assert nvfp4.tensors == 4 * 42
    # half a byte a weight, one byte for 16 weights, two float32 for each tensor
    assert nvfp4.bytes == nvfp4.parameters // 2 + nvfp4.parameters // 16 + 42 * 8
    assert report.precisions["F32"].parameters == 16  # the correction bias of two routers with 8 experts


def test_inputs_of_another_base_are_refused(persona: Persona, tmp_path: Path) -> None:
    from tests.tiny_models import nemotron_h_tiny

    other = make_base(tmp_path / "other", nemotron_h_tiny(seed=9))
    with pytest.raises(UserError, match="another base"):
        export_checkpoint(other, tmp_path / "out", adapters=persona.adapters[:1])
    with pytest.raises(UserError, match="another base"):
        export_checkpoint(other, tmp_path / "out", quant_state=persona.state)
    with pytest.raises(UserError, match="on top of another adapter"):
        export_checkpoint(persona.base, tmp_path / "out", adapters=persona.adapters[1:])
    with pytest.raises(UserError, match="on top of another adapter"):
        export_checkpoint(persona.base, tmp_path / "out", adapters=persona.adapters[::-1])
    assert list(tmp_path.iterdir()) == [other]


def test_a_diverged_adapter_is_refused(persona: Persona, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(persona.adapters[0] / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    broken = tmp_path / "adapter"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((persona.adapters[0] / "adapter_config.json").read_bytes())
    save_file(weights, broken / "adapter_model.safetensors")
    with pytest.raises(UserError, match="not finite"):
        export_checkpoint(persona.base, tmp_path / "out", adapters=[broken])
    assert not (tmp_path / "out").exists()


def test_progress_runs_to_a_hundred(persona: Persona, tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def update(self, completed: int, note: str = "") -> None:
            self.seen.append(completed)

    recorder = Recorder()
    export_checkpoint(persona.base, tmp_path / "out", quant_state=persona.state, progress=recorder)
    assert recorder.seen == sorted(recorder.seen)
    assert recorder.seen[-1] == 100


def test_verification_of_a_finished_export(persona: Persona, tmp_path: Path) -> None:
    report = export_checkpoint(persona.base, tmp_path / "out", adapters=persona.adapters, quant_state=persona.state)
    again = verify_export(tmp_path / "out", persona.base, persona.adapters, persona.state)
    assert again == report.verification
    assert again.compared_bytes == report.bytes


def test_a_template_of_its_own_is_in_the_export_and_its_hashes(persona: Persona, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_bytes(b"{{ messages }}\r\n")
    report = export_checkpoint(persona.base, tmp_path / "out", chat_template=template)
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == b"{{ messages }}\r\n"
    assert report.sha256["chat_template.jinja"] == hashlib.sha256(b"{{ messages }}\r\n").hexdigest()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (persona.base / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="cannot be read"):
        export_checkpoint(persona.base, tmp_path / "other", chat_template=tmp_path / "missing.jinja")
    assert not (tmp_path / "other").exists()
