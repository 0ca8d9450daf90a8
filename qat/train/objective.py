"""The losses and what validation reports, computed only where a prediction counts.

Logits are by far the largest tensors of a step (vocabulary times positions), so they are made of the selected hidden
states only, in float32, and in pieces where they would be large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qat.data.render import IGNORED
from qat.train.memory import LOGITS_PIECE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECE = LOGITS_PIECE
"""Largest number of logits that are in memory at once (256 MB in float32)."""


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    from peft import PeftModel

    inner: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


def output_weight(model: torch.nn.Module) -> Tensor:
    """Weight (vocabulary, hidden) of the output layer.

    Raises:
        RuntimeError: The output layer does more than a plain product (bias, factors, quantizers), which `logits` would
            leave out.
    """
    head = causal_lm(model).get_output_embeddings()
    quantizers = [
        name for name, part in head.named_modules() if name.endswith("quantizer") and getattr(part, "is_enabled", True)
    ]
    if getattr(head, "bias", None) is not None or hasattr(head, "lora_A") or quantizers:
        raise RuntimeError(f"the output layer is no plain product: bias, factors or {quantizers}")
    weight: Tensor = head.weight
    return weight


def hidden_states(model: torch.nn.Module, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Run the model up to its output layer.

    Args:
        model: With or without adapter.
        input_ids: (rows, tokens).
        targets: (rows, tokens); `IGNORED` where the prediction does not count.

    Returns:
        (positions, hidden) in the model's dtype: the selected positions, row by row.
    """
    inner = causal_lm(model)
    output = inner.base_model(input_ids=input_ids, use_cache=False)
    states: Tensor = output.last_hidden_state
    return states[targets != IGNORED]


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(positions, hidden) -> float32 (positions, vocabulary), as the model's own forward makes them."""
    return functional.linear(hidden.to(weight.dtype), weight).float()


def _in_pieces(function: Callable[..., Tensor], weight: Tensor, *rows: Tensor) -> Tensor:
    """Sum `function(weight, *part)` over parts of the rows, keeping the logits of one part at a time.

    Args:
        function: Gives a float32 scalar, differentiable in the weight and in the first rows.
        weight: (vocabulary, hidden).
        rows: Tensors with one entry for each position; the first one is the student's.
    """
    count = max(1, PIECE // weight.shape[0])
    if rows[0].shape[0] <= count:
        return function(weight, *rows)
    if not torch.is_grad_enabled():
        parts = zip(*(tensor.split(count) for tensor in rows), strict=True)
        return torch.stack([function(weight, *part) for part in parts]).sum()
    total: Tensor = _Pieces.apply(function, count, weight, *rows)  # type: ignore[no-untyped-call]
    return total


class _Pieces(torch.autograd.Function):
    """A sum over pieces whose gradient is made piece by piece in the forward, while the piece's logits are there.

    The loss is the end of the network: what comes back to it is one number. So each piece's gradient can be made at
    once and only multiplied with that number later (the way of Liger-Kernel's fused linear losses); the logits of a
    piece are computed once, where checkpointing would compute them twice.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], count: int, weight: Tensor, *rows: Tensor) -> Tensor:
        to_weight, to_rows = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        total = torch.zeros((), dtype=torch.float32, device=weight.device)
        own = weight.detach().requires_grad_(to_weight)
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if to_weight else None
        row_gradients = []
        for first, *others in zip(*(tensor.split(count) for tensor in rows), strict=True):
            with torch.set_grad_enabled(to_weight or to_rows):
                part = first.detach().requires_grad_(to_rows)
                value = function(own, part, *others)
            total += value.detach()
            wanted = [tensor for tensor in (own, part) if tensor.requires_grad]
            gradients = list(torch.autograd.grad(value, wanted)) if wanted else []
            if weight_gradient is not None:
                weight_gradient += gradients.pop(0)
            row_gradients += gradients
        ctx.gradients = (
            None if weight_gradient is None else weight_gradient.to(weight.dtype),
            torch.cat(row_gradients) if row_gradients else None,
        )
        ctx.others = len(rows) - 1
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        to_weight, to_rows = (
            None if made is None else (made.float() * outer[0]).to(made.dtype) for made in ctx.gradients
        )
        return None, None, to_weight, to_rows, *([None] * ctx.others)


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p(target), in nats.

    Args:
        hidden: (positions, hidden).
        weight: (vocabulary, hidden).
        targets: (positions,), int64.

    Returns:
        float32 scalar.
    """

    def piece(weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits(hidden, weight), targets, reduction="sum")

    return _in_pieces(piece, weight, hidden, targets)


def kl_sum(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Sum over positions of the forward divergence T^2 KL(teacher || student), in nats.

    KL(p || q) = sum_v p_v (log p_v - log q_v) with p, q softened by the temperature T; T^2 keeps the gradient's size
    (Hinton, Vinyals and Dean 2015, section 2).

    Args:
        student: (positions, hidden).
        teacher: (positions, hidden), without gradient.
        weight: (vocabulary, hidden); teacher and student share it.
        temperature: T.

    Returns:
        float32 scalar.
    """

    def piece(weight: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        return _divergence(logits(student, weight), logits(teacher, weight.detach()), temperature)

    return _in_pieces(piece, weight, student, teacher) * temperature**2


def mixed_sum(
    student: Tensor, teacher: Tensor, weight: Tensor, targets: Tensor, temperature: float, ce_weight: float
) -> Tensor:
    """Sum over positions of (1 - c) T^2 KL(teacher || student) - c log q(target), from one set of logits.

    Args:
        student: (positions, hidden).
        teacher: (positions, hidden), without gradient.
        weight: (vocabulary, hidden); teacher and student share it.
        targets: (positions,), int64.
        temperature: T, of the divergence; the cross entropy is at 1.
        ce_weight: c, from 0 to 1.

    Returns:
        float32 scalar.
    """

    def piece(weight: Tensor, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        own = logits(student, weight)
        divergence = _divergence(own, logits(teacher, weight.detach()), temperature) * temperature**2
        return (1 - ce_weight) * divergence + ce_weight * functional.cross_entropy(own, targets, reduction="sum")

    return _in_pieces(piece, weight, student, teacher, targets)


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of float32 logits (positions, vocabulary), summed."""
    log_q = torch.log_softmax(student / temperature, dim=-1)
    log_p = torch.log_softmax(teacher / temperature, dim=-1)
    return functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


class PositionScores(NamedTuple):
    """How a student compares with its teacher at each position.

    Attributes:
        kl: (positions,), float32, nats; KL(teacher || student) at temperature 1.
        agree: (positions,), bool; both hold the same token most likely.
    """

    kl: Tensor
    agree: Tensor


@torch.no_grad()
def position_scores(student: Tensor, teacher: Tensor, weight: Tensor) -> PositionScores:
    """Compare student and teacher position by position.

    Args:
        student: (positions, hidden).
        teacher: (positions, hidden).
        weight: (vocabulary, hidden).
    """
    count = max(1, PIECE // weight.shape[0])
    kl, agree = [], []
    for q, p in zip(student.split(count), teacher.split(count), strict=True):
        student_logits, teacher_logits = logits(q, weight), logits(p, weight)
        log_p = torch.log_softmax(teacher_logits, dim=-1)
        log_q = torch.log_softmax(student_logits, dim=-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
        agree.append(student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1))
    return PositionScores(torch.cat(kl), torch.cat(agree))
