"""Fused experts under NVFP4: all experts of a layer are quantized as one 3-D tensor, before one grouped product.

ModelOpt's own wrapper slices the fused parameter and loops over experts with a quantizer each (1,412 quantizers and
nine times the BF16 step on the 30B model's layers). Here a projection has one weight quantizer with one range per
expert and one input quantizer for the layer, which is also what a server's scales look like.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
from torch import Tensor, nn
from transformers.activations import ReLUSquaredActivation

import qat.quant.solvers  # noqa: F401  after ModelOpt: frees the frames that waited for it
from qat.quant.effective import Adapted, whole
from qat.quant.products import computing, low_rank_pays, multiply, multiply_low_rank, ready


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


class Routing(NamedTuple):
    """Which rows go to which expert: (token, slot) pairs in the order of their experts.

    Attributes:
        token: int64 (pairs,), the token of each pair.
        place: int64 (tokens, slots), where each token's pairs stand.
        offsets: int32 (experts,), where each expert's pairs end.
    """

    token: Tensor
    place: Tensor
    offsets: Tensor

    def gather(self, hidden: Tensor) -> Tensor:
        """(tokens, width) -> (pairs, width)."""
        if hidden.is_cuda:
            from qat.quant.kernels import routing

            return routing.gather(hidden, self.token, self.place)
        return hidden[self.token]

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """(pairs, width) and (tokens, slots) -> (tokens, width), in the dtype of the rows."""
        if rows.is_cuda:
            from qat.quant.kernels import routing

            return routing.combine(rows, self.place, weights)
        weighted = rows[self.place.reshape(-1)] * weights.reshape(-1, 1)
        return weighted.view(*self.place.shape, -1).sum(dim=1).to(rows.dtype)


def sort_by_expert(top_k_index: Tensor, experts: int) -> Routing:
    """Order (token, slot) pairs by expert, a token's place within an expert by its number.

    Args:
        top_k_index: int64 (tokens, slots).
        experts: Number of experts.
    """
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    # Not a count of each expert: that waits for the GPU.
    offsets = torch.searchsorted(expert, torch.arange(experts, device=order.device), right=True, out_int32=True)
    return Routing(order // top_k_index.shape[-1], place.view(top_k_index.shape), offsets)


class QuantFusedExperts(QuantModule):
    """Transformers' fused experts with quantizers; ModelOpt mixes this class into the module's own.

    Quantizers are named after the parameter: `up_proj_weight_quantizer`, `up_proj_input_quantizer`, and so on.
    """

    def _setup(self) -> None:
        names = projections(self)
        if names is None:  # a class is registered for instances that have these parameters
            raise TypeError(f"{type(self).__name__} holds no fused experts")
        if "forward" in self.__dict__:  # it would come before this class's
            raise TypeError("quantizers go into a model on which use_fast_experts_ was not called")
        for name in names:
            for kind in ("input", "weight"):
                self._register_temp_attribute(f"{name}_{kind}_quantizer", TensorQuantizer())
        self._register_temp_attribute("projection_names", names)
        # Weights with their adapter by parameter name while one is active, set by its wrapper for one forward.
        self._register_temp_attribute("adapted", {})

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
        first_input, first_weight, second_input, second_weight = quantizers = [
            getattr(self, f"{name}_{kind}_quantizer") for name in (first, second) for kind in ("input", "weight")
        ]
        if not any(quantizer.is_enabled for quantizer in quantizers):
            with self._in_place_of_parameters():
                output: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
                return output
        routing = sort_by_expert(top_k_index, self.num_experts)
        # Rows are quantized before they are copied to their experts: the same numbers for 1/k of the work.
        rows = routing.gather(first_input(hidden_states))
        inner = multiply(rows, _weight(self, first), first_weight, routing.offsets)
        inner = _activation(self, inner, second_input)
        outer = multiply(inner, _weight(self, second), second_weight, routing.offsets)
        return routing.combine(outer, top_k_weights).to(hidden_states.dtype)

    @contextmanager
    def _in_place_of_parameters(self) -> Iterator[None]:
        """Let the module's own forward see effective weights: instance attributes come before parameters in look-up."""
        attributes = self.__dict__
        attributes.update({name: whole(weight) for name, weight in self.adapted.items()})
        try:
            yield
        finally:
            for name in self.adapted:
                del attributes[name]


def plain_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run unquantized fused experts on a GPU, for training: see `qat.quant.lora.use_fast_experts_`.

    While the module trains, an adapter stays low-rank where that moves fewer bytes (`low_rank_pays`); otherwise, and
    always in `eval` mode, the effective weight is formed.

    Args:
        module: Transformers' fused experts; `module.adapted` holds the weights with an active adapter.
        hidden_states: (tokens, hidden).
        top_k_index: int64 (tokens, k), the experts of each token.
        top_k_weights: (tokens, k).

    Returns:
        (tokens, hidden) in the dtype of `hidden_states`.
    """
    first, second = module.projection_names
    routing = sort_by_expert(top_k_index, module.num_experts)

    def project(rows: Tensor, name: str) -> Tensor:
        weight = _weight(module, name)
        if isinstance(weight, Adapted) and module.training and low_rank_pays(rows.shape[0], weight.w):
            return multiply_low_rank(rows, weight, routing.offsets)
        return multiply(rows, weight, None, routing.offsets)

    inner = _activation(module, project(routing.gather(hidden_states), first), None)
    return routing.combine(project(inner, second), top_k_weights).to(hidden_states.dtype)


def _weight(module: Any, name: str) -> Tensor | Adapted:
    """The parameter, or while an adapter is active the parameter with it; (experts, out, in)."""
    adapted: dict[str, Tensor | Adapted] = module.adapted
    return adapted[name] if name in adapted else getattr(module, name)


def _activation(module: Any, inner: Tensor, quantizer: TensorQuantizer | None) -> Tensor:
    """Activate (pairs, out) and quantize the result, on a GPU relu(x)**2 in one pass with it."""
    if inner.is_cuda and not _is_gated(module) and isinstance(module.act_fn, ReLUSquaredActivation):
        from qat.quant.kernels.nvfp4 import relu2

        if quantizer is not None and ready(quantizer):
            with computing(quantizer, relu2):
                fused: Tensor = quantizer(inner)
                return fused
        activated = relu2(inner)
    else:
        activated = module._apply_gate(inner) if _is_gated(module) else module.act_fn(inner)
    return activated if quantizer is None else quantizer(activated)


def _is_gated(module: Any) -> bool:
    return "gate_up_proj" in module._parameters


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
