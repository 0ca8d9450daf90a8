"""What probes share: the smallest Nemotron-H and a checkpoint on disk that nobody sees."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import NemotronHConfig


def nemotron_h_config(*layers: str, **fields: Any) -> NemotronHConfig:
    """The configuration of a Nemotron-H of a few thousand parameters.

    Args:
        layers: Of `linear_attention`, `moe`, `full_attention`, `mlp`.
        fields: Further fields of the configuration.
    """
    from transformers import NemotronHConfig

    return NemotronHConfig(
        vocab_size=16,
        hidden_size=16,
        layers_block_type=list(layers),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        ssm_state_size=8,
        mamba_num_heads=2,
        mamba_head_dim=16,
        n_groups=1,
        chunk_size=16,
        n_routed_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        moe_shared_expert_intermediate_size=8,
        **fields,
    )


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, and inside the block neither progress bars nor a changed state of the random numbers."""
    import torch

    with (
        tempfile.TemporaryDirectory() as folder,
        torch.random.fork_rng(devices=[]),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield Path(folder)


def tensor_names(folder: Path) -> set[str]:
    """The names of the tensors in a checkpoint of one file."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())
