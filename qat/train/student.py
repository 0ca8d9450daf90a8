"""The NVFP4 student: the persona's own network with quantizers, and a fresh or trained adapter on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from qat.quant.modelopt import Inserted, insert_quantizers, load_state_into
from qat.quant.state import QuantState
from qat.train.base import training_device

if TYPE_CHECKING:
    import torch


def load_quant_state(path: Path, base: Path, base_sha256: str) -> QuantState:
    """Read a quantizer state and check that it belongs to the base.

    Raises:
        UserError: It is damaged, or of another base.
    """
    state = QuantState.load(path)
    state.require_base(base_sha256, str(base))
    return state


def quantize_(model: torch.nn.Module, base: Path, state: QuantState) -> Inserted:
    """Insert the preset's quantizers into a model, with or without adapter, and set their ranges.

    Args:
        model: Changed in place.
        base: Folder of the base checkpoint, for its `config.json`.
        state: Preset and ranges.

    Returns:
        What was quantized.

    Raises:
        UserError: Preset or ranges do not fit the model.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    inserted = insert_quantizers(model, state.precision(), config)
    load_state_into(model, state)
    model.to(training_device()).eval()
    return inserted
