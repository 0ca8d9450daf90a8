"""The BF16 persona: what fine-tuning left behind, standing on its base.

Fine-tuning leaves an adapter, or a whole model where all weights were trained. An adapter that was trained on a packed
base stands on what that base unpacks to, and says so itself: whoever loads the persona need not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from qat.quant.packed import packed_base_sha256
from qat.train.adapters import SIDECAR, adapter_sha256, load_adapter
from qat.train.base import base_sha256, load_base

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel


def is_model(folder: Path) -> bool:
    """Whether fine-tuning left a whole model there and not an adapter."""
    return (folder / "config.json").is_file()


def packed_below(adapter: Path) -> list[str]:
    """The modules of the base that were packed where this adapter was trained; none for a BF16 base.

    Args:
        adapter: An adapter's folder; a faulty one is refused where it is loaded.
    """
    try:
        origin = json.loads((adapter / SIDECAR).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return []
    return list(origin.get("packed") or [])


def standing_on(base: Path, persona: Path) -> str:
    """What quantizer states and later adapters remember of the weights below them.

    Args:
        base: Folder of the base checkpoint.
        persona: What fine-tuning left.

    Returns:
        The digest of the base, of the packed base, or of the fine-tuned model.
    """
    return base_sha256(persona) if is_model(persona) else packed_base_sha256(base_sha256(base), packed_below(persona))


def persona_sha256(persona: Path) -> str:
    """What a distillation adapter remembers of the persona that it stands on."""
    return base_sha256(persona) if is_model(persona) else adapter_sha256(persona)


def load_weights(base: Path, packed: Sequence[str]) -> PreTrainedModel:
    """Load the base, with some modules in NVFP4 or none."""
    from qat.train.packed_base import load_packed_base

    return load_packed_base(base, packed) if packed else load_base(base)


def load_persona(base: Path, persona: Path, base_sha256: str) -> PreTrainedModel:
    """Load the base and merge the persona's adapter into it, in place; or load the fine-tuned model.

    Args:
        base: Folder of the base checkpoint.
        persona: The adapter of fine-tuning, or the model.
        base_sha256: `standing_on` of the two.

    Returns:
        The plain model, frozen, in `eval` mode, on the training device: the `bf16` arm, and the teacher.

    Raises:
        UserError: The adapter is of another base, or either is damaged.
    """
    from qat.quant.lora import merge_adapter_

    if is_model(persona):
        return load_base(persona)
    model = merge_adapter_(load_adapter(load_weights(base, packed_below(persona)), persona, base_sha256))
    model.requires_grad_(False)
    return model.eval()
