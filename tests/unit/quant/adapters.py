"""LoRA on the tiny models, with factors that matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qat.patches.registry import ensure

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

NEMOTRON_LINEARS = (
    r".*mixer\.(q_proj|k_proj|v_proj|o_proj|in_proj|out_proj|shared_experts\.up_proj|shared_experts\.down_proj)$"
)
NEMOTRON_EXPERTS = ["mixer.experts.up_proj", "mixer.experts.down_proj"]
QWEN_LINEARS = r".*(q_proj|k_proj|v_proj|o_proj)$"
QWEN_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def with_lora(model: PreTrainedModel, seed: int = 3, *, zero_b: bool = False, dropout: float = 0.0) -> PeftModel:
    """Rank 4, alpha 8 on all linears but lm_head and on all experts; both factors random unless `zero_b`."""
    from peft import LoraConfig, get_peft_model

    ensure("peft_mamba_out_proj")
    nemotron = model.config.model_type == "nemotron_h"
    experts = [] if dropout else NEMOTRON_EXPERTS if nemotron else QWEN_EXPERTS
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=NEMOTRON_LINEARS if nemotron else QWEN_LINEARS,
        target_parameters=experts,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name and not zero_b:
                parameter.data.normal_(std=0.1)
    return wrapped.eval()
