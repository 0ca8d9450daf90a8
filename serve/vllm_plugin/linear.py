"""NVFP4 linear layer on CPU: weights unpacked once at load, activations fake-quantized at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.model_executor.kernels.linear import EmulationNvFp4LinearKernel
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

from qat.serve.vllm_plugin.fake_quant import BLOCK, fake_quant_activation


class Nvfp4CpuLinear(EmulationNvFp4LinearKernel):
    """vLLM's emulation with the unpacking moved from every call to loading time; the values are the same."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the packed uint8 weight (out, in / 2) by its values (out, in) in the layer's dtype."""
        super().process_weights_after_loading(layer)
        weight = dequantize_to_dtype(
            layer.weight.data.view(torch.uint8),
            layer.weight_scale.data,
            layer.weight_global_scale,
            layer.params_dtype,
            BLOCK,
            swizzle=False,
        )
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `fake_quant(x) @ weight.T + bias` for x of shape (..., in)."""
        values = fake_quant_activation(x.reshape(-1, x.shape[-1]), layer.input_global_scale_inv)
        return F.linear(values, layer.weight, bias).reshape(*x.shape[:-1], layer.weight.shape[0])


class Nvfp4WeightOnlyCpuLinear(Nvfp4CpuLinear):
    """NVFP4 weights with activations left alone (W4A16)."""

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `x @ weight.T + bias` for x of shape (..., in)."""
        return F.linear(x, layer.weight, bias)
