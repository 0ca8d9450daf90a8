"""Several processes on one training: who takes which rows, what they agree on, and what has to be gathered.

accelerate's launcher starts one process for each GPU (`qat.train.launch`). Where the base fits each of them it stays
whole, and DDP averages what is trained: the factors' gradients. Where it does not, FSDP2 keeps a part of every decoder
layer in each process, and a layer's weights are whole only while it runs. Embeddings, last norm and output layer stay
whole everywhere, as the losses take the output layer's weight outside of any module's forward. In a process of its own
everything here is the identity, so that the loop has one code for all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from qat.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qat.patches.guard import Seen

T = TypeVar("T")


class Share(NamedTuple):
    """One process's part of a batch.

    Attributes:
        rows: Row numbers.
        counts: False where the batch has fewer rows than there are processes: this one runs a row of another's, as all
            must take part in gathering weights, and its loss counts for nothing.
    """

    rows: list[int]
    counts: bool


_place = (0, 1)


def take_part(number: int, count: int) -> None:
    """Make this process one of several; it joins the others when it first needs them.

    Not at once: the probes of the patch layer save small models, which transformers leaves to the first of joined
    processes.

    Args:
        number: Of this process, from 0.
        count: How many processes there are.
    """
    global _place
    _place = (number, count)


def rank() -> int:
    """Number of this process, from 0."""
    return _place[0]


def ranks() -> int:
    """How many processes there are."""
    return _place[1]


def sharding() -> bool:
    """Whether accelerate's launcher told this process to cut the decoder layers; the model need not be cut yet."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _join() -> None:
    if not distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def share(rows: list[int], index: int, count: int) -> Share:
    """Take a process's rows of a batch, so that all shares together are the batch.

    A batch is sorted by length, so every `count`-th row gives shares of about the same length.

    Args:
        rows: Row numbers of the whole batch.
        index: Number of the process.
        count: How many processes there are.
    """
    own = rows[index::count]
    return Share(own, True) if own else Share(rows[:1], False)


def own_rows(order: list[list[int]]) -> list[list[int]]:
    """What of an order of batches this process runs, in the same order."""
    return [share(rows, rank(), ranks()).rows for rows in order]


def agreed(value: T) -> T:
    """The first process's value, in every process; all must call it."""
    if ranks() == 1:
        return value
    _join()
    holder = [value]
    distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def by_the_first(function: Callable[[], T]) -> T:
    """Have the first process alone call a function, and give all its result; all must call this."""
    return agreed(function() if rank() == 0 else cast("T", None))


def gathered(value: T) -> list[T]:
    """Every process's value, in their order; all must call it."""
    if ranks() == 1:
        return [value]
    _join()
    values: list[Any] = [None] * ranks()
    distributed.all_gather_object(values, value)
    return values


def summed(value: Tensor) -> Tensor:
    """Sum over all processes of a tensor on the training device, in place."""
    if ranks() > 1:
        distributed.all_reduce(value)
    return value


def barrier() -> None:
    """Wait until every process is here."""
    if ranks() > 1:
        distributed.barrier()


def choose_layers(accelerator: Accelerator, model: nn.Module) -> None:
    """Tell accelerate what FSDP2 gathers at once, the decoder layers, and what it leaves whole, everything else.

    Without this accelerate takes the architecture's own list of layers, which may name vision blocks that a text model
    lacks, and cuts the output layer too, whose weight the losses take by itself.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    layers = {name: module for name, module in model.named_modules() if re.search(r"layers\.\d+$", name)}
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers.values()})
    plugin.ignored_modules = [
        module
        for name, module in model.named_modules()
        if not re.search(r"layers\.\d+(\.|$)", name) and next(module.parameters(recurse=False), None) is not None
    ]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds the model's layers in parts."""
    return isinstance(model, FSDPModule)


def require_sharded(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Check that FSDP2 sums the gradients of everything that is trained.

    Raises:
        UserError: Something outside of the decoder layers is trained.
    """
    outside = [name for name, parameter in parameters.items() if not isinstance(parameter, DTensor)]
    if is_sharded(model) and outside:
        raise UserError(
            "On several GPUs only the decoder layers can be trained.",
            where=outside[0],
            value=f"{len(outside)} trained parameters stand outside of them",
            remedy="train an adapter, or use one GPU",
        )


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts; all processes must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = cast("Any", tensor).full_tensor()
    return full


def for_the_first(tensor: Tensor) -> Tensor:
    """A whole tensor on the CPU where it will be written, and an empty one in the other processes."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = whole(tensor.detach())
    return full.cpu() if rank() == 0 else torch.empty(0, dtype=full.dtype)


def placed_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Cut a whole tensor as `reference` is cut; a tensor of another shape (an optimizer's step count) stays whole."""
    if not isinstance(reference, DTensor) or tensor.shape != reference.shape:
        return tensor
    return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)


def place_optimizer_state_(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Cut the tensors of an optimizer's state dictionary as its parameters are cut, in place."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, slot in state["state"].items():
        for key, value in slot.items():
            if isinstance(value, Tensor):
                slot[key] = placed_like(value, parameters[index])


def call_inside(wrapped: nn.Module, network: nn.Module, function: Callable[[], T]) -> T:
    """Call a function in the place of a wrapped network's forward.

    DDP and FSDP2 do their work around the forward of what they wrap, while the losses run the network's body and take
    its output layer apart from it.

    Args:
        wrapped: DDP's or FSDP2's wrapper.
        network: What it wraps; the same object for FSDP2.
        function: Runs the network.
    """
    network.forward = lambda _: function()
    try:
        result: T = wrapped(None)
    finally:
        del network.forward
    return result


def decoder_layer(model: nn.Module, path: str) -> nn.Module:
    """The decoder layer in which a module stands, which is what FSDP2 gathers at once.

    Args:
        model: The transformers model.
        path: Of the module, `….layers.<n>.…`.

    Raises:
        ValueError: It stands in none.
    """
    match = re.match(r"(?:.*?\.)?layers\.\d+(?=\.)", path)
    if match is None:
        raise ValueError(f"{path} stands in no decoder layer")
    return model.get_submodule(match[0])


@contextmanager
def whole_layer(layer: nn.Module) -> Iterator[None]:
    """Gather a decoder layer's weights outside of its forward; all processes must enter it."""
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


@torch.no_grad()
def count_sharded_gradients(seen: Seen, model: nn.Module) -> None:
    """Tell the guard of the gradients that FSDP2 put beside the parameters, where no hook of a parameter sees them.

    Args:
        seen: Of a watch that covered one forward and the synchronizing backward.
        model: Sharded.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in parameters.items():
        if parameter.grad is None:
            continue
        seen.gradients[name] += 1
        partner = parameters.get(name.replace("lora_A", "lora_B")) if "lora_A" in name else None
        excused = partner is not None and not bool(whole(partner).any())
        seen.live_gradients[name] += excused or bool(whole(parameter.grad).any())
