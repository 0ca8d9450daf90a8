"""After a forward and backward: what really ran.

A quantizer that is configured but never called, or a LoRA factor that no gradient reaches, gives no error anywhere; the
loss falls all the same. The guard watches the calls themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


class DeadModules(RuntimeError):
    """Enabled quantizers never ran, or trainable parameters got no gradient.

    Attributes:
        quantizers: Names of the quantizers.
        parameters: Names of the parameters.
    """

    def __init__(self, quantizers: list[str], parameters: list[str]) -> None:
        self.quantizers = quantizers
        self.parameters = parameters
        lines = []
        if quantizers:
            lines.append(f"{len(quantizers)} enabled quantizers never ran: {_first(quantizers)}")
        if parameters:
            lines.append(f"{len(parameters)} trainable parameters got no gradient: {_first(parameters)}")
        super().__init__("; ".join(lines))


class Seen:
    """What a watched stretch of training did.

    Attributes:
        quantizer_calls: Calls of each quantizer that was enabled when the watch began.
        gradients: Gradients that each trainable parameter received.
        live_gradients: Those of them that were not all zero. For a LoRA A whose B is still zero a gradient of zeros is
            what it must be, and counts as live.
    """

    def __init__(self) -> None:
        self.quantizer_calls: dict[str, int] = {}
        self.gradients: dict[str, int] = {}
        self.live_gradients: dict[str, int] = {}

    def require(self, *, quantizers: bool = True, adapters: bool = True) -> None:
        """Check that everything took part.

        Args:
            quantizers: Every enabled quantizer ran.
            adapters: Every trainable parameter got a gradient that was not all zero each time.

        Raises:
            DeadModules: Something did not.
        """
        idle = [name for name, calls in self.quantizer_calls.items() if not calls] if quantizers else []
        dead = [name for name, live in self.live_gradients.items() if not live] if adapters else []
        if idle or dead:
            raise DeadModules(idle, dead)


@contextmanager
def watch(model: nn.Module) -> Iterator[Seen]:
    """Count calls and gradients inside the block; forward and backward belong into it, any number of them.

    Args:
        model: With or without quantizers.

    Yields:
        The counts; complete when the block ends.
    """
    seen = Seen()
    handles: list[Any] = []
    for name, module in model.named_modules():
        if _is_enabled_quantizer(module):
            seen.quantizer_calls[name] = 0
            handles.append(module.register_forward_hook(_count_call(seen, name)))
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in parameters.items():
        seen.gradients[name] = seen.live_gradients[name] = 0
        partner = parameters.get(name.replace("lora_A", "lora_B")) if "lora_A" in name else None
        handles.append(parameter.register_post_accumulate_grad_hook(_count_gradient(seen, name, partner)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _is_enabled_quantizer(module: nn.Module) -> bool:
    # By its interface, so that nothing is imported that the model does not already use.
    return type(module).__name__.endswith("TensorQuantizer") and bool(getattr(module, "is_enabled", False))


def _count_call(seen: Seen, name: str) -> Any:
    def hook(*_: object) -> None:
        seen.quantizer_calls[name] += 1

    return hook


def _count_gradient(seen: Seen, name: str, partner: nn.Parameter | None) -> Any:
    def hook(parameter: Tensor) -> None:
        seen.gradients[name] += 1
        excused = partner is not None and not bool(partner.detach().any())
        if excused or (parameter.grad is not None and bool(parameter.grad.any())):
            seen.live_gradients[name] += 1

    return hook


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
