"""Random models of a few thousand parameters with the structure of the real ones, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 512


def nemotron_h_tiny(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A Nemotron-H of four layers: Mamba, experts, attention, experts; in eval mode, router in use.

    Weights are larger than the library's initialization, so that rounding to four bits moves the logits visibly, and
    the router's correction bias is float32 as after loading a checkpoint.
    """
    from transformers import NemotronHConfig

    config = NemotronHConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        ssm_state_size=16,
        mamba_num_heads=4,
        mamba_head_dim=32,
        n_groups=2,
        chunk_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=96,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
    )
    return _build(config, seed, dtype)


def qwen3_tiny(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A dense Qwen3 of two layers, in eval mode."""
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    )
    return _build(config, seed, dtype)


def qwen3_moe_tiny(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A Qwen3-MoE of two layers with gated experts, in eval mode."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        tie_word_embeddings=False,
    )
    return _build(config, seed, dtype)


def save_tiny(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """Write a checkpoint folder with Transformers (the tiny Nemotron-H where no model is given) and return it."""
    model = nemotron_h_tiny() if model is None else model
    model.save_pretrained(folder)
    return folder


def token_ids(batch: int = 2, length: int = 40, seed: int = 1) -> torch.Tensor:
    """Random token ids, int64 (batch, length)."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _build(config: object, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and "conv1d" not in name:
                    parameter.normal_(std=0.8 / parameter.shape[-1] ** 0.5)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.data = torch.randn(buffer.shape) * 0.1
    model.config.use_cache = False
    return model.eval()
