"""The BF16 persona: the base with its fine-tuned adapter merged by the one effective weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qat.train.adapters import load_adapter
from qat.train.base import load_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_persona(base: Path, adapter: Path, base_sha256: str) -> PreTrainedModel:
    """Load the base and merge the persona's adapter into it, in place.

    Args:
        base: Folder of the base checkpoint.
        adapter: The adapter of fine-tuning.
        base_sha256: `qat.train.base.base_sha256` of the base.

    Returns:
        The plain model, frozen, in `eval` mode, on the training device: the `bf16` arm, and the teacher.

    Raises:
        UserError: The adapter is of another base, or either is damaged.
    """
    from qat.quant.lora import merge_adapter_

    model = merge_adapter_(load_adapter(load_base(base), adapter, base_sha256))
    model.requires_grad_(False)
    return model.eval()
