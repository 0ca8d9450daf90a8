"""What repairs of the hub's `modeling_nemotron_h.py` share: finding its classes, calling and replacing their method."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.replacing import replace

if TYPE_CHECKING:
    import torch

_PACKAGE, _MODULE, _CLASS, _METHOD = "transformers_modules.", ".modeling_nemotron_h", "NemotronHMOE", "moe"


class StandInExpert:
    """What `NemotronHMOE.moe` looks at in an expert: a call, and the dtype of a weight.

    Attributes:
        seen: The dtypes of the inputs it was called with.
    """

    def __init__(self, weight: torch.dtype, output: torch.dtype) -> None:
        import torch

        self.down_proj = SimpleNamespace(weight=torch.zeros(1, dtype=weight))
        self.output = output
        self.seen: list[torch.dtype] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input in the output's dtype."""
        self.seen.append(x.dtype)
        return x.to(self.output)


class RemoteMoePatch(ABC):
    """A repair of `NemotronHMOE.moe(hidden_states, topk_indices, topk_weights)` in the hub's `modeling_nemotron_h.py`.

    The class exists only after a model was loaded with `trust_remote_code=True`; look and repair after that.
    """

    name: str
    libraries: tuple[str, ...] = ("transformers",)
    place = Place.HERE

    @abstractmethod
    def fault(self, moe: type) -> str | None:
        """What goes wrong in this class's method, or None."""

    @abstractmethod
    def around(
        self,
        moe: Callable[..., torch.Tensor],
        module: Any,
        hidden_states: torch.Tensor,
        topk_indices: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The repaired method, given the one beneath it."""

    def __init__(self) -> None:
        self._restores: dict[type, Callable[[], None]] = {}

    def probe(self) -> ProbeResult:
        """Call the method of every loaded class with stand-ins for its experts."""
        classes = remote_classes()
        if not classes:
            return ProbeResult(Status.CANNOT_TELL, "no remote modeling_nemotron_h is loaded in this process")
        faults = [fault for cls in classes if (fault := self.fault(cls)) is not None]
        if faults:
            return ProbeResult(Status.NEEDED, faults[0])
        status = Status.APPLIED if self._restores else Status.NOT_NEEDED
        return ProbeResult(status, f"NemotronHMOE.moe takes the case, number of loaded classes: {len(classes)}")

    def apply(self) -> None:
        """Replace the method of every loaded class; a class that is loaded later needs another call."""
        for cls in remote_classes():
            if cls not in self._restores:
                self._restores[cls] = replace(cls, _METHOD, self.around)

    def revert(self) -> None:
        """Take the replacements out again."""
        while self._restores:
            self._restores.popitem()[1]()


def remote_classes() -> list[type]:
    """The classes called `NemotronHMOE` in remote modules of this process."""
    modules = [module for name, module in sys.modules.items() if name.startswith(_PACKAGE) and name.endswith(_MODULE)]
    return [cls for module in modules if isinstance(cls := getattr(module, _CLASS, None), type)]


def call_moe(moe: type, experts: list[StandInExpert], topk_indices: list[list[int]]) -> torch.Tensor:
    """Call a class's method in BF16 with a stand-in for the module.

    Args:
        moe: The class.
        experts: Its experts.
        topk_indices: Of each token, the experts it goes to.

    Returns:
        (tokens, 2), where every token was ones and every routing weight 1.
    """
    import torch

    tokens, chosen = torch.ones(len(topk_indices), 2, dtype=torch.bfloat16), torch.tensor(topk_indices)
    weights = torch.ones(chosen.shape, dtype=torch.bfloat16)
    output: torch.Tensor = getattr(moe, _METHOD)(SimpleNamespace(experts=experts), tokens, chosen, weights)
    return output
