"""Nemotron-H's normalizations and Mamba mixers on a GPU, with one kernel where Transformers runs a chain of them."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Replaced(NamedTuple):
    """How many modules compute with kernels of this package now.

    Attributes:
        norms: Plain RMS normalizations.
        mixers: Mamba mixers, with convolution, scan and gated normalization.
    """

    norms: int
    mixers: int


def use_fast_layers_(model: nn.Module) -> Replaced:
    """Replace the forward of normalizations, and where mamba-ssm can be imported, of Mamba mixers.

    `in_proj` and `out_proj` are still called as modules, so adapters and quantizers on them take part. Transformers'
    own forward runs while a gradient is asked for that the kernels do not give (that of a norm's or a convolution's
    weight), and where a mixer is given a cache or a padding mask. Validation asks for none, so what it measures of a
    network that is trained as a whole is, to the bit, what the network loaded from its files gives.

    Args:
        model: Nemotron-H or any other, whose modules then stay as they are; on a GPU. Changed in place, after the
            patch `mamba_ssm_kernels_without_build`.
    """
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer, NemotronHRMSNorm

    scan = _scan()
    norms = mixers = 0
    for module in model.modules():
        if isinstance(module, NemotronHRMSNorm):
            module.forward = partial(_norm, module, module.forward)
            norms += 1
        elif isinstance(module, NemotronHMamba2Mixer) and module.activation == "silu" and scan is not None:
            module.forward = partial(_mixer, module, module.forward, scan)
            mixers += 1
    return Replaced(norms, mixers)


def _scan() -> Any:
    """mamba-ssm's scan, or None where it is not installed."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None
    return mamba_chunk_scan_combined


def _is_trained(*weights: Tensor) -> bool:
    """Whether a gradient of one of them is asked for."""
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)


def _norm(module: Any, original: Any, hidden_states: Tensor) -> Tensor:
    if _is_trained(module.weight):
        output: Tensor = original(hidden_states)
        return output
    from qat.quant.kernels.norm import rms_norm

    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _mixer(
    module: Any,
    original: Any,
    scan: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The mixer's chunked form: in_proj, convolution, scan, gated normalization, out_proj."""
    trained = _is_trained(*module.conv1d.parameters(), *module.norm.parameters())
    if trained or cache_params is not None or attention_mask is not None:
        output: Tensor = original(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **options)
        return output
    from qat.quant.kernels.convolution import causal_convolution
    from qat.quant.kernels.norm import gated_rms_norm

    batch, length, _ = hidden_states.shape
    states = module.n_groups * module.ssm_state_size
    gate, mixed, dt = module.in_proj(hidden_states).split(
        [module.intermediate_size, module.conv_dim, module.num_heads], dim=-1
    )
    mixed = causal_convolution(mixed, module.conv1d.weight.squeeze(1), module.conv1d.bias)
    x, b, c = mixed.split([module.intermediate_size, states, states], dim=-1)
    scanned = scan(
        x.view(batch, length, module.num_heads, module.head_dim),
        dt,
        -module.A_log.float().exp(),
        b.view(batch, length, module.n_groups, module.ssm_state_size),
        c.view(batch, length, module.n_groups, module.ssm_state_size),
        chunk_size=module.chunk_size,
        D=module.D,
        dt_bias=module.dt_bias,
        dt_softplus=True,
        dt_limit=module.time_step_limit,
    ).reshape(batch, length, -1)
    norm = module.norm
    normed = gated_rms_norm(scanned, gate, norm.weight, norm.group_size, norm.variance_epsilon)
    output = module.out_proj(normed.to(hidden_states.dtype))
    return output
