"""A checkpoint of FP8, W4A16 and BF16 modules in real vLLM on CPU: the same weights, the same answers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from qat.serve import engine  # noqa: E402
from tests import tiny_models  # noqa: E402
from tests.e2e import served_models  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.engine]
ROOT = Path(__file__).resolve().parents[2]

VLLM = """
import json, os, sys
os.environ |= {"VLLM_PLUGINS": "qat", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
from pathlib import Path
import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from qat.quant.nvfp4 import fake_quant_weight

def compare(model, known):
    found = {}
    def values(part):
        return fake_quant_weight(known[f"{part}.weight"], known[f"{part}.weight_amax"])
    for name, layer in model.named_modules():
        base = name.replace("model.", "backbone.", 1)
        if hasattr(layer, "w13_weight"):
            base = base.removesuffix(".routed_experts")
            same = [torch.equal(layer.w13_weight, values(f"{base}.up_proj"))]
            found[base] = all([*same, torch.equal(layer.w2_weight, values(f"{base}.down_proj"))])
        elif getattr(layer, "is_w4a16_nvfp4", False):
            x = torch.randn(5, layer.weight.shape[1]).bfloat16()
            same = torch.equal(layer.quant_method.apply(layer, x), torch.nn.functional.linear(x, layer.weight))
            found[base] = same and torch.equal(layer.weight, values(base))
    return found

checkpoint, originals, prompts, result = sys.argv[1:]
llm = LLM(model=checkpoint, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=256,
          enable_prefix_caching=False, max_num_seqs=8, kv_cache_memory_bytes=64 << 20,
          distributed_executor_backend="uni")
known = load_file(originals)
layers = llm.apply_model(lambda model: compare(model, known))[0]
sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
asked = [{"prompt_token_ids": tokens} for tokens in json.loads(Path(prompts).read_text())]
best = [
    [next(token for token, entry in position.items() if entry.rank == 1) for position in output.prompt_logprobs[1:]]
    for output in llm.generate(asked, sampling, use_tqdm=False)
]
Path(result).write_text(json.dumps({"layers": layers, "best": best}))
"""


def test_vllm_serves_lightning(tmp_path: Path) -> None:
    from qat.quant import modelopt
    from qat.quant.state import QuantState

    base = served_models.save_base(tmp_path / "base")
    checkpoint = served_models.export_nvfp4(base, tmp_path / "out", preset="lightning")
    prompts = tiny_models.token_ids(batch=8, length=120, seed=9).tolist()
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    originals = checkpoint.with_suffix(".originals.safetensors")
    command = [
        engine.engine_python(),
        "-c",
        VLLM,
        checkpoint,
        originals,
        tmp_path / "prompts.json",
        tmp_path / "result",
    ]
    done = subprocess.run(
        list(map(str, command)),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    served: dict[str, Any] = json.loads((tmp_path / "result").read_text())
    # Twice experts: routed, shared up, shared down.
    assert len(served["layers"]) == 6 and all(served["layers"].values()), served["layers"]

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    state = QuantState.load(checkpoint.with_suffix(".quant_state.safetensors"))
    modelopt.insert_quantizers(model, state.precision(), json.loads((base / "config.json").read_text()))
    modelopt.load_state_into(model, state)
    with torch.no_grad():
        quantized = model(torch.tensor(prompts)).logits[:, :-1].float()
        with modelopt.quantizers_off(model):
            plain = model(torch.tensor(prompts)).logits[:, :-1].argmax(-1)
    best = torch.tensor(served["best"])
    decided = quantized.topk(2).values.diff(dim=-1).abs().squeeze(-1) > 0.1
    agreement = (best == quantized.argmax(-1))[decided].float().mean().item()
    without = (best == plain)[decided].float().mean().item()
    print(f"top-1 agreement {agreement:.4f} over {int(decided.sum())} positions; with the unquantized {without:.4f}")
    assert agreement >= 0.95 and agreement > without + 0.1
