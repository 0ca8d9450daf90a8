"""When training goes wrong: the rule for an explosion of the gradient, and the search for the layer that broke first.

An explosion is a gradient norm (before clipping) above `EXPLOSION` times the median of the last `HISTORY` steps and
above `CLIPPED_AWAY` times the norm that clipping allows. Clipping takes a spike's length away and keeps its direction,
which at that ratio belongs to one batch or one number gone wrong; a hundredfold spike is what training is used to. Both
conditions, because late in training the median may be tiny.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UserError
from qat.train.parallel import gathered, whole

EXPLOSION = 1000.0
"""Times the median of the last steps' gradient norms."""

HISTORY = 20
"""Steps that the median is taken over; fewer than `LEAST` decide nothing."""

LEAST = 5
"""Steps before an explosion can be told."""

CLIPPED_AWAY = 100.0
"""Times the largest norm that clipping lets through."""


def exploded(norm: float, past: Sequence[float], max_norm: float) -> bool:
    """Apply the rule of this module.

    Args:
        norm: Gradient norm of the step at hand, before clipping.
        past: Those of the steps before, oldest first.
        max_norm: What gradients are clipped to.
    """
    recent = past[-HISTORY:]
    if len(recent) < LEAST:
        return False
    return norm > EXPLOSION * statistics.median(recent) and norm > CLIPPED_AWAY * max_norm


def divergence(what: str, how: str, place: str, conversations: Sequence[str], kept: str | None) -> UserError:
    """Make the one message for a training that went wrong.

    Args:
        what: Which training, at which step.
        how: What was seen.
        place: Where; from `first_fault`, `first_output` or `largest_gradient`.
        conversations: Ids of the rows of that step; empty for a validation.
        kept: What is left of the training; None before its first step.
    """
    shown = ", ".join(conversations[:8]) + (", …" if len(conversations) > 8 else "")
    advice = "lower the learning rate, or look at these conversations" if shown else "lower the learning rate"
    untrained = "nothing has been trained yet: look at the base's weights and at the held-out conversations"
    return UserError(
        f"{what}: {how}.",
        where=place,
        value=f"conversations {shown}" if shown else None,
        remedy=untrained if kept is None else f"{advice}; {kept}",
    )


def largest_gradient(model: nn.Module) -> str:
    """Name the parameter with the longest gradient; clipping, which scales all alike, may have been there before."""
    norms = {
        name: float(whole(parameter.grad.norm()))
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return f"the gradient of {_plain(max(norms, key=norms.__getitem__))} is the largest"


def first_fault(model: nn.Module, passes: Iterable[Callable[[], Tensor]]) -> str:
    """Find what stopped being finite first, by running the failing step once more under observation.

    Modules are watched in the order in which they finish, innermost first; in the backward, which runs from the output
    to the input, the parameter nearest to the output is the first. Every process of a training must call this: each
    looks at its own rows, and the first that finds something is heard.

    Args:
        model: As it was in the step: same mode, same parameters. Its gradients are overwritten.
        passes: Forwards of the step's batches, each giving its loss.

    Returns:
        Half a sentence that names the place; that nothing was found where the second run was sound.
    """
    broken = [name for name, parameter in model.named_parameters() if not _finite(parameter)]
    if broken:
        return f"parameter {_plain(broken[0])} was not finite before the forward"
    model.zero_grad()
    losses = []
    with _noted_outputs(model) as outputs:
        for run in passes:
            loss = run()
            losses.append(bool(loss.isfinite()))
            loss.backward()
    gradients = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not _finite(parameter.grad)
    ]
    model.zero_grad()
    found = _first(outputs)
    if found is None and not all(losses):
        found = "the loss is not finite, though every layer's output is"
    elif found is None and gradients:
        found = f"the gradient of {_plain(gradients[-1])} is the first that is not finite, though the loss is finite"
    heard = [text for text in gathered(found) if text is not None]
    return heard[0] if heard else "a second run of the same step was finite: dropout, or the hardware"


def first_output(model: nn.Module, validate: Callable[[], Any]) -> str:
    """Find the layer whose output stopped being finite first, by validating once more under observation.

    Args:
        model: In `eval` mode. Every process of a training must call this.
        validate: Runs the model over all held-out rows.

    Returns:
        Half a sentence that names the place.
    """
    with torch.no_grad(), _noted_outputs(model) as outputs:
        validate()
    heard = [text for text in gathered(_first(outputs)) if text is not None]
    return heard[0] if heard else "the loss of the held-out rows, though every layer's output is finite"


@contextmanager
def _noted_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose output was not finite, the first one alone, while the block runs."""
    outputs: list[str] = []
    handles = [module.register_forward_hook(_note_output(name, outputs)) for name, module in model.named_modules()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _first(outputs: Sequence[str]) -> str | None:
    return f"the output of {_plain(outputs[0]) or 'the model'} is the first that is not finite" if outputs else None


def _note_output(name: str, found: list[str]) -> Any:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        if found:
            return
        values = output if isinstance(output, tuple | list) else [output]
        if any(isinstance(value, Tensor) and value.is_floating_point() and not _finite(value) for value in values):
            found.append(name)

    return hook


@torch.no_grad()
def _finite(tensor: Tensor) -> bool:
    return bool(whole(tensor).isfinite().all())


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")
