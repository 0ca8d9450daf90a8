"""The hub's `modeling_nemotron_h.py` adds expert outputs of one dtype into a buffer of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qat.patches.registry import register
from qat.patches.remote_code import RemoteMoePatch, StandInExpert, call_moe

if TYPE_CHECKING:
    import torch


class RemoteIndexAddDtype(RemoteMoePatch):
    """Sums the experts' outputs in float32.

    The buffer takes the routing weights' dtype, and an output times a weight the wider of their two dtypes: with
    float32 weights both are float32, whatever an expert returns, and the sum is rounded once at the end.
    """

    name = "remote_index_add_dtype"
    title = "Remote Nemotron-H code adds float32 expert outputs into a bfloat16 buffer"
    breaks = (
        '"RuntimeError: index_add_(): self (BFloat16) and source (Float) must have the same scalar type" at the first '
        "step, where the experts' linears compute in float32 (a 4-bit base, float32 LoRA factors) and the router's "
        "weights are bfloat16."
    )
    upstream = "modeling_nemotron_h.py of NVIDIA-Nemotron-3-Nano-30B-A3B: NemotronHMOE.moe, index_add_"
    affects = "remote code of the Nemotron-H MoE models; not Transformers' own nemotron_h (>=5.3)"
    repair = (
        "qat trains Transformers' own nemotron_h and never loads remote code. Where you do, call "
        "`ensure('remote_index_add_dtype')` after loading the model, or cast in the file: "
        "`weighted_output.to(final_hidden_states.dtype)`."
    )

    def fault(self, moe: type) -> str | None:
        """Two experts that return float32 for BF16 tokens, both with work to do."""
        import torch

        experts = [StandInExpert(torch.bfloat16, torch.float32) for _ in range(2)]
        try:
            call_moe(moe, experts, [[0, 1], [1, 0]])
        except RuntimeError as error:
            return str(error)
        return None

    def around(
        self,
        moe: Callable[..., torch.Tensor],
        module: Any,
        hidden_states: torch.Tensor,
        topk_indices: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Hand over float32 routing weights."""
        return moe(module, hidden_states, topk_indices, topk_weights.float())


register(RemoteIndexAddDtype())
