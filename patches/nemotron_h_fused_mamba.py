"""The fused Mamba kernel of a training forward bypasses the module `out_proj`."""

from __future__ import annotations

from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register

_FUNCTION = "mamba2_split_conv1d_scan_combined"


class NemotronHFusedMamba:
    """Takes the fused kernel away from Nemotron-H's mixer, so that convolution, scan and `out_proj` are called singly.

    The separate kernels for convolution and scan stay in use; only the shortcut that multiplies with `out_proj.weight`
    itself is closed.
    """

    name = "nemotron_h_fused_mamba"
    title = "Nemotron-H's training forward multiplies with out_proj.weight instead of calling out_proj"
    breaks = "Silent: where mamba_ssm is installed, LoRA and quantizers on out_proj take no part in training."
    upstream = "transformers/models/nemotron_h/modeling_nemotron_h.py: NemotronHMamba2Mixer.forward, outproj_weight="
    affects = "transformers >=5.3 with mamba_ssm, 5.19 seen in source"
    libraries = ("transformers", "mamba-ssm", "causal-conv1d")
    place = Place.HERE
    repair = (
        "qat closes the shortcut, so that convolution, scan and out_proj are called one by one. Elsewhere set "
        "mamba2_split_conv1d_scan_combined of the modeling module to a function that returns None."
    )

    def __init__(self) -> None:
        self._original: Any = None

    def probe(self) -> ProbeResult:
        """Run a tiny mixer in training mode and watch whether `out_proj` is called."""
        import torch
        from transformers import NemotronHConfig
        from transformers.models.nemotron_h import modeling_nemotron_h as modeling

        if not hasattr(modeling, _FUNCTION):
            return ProbeResult(Status.CANNOT_TELL, f"this Transformers has no {_FUNCTION}")
        config = NemotronHConfig(
            vocab_size=16,
            hidden_size=32,
            layers_block_type=["linear_attention"],
            ssm_state_size=16,
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=2,
            chunk_size=16,
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        devices = [device] if device.type == "cuda" else []
        called: list[bool] = []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            mixer = modeling.NemotronHMamba2Mixer(config, layer_idx=0).to(device).train()
            mixer.out_proj.register_forward_hook(lambda *_: called.append(True))
            try:
                mixer(torch.zeros(1, 16, config.hidden_size, device=device))
            except (RuntimeError, AssertionError, TypeError) as error:
                return ProbeResult(Status.CANNOT_TELL, f"the mixer does not run: {str(error).splitlines()[0]}")
        if not called:
            return ProbeResult(Status.NEEDED, "a training forward does not call out_proj")
        status = Status.APPLIED if self._original is not None else Status.NOT_NEEDED
        return ProbeResult(status, "a training forward calls out_proj")

    def apply(self) -> None:
        """Replace the fused function by one that declines, as Transformers' own fallback does."""
        if self._original is not None:
            return
        from transformers.models.nemotron_h import modeling_nemotron_h as modeling

        self._original = getattr(modeling, _FUNCTION)
        setattr(modeling, _FUNCTION, lambda *_, **__: None)

    def revert(self) -> None:
        """Give the fused function back."""
        if self._original is None:
            return
        from transformers.models.nemotron_h import modeling_nemotron_h as modeling

        setattr(modeling, _FUNCTION, self._original)
        self._original = None


register(NemotronHFusedMamba())
