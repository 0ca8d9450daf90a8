"""After a forward and backward: what really ran.

A quantizer that is configured but never called, a LoRA factor that no gradient reaches, a layer that the adapter
missed: none of them gives an error anywhere, and the loss falls all the same. The guard watches the calls themselves,
whatever the reason is (a fused kernel, another experts implementation, a conversion that switches quantizers off), and
needs no list of known causes:

    wanted = enabled_quantizers(model)                          # before adapters are attached
    ...
    with watch(model, quantized=wanted, adapted=["*.q_proj", "*.experts.*"]) as seen:
        model(**batch).loss.backward()
    seen.require()
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

# Linears that a server computes as one, so that one tensor scale has to serve all of them.
FUSED_WHEN_SERVED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Quantizers inside a LoRA layer, whose work others do on the effective weight.
_OF_THE_BASE = re.compile(r"(.*)\.base_layer(\.\w+_quantizer)")
_OF_A_FACTOR = re.compile(r"(.*)\.lora_[AB]\.[^.]+\.\w+_quantizer")
_SHOWN = 5


class Dead(NamedTuple):
    """What did not take part; all lists are empty where everything did.

    Attributes:
        quantizers: Enabled quantizers that never ran.
        switched_off: Wanted quantizers that are disabled, and wanted patterns that no quantizer fits.
        unshared: Groups of modules that a server fuses and whose quantizers have different ranges.
        parameters: Trainable parameters that got no gradient, or an all-zero one every time.
        without_adapter: Wanted weights without an adapter, and wanted patterns that no weight fits.
        unasked_adapters: Adapted weights that no wanted pattern fits.
    """

    quantizers: list[str]
    switched_off: list[str]
    unshared: list[str]
    parameters: list[str]
    without_adapter: list[str]
    unasked_adapters: list[str]


# In the order of `Dead`.
_SAID = (
    "enabled quantizers never ran",
    "wanted quantizers are switched off or missing",
    "groups that are fused when served have different ranges",
    "trainable parameters got no gradient",
    "wanted weights have no adapter",
    "weights have an adapter that was not asked for",
)


class DeadModules(RuntimeError):
    """Something that was configured takes no part.

    Attributes:
        dead: What.
    """

    def __init__(self, dead: Dead) -> None:
        self.dead = dead
        lines = [f"{len(names)} {said}: {_first(names)}" for names, said in zip(dead, _SAID, strict=True) if names]
        super().__init__("; ".join(lines))


class Seen:
    """What a watched stretch of training did. Names are the modules' own.

    Attributes:
        quantizer_calls: Calls of each quantizer that was enabled when the watch began.
        disabled: Quantizers that were not.
        gradients: Gradients that each trainable parameter received.
        live_gradients: Those of them that were not all zero. For a LoRA A whose B is still zero a gradient of zeros is
            what it must be, and counts as live.
        trained: Numbers in the trainable parameters.
        adapted: Weights with an adapter, by the plain model's name.
    """

    def __init__(self) -> None:
        self.quantizer_calls: dict[str, int] = {}
        self.disabled: list[str] = []
        self.gradients: dict[str, int] = {}
        self.live_gradients: dict[str, int] = {}
        self.trained = 0
        self.adapted: list[str] = []
        self._switched_off: list[str] = []
        self._without_adapter: list[str] = []
        self._unasked: list[str] = []
        self._unshared: list[str] = []

    @property
    def dead(self) -> Dead:
        """What took no part."""
        return Dead(
            quantizers=_idle(self.quantizer_calls),
            switched_off=self._switched_off,
            unshared=self._unshared,
            parameters=[name for name, live in self.live_gradients.items() if not live],
            without_adapter=self._without_adapter,
            unasked_adapters=self._unasked,
        )

    def require(self, *, quantizers: bool = True, adapters: bool = True) -> None:
        """Check that everything took part.

        Args:
            quantizers: Every enabled quantizer ran, every wanted one is enabled, fused modules share ranges.
            adapters: Every trainable parameter got a gradient that was not all zero each time, and the wanted weights
                and no others are adapted.

        Raises:
            DeadModules: Something did not.
        """
        dead = self.dead
        if not quantizers:
            dead = dead._replace(quantizers=[], switched_off=[], unshared=[])
        if not adapters:
            dead = dead._replace(parameters=[], without_adapter=[], unasked_adapters=[])
        if any(dead):
            raise DeadModules(dead)

    def to_json(self) -> dict[str, Any]:
        """The counts, jsonable, for a receipt; `dead` holds the lists that are not empty."""
        return {
            "quantizers_ran": sum(calls > 0 for calls in self.quantizer_calls.values()),
            "quantizers_disabled": len(self.disabled),
            "adapted_weights": len(self.adapted),
            "trained_parameters": sum(live > 0 for live in self.live_gradients.values()),
            "trained_numbers": self.trained,
            "dead": {kind: names for kind, names in self.dead._asdict().items() if names},
        }


def enabled_quantizers(model: nn.Module) -> list[str]:
    """The quantizers that are on now, by the plain model's names: what a later watch can ask for."""
    return list(dict.fromkeys(_plain(name) for name, module in _quantizers(model) if module.is_enabled))


@contextmanager
def watch(
    model: nn.Module, *, quantized: Iterable[str] | None = None, adapted: Iterable[str] | None = None
) -> Iterator[Seen]:
    """Count calls and gradients inside the block; forward and backward belong into it, any number of them.

    Args:
        model: With or without quantizers and adapters.
        quantized: Names or glob patterns of quantizers that must be on (`*.q_proj.weight_quantizer`); None asks for
            none. Names here and below are the plain model's, without PEFT's `base_model.model.` and `.base_layer`.
        adapted: Names or glob patterns of the weights that must carry an adapter, and no others may: linears without
            `.weight`, fused expert parameters. None asks for none and allows all.

    Yields:
        What was seen; complete when the block ends.
    """
    seen = Seen()
    handles: list[Any] = []
    enabled: dict[str, Any] = {}
    for name, module in _quantizers(model):
        if module.is_enabled:
            enabled[name], seen.quantizer_calls[name] = module, 0
            handles.append(module.register_forward_hook(_count_call(seen, name)))
        else:
            seen.disabled.append(name)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in parameters.items():
        seen.gradients[name] = seen.live_gradients[name] = 0
        seen.trained += parameter.numel()
        partner = parameters.get(name.replace("lora_A", "lora_B")) if "lora_A" in name else None
        handles.append(parameter.register_post_accumulate_grad_hook(_count_gradient(seen, name, partner)))
    seen.adapted = _adapted_weights(model)
    if quantized is not None:
        on = {_plain(name) for name in enabled}
        seen._switched_off = _missing(quantized, on | {_plain(name) for name in seen.disabled}, on)
    if adapted is not None:
        wanted, carrying = list(adapted), set(seen.adapted)
        seen._without_adapter = _missing(wanted, _weights(model), carrying)
        seen._unasked = [name for name in seen.adapted if not any(fnmatchcase(name, each) for each in wanted)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
    seen._unshared = _unshared({_plain(name): enabled[name] for name, calls in seen.quantizer_calls.items() if calls})


def _quantizers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    # By their interface, so that nothing is imported that the model does not already use.
    for name, module in model.named_modules():
        if type(module).__name__.endswith("TensorQuantizer") and hasattr(module, "is_enabled"):
            yield name, module


def _plain(name: str) -> str:
    """A name without what PEFT's wrappers add."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _adapted_weights(model: nn.Module) -> list[str]:
    """Weights with LoRA factors; a wrapper of a fused expert parameter says which one it adapts."""
    found = []
    for path, module in model.named_modules():
        if hasattr(module, "base_layer") and len(getattr(module, "lora_A", ())):
            parameter = getattr(module, "parameter_name", None)
            found.append(_plain(path if parameter in (None, "weight") else f"{path}.{parameter}"))
    return found


def _weights(model: nn.Module) -> set[str]:
    """The matrices and fused expert parameters of the plain model, `.weight` left out."""
    matrices = (name for name, parameter in model.named_parameters() if parameter.dim() > 1 and ".lora_" not in name)
    return {_plain(name).removesuffix(".weight") for name in matrices}


def _missing(wanted: Iterable[str], present: set[str], good: set[str]) -> list[str]:
    """What is wanted and present but not good, and the wants that nothing present fits."""
    found: dict[str, None] = {}
    for want in wanted:
        # A list of thousands of exact names is the usual case, and matching each against each takes minutes.
        names = [want] if want in present else sorted(name for name in present if fnmatchcase(name, want))
        found |= dict.fromkeys(name for name in names or [want] if name not in good)
    return list(found)


def _idle(calls: dict[str, int]) -> list[str]:
    """Quantizers that never ran.

    A list of quantizers, one for each expert, counts as one: the router need not reach every expert. Those inside a
    LoRA layer are excused where their work was done on the effective weight: the base's where the layer's own of that
    kind ran, a factor's where any of its layer ran.
    """
    whole: dict[str, int] = {}
    for name, count in calls.items():
        name = re.sub(r"_quantizers\.\d+$", "_quantizers", name)
        whole[name] = whole.get(name, 0) + count
    at_work = {_plain(name).rpartition(".")[0] for name, count in whole.items() if count}

    def excused(name: str) -> bool:
        if base := _OF_THE_BASE.fullmatch(name):
            return whole.get(base[1] + base[2], 0) > 0
        factor = _OF_A_FACTOR.fullmatch(name)
        return factor is not None and _plain(factor[1]) in at_work

    return [name for name, count in whole.items() if not count and not excused(name)]


def _unshared(quantizers: dict[str, Any]) -> list[str]:
    """Groups of fused modules, as `a, b: kind`, whose quantizers have static ranges that differ."""
    groups: dict[tuple[str, int, str], dict[str, Any]] = {}
    for name, quantizer in quantizers.items():
        module, _, kind = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        for number, family in enumerate(FUSED_WHEN_SERVED):
            if leaf in family and getattr(quantizer, "_amax", None) is not None:
                groups.setdefault((parent, number, kind), {})[module] = quantizer._amax
    return [
        f"{', '.join(ranges)}: {kind}"
        for (_, _, kind), ranges in groups.items()
        if any(not _equal(amax, next(iter(ranges.values()))) for amax in ranges.values())
    ]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())


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
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
