"""Fused experts under NVFP4: all experts of a layer are quantized as one 3-D tensor, before one grouped product.

ModelOpt's own wrapper slices the fused parameter and loops over experts with a quantizer each (1,412 quantizers and
nine times the BF16 step on the 30B model's layers). Here a projection has one weight quantizer with one range per
expert and one input quantizer for the layer, which is also what a server's scales look like.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
from torch import Tensor, nn


def projections(module: nn.Module) -> tuple[str, str] | None:
    """Tell whether a module holds fused experts.

    Args:
        module: Any module.

    Returns:
        The names of its two 3-D parameters, (`up_proj` or `gate_up_proj`, `down_proj`), each (experts, out, in); None
        for every other module, also for fused experts with biases or transposed weights, which are not supported here.
    """
    if getattr(module, "is_transposed", False) or getattr(module, "has_bias", False):
        return None
    parameters = dict(module.named_parameters(recurse=False))
    first = "gate_up_proj" if "gate_up_proj" in parameters else "up_proj"
    both = (parameters.get(first), parameters.get("down_proj"))
    if any(parameter is None or parameter.dim() != 3 for parameter in both):
        return None
    return first, "down_proj"


class QuantFusedExperts(QuantModule):
    """Transformers' fused experts with quantizers; ModelOpt mixes this class into the module's own.

    Quantizers are named after the parameter: `up_proj_weight_quantizer`, `up_proj_input_quantizer`, and so on.
    """

    def _setup(self) -> None:
        names = projections(self)
        if names is None:  # a class is registered for instances that have these parameters
            raise TypeError(f"{type(self).__name__} holds no fused experts")
        for name in names:
            for kind in ("input", "weight"):
                self._register_temp_attribute(f"{name}_{kind}_quantizer", TensorQuantizer())
        self._register_temp_attribute("projection_names", names)
        # Effective weights by parameter name while an adapter is active, set by the adapter's wrapper for one forward.
        self._register_temp_attribute("adapted", {})

    def weight(self, name: str) -> Tensor:
        """The weight before quantization: the parameter, or its effective weight while an adapter is active.

        Args:
            name: Of the parameter.

        Returns:
            (experts, out, in).
        """
        adapted: Tensor | None = self.adapted.get(name)
        return getattr(self, name) if adapted is None else adapted

    def iter_weights_for_calibration(self) -> Iterator[tuple[Tensor, TensorQuantizer]]:
        """Nothing: weights are calibrated in the forward, where adapters are active (ModelOpt's hook)."""
        return iter(())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the experts; with all quantizers off, exactly as the unquantized module does.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: int64 (tokens, k), the experts of each token.
            top_k_weights: (tokens, k).

        Returns:
            (tokens, hidden) in the dtype of `hidden_states`.
        """
        first, second = self.projection_names
        quantizers = [
            getattr(self, f"{name}_{kind}_quantizer") for name in (first, second) for kind in ("input", "weight")
        ]
        if not any(quantizer.is_enabled for quantizer in quantizers):
            with self._in_place_of_parameters():
                output: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
                return output
        first_input, first_weight, second_input, second_weight = quantizers
        routed, order, offsets = self._sort(top_k_index)
        # Rows are quantized before they are copied to their experts: the same numbers for 1/k of the work.
        rows = first_input(hidden_states)[routed]
        inner = _grouped_linear(rows, first_weight(self.weight(first)), offsets)
        inner = self._apply_gate(inner) if first == "gate_up_proj" else self.act_fn(inner)
        outer = _grouped_linear(second_input(inner), second_weight(self.weight(second)), offsets)
        weighted = outer * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        unsorted = weighted[torch.argsort(order)].view(*top_k_index.shape, -1)
        return unsorted.sum(dim=1).to(hidden_states.dtype)

    def _sort(self, top_k_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Order (token, slot) pairs by expert.

        Returns:
            The token of each pair, the pair's place in the flattened routing (both int64 (tokens * k,)), and where each
            expert's pairs end (int32 (experts,)).
        """
        flat = top_k_index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.num_experts)
        return order // top_k_index.shape[-1], order, counts.cumsum(0).to(torch.int32)

    @contextmanager
    def _in_place_of_parameters(self) -> Iterator[None]:
        """Let the module's own forward see effective weights: instance attributes come before parameters in look-up."""
        attributes = self.__dict__
        attributes.update(self.adapted)
        try:
            yield
        finally:
            for name in self.adapted:
                del attributes[name]


def _grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each expert's rows with its matrix.

    Args:
        rows: (pairs, in), sorted by expert.
        weight: (experts, out, in).
        offsets: int32 (experts,), where each expert's rows end.

    Returns:
        (pairs, out).
    """
    return F.grouped_mm(rows, weight.transpose(-2, -1), offs=offsets)


def register_fused_experts(model: nn.Module) -> int:
    """Make ModelOpt convert the model's fused experts to `QuantFusedExperts` instead of its own per-expert wrapper.

    Args:
        model: Not yet converted.

    Returns:
        Number of modules that will be converted.
    """
    found = [module for module in model.modules() if projections(module) is not None]
    for kind in {type(module) for module in found}:
        registered: Any = QuantModuleRegistry.get(kind)
        if registered is not None and issubclass(registered, QuantFusedExperts):
            continue
        if registered is not None:
            QuantModuleRegistry.unregister(kind)
        QuantModuleRegistry.register({kind: f"qat.{kind.__name__}"})(QuantFusedExperts)
    return len(found)
