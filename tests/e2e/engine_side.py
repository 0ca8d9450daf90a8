"""Runs inside vLLM's environment: loads a checkpoint with real vLLM and compares its layers with qat's arithmetic.

    python engine_side.py CHECKPOINT ORIGINALS PROMPTS DTYPE RESULT

ORIGINALS holds the weights before quantization and their ranges, by the checkpoint's module names, as
`test_serve_numerics.py` writes them; experts are (experts, out, in). RESULT is a JSON file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_PLUGINS": "qat", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant_dequant

from qat.quant.nvfp4 import fake_quant_activation, fake_quant_weight

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}


def main(checkpoint: str, originals: str, prompts: str, dtype: str, result: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=checkpoint,
        skip_tokenizer_init=True,
        dtype=dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_memory_bytes=64 << 20,
        distributed_executor_backend="uni",
    )
    known = load_file(originals)
    layers = llm.apply_model(lambda model: compare_layers(model, known, getattr(torch, dtype)))[0]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
    asked = [{"prompt_token_ids": tokens} for tokens in json.loads(Path(prompts).read_text())]
    best = [
        [next(token for token, entry in position.items() if entry.rank == 1) for position in output.prompt_logprobs[1:]]
        for output in llm.generate(asked, sampling, use_tqdm=False)
    ]
    Path(result).write_text(json.dumps({"layers": layers, "best": best}))


def compare_layers(model: Any, known: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, dict[str, bool]]:
    """For every quantized layer: are the unpacked weights, and the outputs on random inputs, those of qat's forward?"""
    found = {}
    generator = torch.Generator().manual_seed(5)
    for name, layer in model.named_modules():
        base = name.replace("model.", "backbone.", 1)
        if hasattr(layer, "w13_weight"):
            base = base.removesuffix(".routed_experts")
            found[base] = _compare_experts(layer, base, known, dtype, generator)
        elif hasattr(layer, "input_global_scale_inv"):
            stem, _, leaf = base.rpartition(".")
            parts = [f"{stem}.{part}" for part in FUSED.get(leaf, (leaf,))]
            found[base] = _compare_linear(layer, parts, known, dtype, generator)
    return found


def _weight(known: dict[str, torch.Tensor], part: str, dtype: torch.dtype) -> torch.Tensor:
    return fake_quant_weight(known[f"{part}.weight"].to(dtype), known[f"{part}.weight_amax"])


def _compare_linear(
    layer: Any, parts: list[str], known: dict[str, torch.Tensor], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, bool]:
    weight = torch.cat([_weight(known, part, dtype) for part in parts])
    amax = known[f"{parts[0]}.input_amax"]
    x = (torch.randn(37, weight.shape[1], generator=generator) * amax / 3).to(dtype)
    served = layer.quant_method.apply(layer, x)
    reference = ref_nvfp4_quant_dequant(x.clone(), layer.input_global_scale_inv, 16)
    return {
        "inputs_as_vllms_reference": torch.equal(fake_quant_activation(x, amax), reference),
        "weights": torch.equal(layer.weight, weight),
        "outputs": torch.equal(served, F.linear(fake_quant_activation(x, amax), weight)),
        "quantizes_inputs": not torch.equal(served, F.linear(x, weight)),
    }


def _compare_experts(
    layer: Any, base: str, known: dict[str, torch.Tensor], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, bool]:
    up, down = _weight(known, f"{base}.up_proj", dtype), _weight(known, f"{base}.down_proj", dtype)
    up_amax, down_amax = known[f"{base}.up_proj.input_amax"], known[f"{base}.down_proj.input_amax"]
    tokens, chosen = 37, 2
    x = (torch.randn(tokens, up.shape[2], generator=generator) * up_amax / 3).to(dtype)
    scores = torch.rand(tokens, up.shape[0] - 1, generator=generator)  # the last expert gets no token
    weights, ids = scores.topk(chosen)

    expected = torch.zeros(tokens, down.shape[1])
    rows = fake_quant_activation(x, up_amax)
    for expert in range(up.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        if len(token):
            inner = fake_quant_activation(F.relu(F.linear(rows[token], up[expert])).square(), down_amax)
            answer = F.linear(inner, down[expert]).float()
            expected.index_add_(0, token, answer * weights[token, slot].unsqueeze(-1))

    experts = layer.quant_method.moe_kernel.fused_experts
    output = torch.empty(tokens, down.shape[1], dtype=dtype)
    nothing = dict.fromkeys(("expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_tokens_meta"))
    experts.apply(
        output=output,
        hidden_states=x,
        w1=layer.w13_weight,
        w2=layer.w2_weight,
        topk_weights=weights,
        topk_ids=ids,
        activation=layer.moe_config.activation,
        global_num_experts=up.shape[0],
        apply_router_weight_on_input=False,
        **nothing,
    )
    return {
        "weights": torch.equal(layer.w13_weight, up) and torch.equal(layer.w2_weight, down),
        "outputs": torch.equal(output, expected.to(dtype)),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
