"""ModelOpt's quantizers in INT8: what probes use, since ModelOpt's own NVFP4 runs on a GPU only."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

_RANGE = {"num_bits": 8, "axis": None}
_CONFIG: dict[str, Any] = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer*", "cfg": _RANGE, "enable": True},
        {"quantizer_name": "*input_quantizer", "cfg": _RANGE, "enable": True},
    ],
    "algorithm": "max",
}


def int8_config() -> dict[str, Any]:
    """A configuration for `mtq.quantize`: every weight and every input with one range; a copy that may be changed."""
    return copy.deepcopy(_CONFIG)


def quantize_int8(model: Any, forward: Callable[[Any], Any], config: dict[str, Any] | None = None) -> None:
    """Insert and calibrate quantizers, without ModelOpt's messages on standard output.

    Args:
        model: Changed in place.
        forward: Runs the model it is given on some input.
        config: Instead of `int8_config()`.
    """
    import modelopt.torch.quantization as mtq
    import torch

    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        mtq.quantize(model, config or int8_config(), forward)
