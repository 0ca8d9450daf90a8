"""Memory of an export: one module, not one shard and not the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qat.export.shards import ShardWriter, tensor_spec
from qat.quant.state import ModuleState, QuantState
from tests.unit.export.builders import base_digest

LAYERS, HIDDEN = 20, 1536

MEASURE = """
import resource, sys
from pathlib import Path
import torch
from qat.export import export_checkpoint
torch.zeros(64, 64) @ torch.zeros(64, 64)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
state = Path(sys.argv[3]) if len(sys.argv) > 3 else None
export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), quant_state=state)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_peak_is_a_few_modules(tmp_path: Path, quantized: bool) -> None:
    """A Llama of 20 layers with one large linear each: 189 MB in all, 9.4 MB each."""
    base = tmp_path / "base"
    base.mkdir()
    names = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(LAYERS)]
    small = [
        f"model.layers.{layer}.{leaf}"
        for layer in range(LAYERS)
        for leaf in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
    specs = [tensor_spec(f"{name}.weight", torch.bfloat16, (HIDDEN, HIDDEN * 2)) for name in names]
    specs += [tensor_spec(f"{name}.weight", torch.bfloat16, (16, 16)) for name in small]
    with ShardWriter(base, specs, 1 << 40) as writer:
        for spec in specs:
            writer.write(spec.name, torch.randn(spec.shape).bfloat16())
        writer.finish()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 16,
    }
    (base / "config.json").write_text(json.dumps(config))
    arguments = [str(base), str(tmp_path / "out")]
    if quantized:
        one = torch.tensor(6.0)
        modules = {name: ModuleState(one, one) for name in (*names, *small)}
        QuantState(modules, "all", "bf16", [], [], base_digest(base)).save(tmp_path / "state.safetensors")
        arguments.append(str(tmp_path / "state.safetensors"))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=170,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    grown, module = int(run.stdout.split()[-1]), HIDDEN * HIDDEN * 2 * 2
    checkpoint = module * LAYERS
    # Packing holds the weight, a few float32 copies of it and an index per weight.
    assert grown < (16 * module if quantized else checkpoint // 4), f"{grown / module:.1f} modules"
