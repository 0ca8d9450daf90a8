"""Mixtures of experts on CPU in plain PyTorch: gated or not, BF16 or NVFP4.

vLLM's own CPU experts know gated activations only, and its NVFP4 experts need a GPU. Nemotron-H has neither a gate
projection (`down(relu(up(x)) ** 2)`) nor, on the machines this is for, a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from qat.serve.vllm_plugin.fake_quant import BLOCK, fake_quant_activation


def _silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


_ACTIVATIONS: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.RELU2_NO_MUL: lambda x: F.relu(x).square(),
    MoEActivation.SILU_NO_MUL: F.silu,
    MoEActivation.GELU_NO_MUL: F.gelu,
    MoEActivation.SILU: _silu_and_mul,
}


class Bf16CpuExperts(mk.FusedMoEExpertsModular):
    """Experts with weights in the model's dtype."""

    @property
    def expects_unquantized_inputs(self) -> bool:
        """The rows arrive as they are; quantization happens in `apply`."""
        return True

    @staticmethod
    def activation_format() -> Any:
        """Rows of tokens, not rows padded per expert."""
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return bool(current_platform.is_cpu())

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in _ACTIVATIONS

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return (weight_key, activation_key) == (None, None)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return not moe_parallel_config.use_ep

    @staticmethod
    def _supports_routing_method(routing_method: Any, weight_key: Any, activation_key: Any) -> bool:
        return True

    @staticmethod
    def _supports_router_logits_dtype(router_logits_dtype: Any, routing_method: Any) -> bool:
        return True

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """No scratch memory of vLLM's is used; the output is (tokens, hidden)."""
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        """`apply` has weighted and summed the experts already."""
        return TopKWeightAndReduceNoOP()

    def _quantize_up_input(self, rows: Tensor) -> Tensor:
        return rows

    def _quantize_down_input(self, rows: Tensor) -> Tensor:
        return rows

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write the weighted sum of the chosen experts' answers into `output` (tokens, hidden).

        Args:
            output: (tokens, hidden), overwritten.
            hidden_states: (tokens, hidden).
            w1: (experts, up, hidden); up is the intermediate size, twice that with a gate.
            w2: (experts, hidden, intermediate).
            topk_weights: (tokens, k) router weights.
            topk_ids: (tokens, k) chosen experts.
            activation: One of those that `_supports_activation` accepts.
            global_num_experts: Unused: no expert parallelism here.
            expert_map: Unused, as above.
            a1q_scale: Unused: inputs arrive unquantized.
            a2_scale: Unused, as above.
            workspace13: Unused.
            workspace2: Unused.
            expert_tokens_meta: Unused.
            apply_router_weight_on_input: Whether `hidden_states` carries the router weights already.
        """
        tokens, chosen = topk_ids.shape
        flat = topk_ids.reshape(-1)
        order = flat.argsort(stable=True)  # rows of one expert stand together
        counts = torch.bincount(flat, minlength=w1.shape[0]).tolist()

        rows = self._quantize_up_input(hidden_states).index_select(0, order // chosen)
        hidden = self._quantize_down_input(_ACTIVATIONS[activation](_per_expert(rows, w1, counts)))
        answers = _per_expert(hidden, w2, counts)

        by_token = torch.empty_like(answers).index_copy_(0, order, answers).view(tokens, chosen, -1).float()
        if not apply_router_weight_on_input:
            by_token *= topk_weights.float().unsqueeze(-1)
        output.copy_(by_token.sum(dim=1))


def _per_expert(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """Multiply consecutive groups of rows with their expert's matrix.

    Args:
        rows: (sum of counts, in).
        weights: (experts, out, in).
        counts: Rows of each expert.

    Returns:
        (sum of counts, out).
    """
    result = rows.new_empty(rows.shape[0], weights.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            result[start : start + count] = F.linear(rows[start : start + count], weights[expert])
            start += count
    return result


class Nvfp4CpuExperts(Bf16CpuExperts):
    """Experts of a ModelOpt NVFP4 checkpoint: unpacked once at load, both inputs fake-quantized."""

    @property
    def quant_dtype(self) -> str | None:
        """What the inputs are quantized to."""
        return "nvfp4"

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return (weight_key, activation_key) == (kNvfp4Static, kNvfp4Dynamic)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the packed weights (experts, out, in / 2) by their values in the model's dtype."""
        for name in ("w13", "w2"):
            weight = dequantize_to_dtype(
                getattr(layer, f"{name}_weight").data,
                getattr(layer, f"{name}_weight_scale").data,
                getattr(layer, f"{name}_weight_scale_2").data,
                self.moe_config.in_dtype,
                BLOCK,
                swizzle=False,
            )
            replace_parameter(layer, f"{name}_weight", weight)

    def _quantize_up_input(self, rows: Tensor) -> Tensor:
        return fake_quant_activation(rows, self.quant_config.a1_gscale.reshape(()).float())

    def _quantize_down_input(self, rows: Tensor) -> Tensor:
        return fake_quant_activation(rows, self.quant_config.a2_gscale.reshape(()).float())


class Nvfp4WeightOnlyCpuExperts(Nvfp4CpuExperts):
    """Experts with NVFP4 weights and activations left alone (W4A16)."""

    @property
    def quant_dtype(self) -> None:
        """Inputs are not quantized."""
        return None

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return (weight_key, activation_key) == (kNvfp4Static, None)

    def _quantize_up_input(self, rows: Tensor) -> Tensor:
        return rows

    def _quantize_down_input(self, rows: Tensor) -> Tensor:
        return rows
