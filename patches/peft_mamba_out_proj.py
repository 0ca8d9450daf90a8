"""PEFT refuses LoRA on the output projection of Mamba layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register


class PeftMambaOutProj:
    """Lets `out_proj` through PEFT's check for Mamba models; `conv1d` stays refused.

    The refusal has a reason: with mamba_ssm installed, a training forward hands `out_proj.weight` to a fused kernel and
    never calls the module, so an adapter (or a quantizer) on it would be bypassed in silence. The patch
    `nemotron_h_fused_mamba` closes that path; on machines without mamba_ssm it does not exist.
    """

    name = "peft_mamba_out_proj"
    title = "PEFT refuses LoRA on out_proj of Mamba-based models"
    breaks = (
        "\"ValueError: [PEFT:PeftType.LORA] Module 'out_proj' is incompatible with Mamba-based models "
        "(model_type='nemotron_h')\""
    )
    upstream = "peft/tuners/tuners_utils.py: _check_lora_target_modules_mamba"
    affects = "peft >=0.15, 0.21.2 seen"
    libraries = ("peft",)
    place = Place.HERE
    repair = (
        "qat lets out_proj through PEFT's check, closes the fused path that was the reason for it, and the guard looks "
        "whether its factors get a gradient. Elsewhere adapt out_proj only where mamba_ssm is not installed or its "
        "fused path is closed."
    )

    def __init__(self) -> None:
        self._original: Any = None

    def probe(self) -> ProbeResult:
        """Ask PEFT's check about `out_proj` of a Nemotron-H stand-in."""
        from peft.tuners import tuners_utils

        model, config = (
            SimpleNamespace(config=SimpleNamespace(model_type="nemotron_h")),
            SimpleNamespace(peft_type="LORA"),
        )
        check: Any = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
        if check is None:
            return ProbeResult(Status.NOT_NEEDED, "this PEFT has no such check")
        try:
            check(config, model, "out_proj")
        except ValueError as error:
            return ProbeResult(Status.NEEDED, str(error).split(". ", 1)[0])
        status = Status.APPLIED if self._original is not None else Status.NOT_NEEDED
        return ProbeResult(status, "PEFT accepts out_proj of a nemotron_h model")

    def apply(self) -> None:
        """Replace the check by one that lets `out_proj` through."""
        if self._original is not None:
            return
        from peft.tuners import tuners_utils

        original = self._original = tuners_utils._check_lora_target_modules_mamba

        def check(peft_config: Any, model: Any, target_name: str) -> None:
            if target_name != "out_proj":
                original(peft_config, model, target_name)

        tuners_utils._check_lora_target_modules_mamba = check

    def revert(self) -> None:
        """Put PEFT's check back."""
        if self._original is None:
            return
        from peft.tuners import tuners_utils

        tuners_utils._check_lora_target_modules_mamba = self._original
        self._original = None


register(PeftMambaOutProj())
