"""The Mamba mixer's time step: against the recurrence written out, Transformers' own decoding, and vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qat.patches.nemotron_h_time_step_limit import NemotronHTimeStepLimit
from tests.tiny_models import nemotron_h_tiny, save_tiny, token_ids
from tests.unit.patches.saving import applied, require_repair

LOW = (-10.0, -4.0)  # dt from 0.00005 to 0.018: on both sides of time_step_min


def model_with_small_steps(limit: tuple[float, float] = (0.0, float("inf")), head_dim: int = 16) -> Any:
    """A float32 Nemotron-H whose Mamba layer matters: unit convolution, weak skip connection, small time steps."""
    from transformers import AutoModelForCausalLM

    config = nemotron_h_tiny().config
    config.time_step_limit, config.head_dim = limit, head_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.data.normal_(std=1.0 if "conv1d" in name else 0.8 / parameter.shape[-1] ** 0.5)
        mixer = model.model.layers[0].mixer
        mixer.dt_bias.data.uniform_(*LOW)
        mixer.D.data.fill_(0.1)
    return model


def recurrence(mixer: Any, inputs: torch.Tensor, limit: tuple[float, float]) -> torch.Tensor:
    """Mamba-2's definition, one token at a time in float64: h = exp(dt A) h + dt B x, y = C h + D x."""
    mixer = mixer.double()
    gate, mixed, dt = mixer.in_proj(inputs.double()).split(
        [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1
    )
    mixed = F.silu(mixer.conv1d(mixed.transpose(1, 2))[..., : inputs.shape[1]].transpose(1, 2))
    groups, state = mixer.n_groups, mixer.ssm_state_size
    x, b, c = mixed.split([mixer.intermediate_size, groups * state, groups * state], dim=-1)
    batch, length = inputs.shape[:2]
    x = x.view(batch, length, mixer.num_heads, mixer.head_dim)
    b, c = (part.view(batch, length, groups, state).repeat_interleave(mixer.num_heads // groups, 2) for part in (b, c))
    dt = F.softplus(dt + mixer.dt_bias).clamp(*limit)
    decay = torch.exp(dt * -torch.exp(mixer.A_log))
    held = torch.zeros(batch, mixer.num_heads, mixer.head_dim, state, dtype=torch.float64)
    out = []
    for t in range(length):
        step = dt[:, t, :, None, None] * x[:, t, :, :, None] * b[:, t, :, None, :]
        held = decay[:, t, :, None, None] * held + step
        out.append((held * c[:, t, :, None, :]).sum(-1) + mixer.D[:, None] * x[:, t])
    y = torch.stack(out, dim=1).reshape(batch, length, -1)
    answer: torch.Tensor = mixer.out_proj(mixer.norm(y, gate))
    return answer


def test_repair() -> None:
    require_repair(NemotronHTimeStepLimit())


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.0005, 0.002)])
def test_the_mixer_follows_the_checkpoints_limit(limit: tuple[float, float]) -> None:
    stock = model_with_small_steps(limit).model.layers[0].mixer
    with applied(NemotronHTimeStepLimit()):
        patched = model_with_small_steps(limit).model.layers[0].mixer
    inputs = torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before, after = stock(inputs), patched(inputs)
        expected = recurrence(patched, inputs, limit)
    assert (after - expected).abs().max() < 1e-3 * expected.abs().max()
    assert (before - expected).abs().max() > 0.05 * expected.abs().max()


def test_prefill_and_decoding_agree() -> None:
    def distance(model: Any) -> float:
        ids = token_ids(2, 40)
        with torch.no_grad():
            whole = model(ids).logits[:, -20:]
            cache, steps = model(ids[:, :20], use_cache=True).past_key_values, []
            for t in range(20, 40):
                out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits)
        return float((whole - torch.cat(steps, dim=1)).abs().max())

    with applied(NemotronHTimeStepLimit()):
        patched = model_with_small_steps()
    assert distance(patched) < 1e-3
    assert distance(model_with_small_steps()) > 0.05


ENGINE = """
import json, os
os.environ |= {"VLLM_PLUGINS": "qat", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "QAT_VLLM_FLOAT32": "1"}
import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams

llm = LLM(
    model=CHECKPOINT,
    skip_tokenizer_init=True,
    dtype="float32",
    enforce_eager=True,
    enable_prefix_caching=False,
    max_model_len=128,
    max_num_seqs=4,
    max_logprobs=512,
    kv_cache_memory_bytes=64 << 20,
    distributed_executor_backend="uni",
)
sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=512, detokenize=False)
asked = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
found = [
    [[position[token].logprob for token in range(512)] for position in output.prompt_logprobs[1:]]
    for output in llm.generate(asked, sampling, use_tqdm=False)
]
save_file({"logprobs": torch.tensor(found)}, RESULT)
result = {"positions": len(found[0])}
"""


@pytest.mark.slow
@pytest.mark.engine
def test_logits_are_vllms(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from qat.patches import engine

    # vLLM's attention for CPU has no kernel for heads of 16.
    checkpoint = save_tiny(tmp_path / "model", model_with_small_steps(head_dim=32))
    prompts = token_ids(batch=4, length=64, seed=9)
    result = tmp_path / "served.safetensors"
    values = {"CHECKPOINT": str(checkpoint), "PROMPTS": prompts.tolist(), "RESULT": str(result)}
    code = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()) + ENGINE
    assert engine.run(code) == {"positions": 63}
    served = load_file(result)["logprobs"]

    def distance() -> float:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        with torch.no_grad():
            return float((model(prompts).logits.log_softmax(-1)[:, :-1] - served).abs().mean())

    stock = distance()
    with applied(NemotronHTimeStepLimit()):
        patched = distance()
    print(f"mean |difference of log probabilities| to vLLM: {stock:.2g} without the patch, {patched:.2g} with it")
    assert patched < 1e-5
    assert stock > 1e-3
