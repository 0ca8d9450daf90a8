"""The hub's `modeling_nemotron_h.py` cannot be imported without mamba-ssm, of which it needs one small function."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register

if TYPE_CHECKING:
    import torch

_MODULE = "mamba_ssm.ops.triton.layernorm_gated"


class RemoteMambaSsmImport:
    """Offers `rmsnorm_fn` in plain PyTorch under the name from which the remote code imports it.

    Only that one module is put into `sys.modules`, not its parents: mamba-ssm stays absent for everybody who asks
    whether it is installed, so the mixers take their PyTorch path.
    """

    name = "remote_mamba_ssm_import"
    title = "Remote Nemotron-H code imports mamba-ssm unconditionally"
    breaks = '"ImportError: mamba-ssm is required by the Mamba model but cannot be imported" when the model is loaded.'
    upstream = "modeling_nemotron_h.py of NVIDIA-Nemotron-3-Nano-30B-A3B: from mamba_ssm… import rmsnorm_fn"
    affects = "remote code of the Nemotron-H models without mamba-ssm (no wheel: aarch64 with CUDA 13, CPU machines)"
    libraries = ("mamba-ssm",)
    place = Place.HERE
    repair = (
        "qat trains Transformers' own nemotron_h, which needs no mamba-ssm. Where you load the remote code, call "
        "`ensure('remote_mamba_ssm_import')` before. Mind the order in hand-made replacements: this model multiplies "
        "with silu(gate) first and normalizes each group after it."
    )

    def probe(self) -> ProbeResult:
        """Import what the remote code imports."""
        try:
            imported = importlib.import_module(_MODULE)
        except ImportError as error:
            return ProbeResult(Status.NEEDED, f"rmsnorm_fn cannot be imported: {error}")
        if isinstance(imported, _StandIn):
            return ProbeResult(Status.APPLIED, "rmsnorm_fn is imported from the PyTorch stand-in")
        return ProbeResult(Status.NOT_NEEDED, "mamba-ssm provides rmsnorm_fn")

    def apply(self) -> None:
        """Put the stand-in where nothing stands yet."""
        sys.modules.setdefault(_MODULE, _StandIn(_MODULE))

    def revert(self) -> None:
        """Take the stand-in out; a module that imported it keeps the function."""
        if isinstance(sys.modules.get(_MODULE), _StandIn):
            del sys.modules[_MODULE]


class _StandIn(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name, "Gated RMS normalization in PyTorch.")
        self.rmsnorm_fn = rmsnorm_fn


def rmsnorm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> torch.Tensor:
    """Root mean square normalization in groups, gated by silu(z), in float32.

    Args:
        x: (…, features).
        weight: (features,).
        bias: (features,) or None.
        z: The gate, (…, features), or None.
        eps: Added to the mean square.
        group_size: Features that are normalized together; None for all.
        norm_before_gate: Whether the gate is applied after the normalization; Nemotron-H applies it before.

    Returns:
        (…, features) in the dtype of `x`.
    """
    import torch

    values = x.float()
    gate: torch.Tensor = torch.ones_like(values) if z is None else torch.nn.functional.silu(z.float())
    if not norm_before_gate:
        values = values * gate
    groups = values.unflatten(-1, (-1, group_size or x.shape[-1]))
    values = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.float()
    if bias is not None:
        values = values + bias.float()
    if norm_before_gate:
        values = values * gate
    output: torch.Tensor = values.to(x.dtype)
    return output


register(RemoteMambaSsmImport())
