"""The hub's `modeling_nemotron_h.py` feeds experts without tokens in the dtype in which their weights are stored."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from qat.patches.registry import register
from qat.patches.remote_code import RemoteMoePatch, StandInExpert, call_moe

if TYPE_CHECKING:
    import torch


class RemoteDummyExpert(RemoteMoePatch):
    """Runs the method on the experts that have tokens, and feeds the others zeros in the activations' dtype.

    The zeros keep an idle expert's parameters in the graph (distributed training waits for their gradients), as the
    original means to; their output is cast, so that it cannot widen the sum.
    """

    name = "remote_dummy_expert"
    title = "Remote Nemotron-H code feeds an expert without tokens in its weight's storage dtype"
    breaks = (
        "\"NotImplementedError: \"fused_dropout\" not implemented for 'Byte'\" as soon as one expert gets no token, "
        "where the weights are packed in 4 bits (uint8) and the adapter has dropout; a float32 output of such an "
        "expert then widens the buffer, which breaks the next index_add_."
    )
    upstream = "modeling_nemotron_h.py of NVIDIA-Nemotron-3-Nano-30B-A3B: NemotronHMOE.moe, expert_dtype"
    affects = "remote code of the Nemotron-H MoE models; not Transformers' own nemotron_h (>=5.3)"
    repair = (
        "qat trains Transformers' own nemotron_h and never loads remote code. Where you do, call "
        "`ensure('remote_dummy_expert')` after loading the model, or edit the file: `expert_dtype = "
        "hidden_states.dtype` and `dummy_out.to(final_hidden_states.dtype)`."
    )

    def fault(self, moe: type) -> str | None:
        """An idle expert with packed weights and a float32 output, before one that has tokens."""
        import torch

        idle, busy = StandInExpert(torch.uint8, torch.float32), StandInExpert(torch.bfloat16, torch.bfloat16)
        try:
            call_moe(moe, [idle, busy], [[1], [1]])
        except RuntimeError as error:
            return f"after an expert without tokens: {error}"
        packed = [str(dtype) for dtype in idle.seen if not dtype.is_floating_point]
        return f"an expert without tokens is fed {packed[0]}" if packed else None

    def around(
        self,
        moe: Callable[..., torch.Tensor],
        module: Any,
        hidden_states: torch.Tensor,
        topk_indices: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Number the busy experts anew for the method, then add the idle ones."""
        import torch

        busy, renumbered = torch.unique(topk_indices, return_inverse=True)
        chosen = set(busy.tolist())
        view = SimpleNamespace(experts=[module.experts[number] for number in sorted(chosen)])
        output = moe(view, hidden_states, renumbered, topk_weights)
        for number, expert in enumerate(module.experts):
            if number not in chosen:
                output = output + expert(torch.zeros_like(hidden_states[:1])).to(output.dtype)
        return output


register(RemoteDummyExpert())
