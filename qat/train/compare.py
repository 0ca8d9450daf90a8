"""Student against teacher on held-out replies: one way of counting for validation and for the table of arms."""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from qat.data.render import IGNORED
from qat.errors import UserError
from qat.progress import progress_bar
from qat.train.batches import Batch, Sample, collate, evaluation_order, target_mask
from qat.train.objective import hidden_states, output_weight, position_scores

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

KEPT_IN_MEMORY = 1 << 30
"""Bytes of teacher's answers above which they go into a file."""


class Reference(NamedTuple):
    """One batch of held-out rows with the teacher's answer.

    Attributes:
        batch: The rows, targets on assistant replies.
        teacher: (positions, hidden), the teacher's last hidden states at the targets.
    """

    batch: Batch
    teacher: Tensor


class CategoryDivergence(NamedTuple):
    """Divergence on the conversations of one category.

    Attributes:
        kl: Nats per reply token.
        top1: Share of reply tokens at which both hold the same token most likely.
        tokens: Reply tokens.
        conversations: Conversations.
    """

    kl: float
    top1: float
    tokens: int
    conversations: int


class Divergence(NamedTuple):
    """How far an arm is from the BF16 persona.

    Attributes:
        kl: KL(persona || arm), nats per reply token, at temperature 1.
        kl_se: Its standard error, conversations taken as the independent units; None for fewer than two.
        top1: Share of reply tokens at which both hold the same token most likely.
        tokens: Reply tokens.
        conversations: Conversations.
        categories: The same by category.
    """

    kl: float
    kl_se: float | None
    top1: float
    tokens: int
    conversations: int
    categories: dict[str, CategoryDivergence]

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return {
            **self._asdict(),
            "categories": {name: category._asdict() for name, category in self.categories.items()},
        }


@torch.no_grad()
def hidden_of_rows(
    model: torch.nn.Module, samples: list[Sample], rows: Iterable[int], tokens: str, spill: Path | None = None
) -> dict[int, Tensor]:
    """The teacher's last hidden states at the target positions of some rows, computed once.

    Hidden states and not logits are kept: they are smaller by vocabulary / hidden size (16 times for the tiny base, 49
    for Nano). The batches depend on the rows alone, so a run that goes on after a kill gets the same bits. Above
    `KEPT_IN_MEMORY` bytes (Nano: 200,000 positions) they lie in a file that is mapped into memory, whose pages the
    system can drop and read again.

    Args:
        model: The teacher.
        samples: All rows.
        rows: Which of them.
        tokens: `replies` or `all`.
        spill: The file to use where they are many; overwritten. None: memory alone.

    Returns:
        Row -> (positions, hidden) on the CPU, in the model's dtype.

    Raises:
        UserError: The disk has no room for the file.
    """
    weight = output_weight(model)
    chosen = sorted(set(rows))
    counts = {row: sum(target_mask(samples[row], tokens)) for row in chosen}
    size = torch.Size((sum(counts.values()), weight.shape[1]))
    store = _store(size, weight.dtype, spill)
    kept = dict(zip(chosen, store.split(list(counts.values())), strict=True))
    groups = evaluation_order([len(samples[row].input_ids) for row in chosen])
    with progress_bar("asking the teacher", len(groups)) as bar:
        for done, group in enumerate(groups):
            batch = collate(samples, [chosen[index] for index in group], tokens)
            states = hidden_states(model, batch.input_ids.to(weight.device), batch.targets.to(weight.device)).cpu()
            for row, answer in zip(batch.rows, states.split([counts[row] for row in batch.rows]), strict=True):
                kept[row].copy_(answer)
            bar.update(done + 1)
    return kept


def _store(size: torch.Size, dtype: torch.dtype, spill: Path | None) -> Tensor:
    """Room for the answers: in memory, or in a file where they are many."""
    needed = size.numel() * dtype.itemsize
    if spill is None or needed <= KEPT_IN_MEMORY:
        return torch.empty(size, dtype=dtype)
    spill.parent.mkdir(parents=True, exist_ok=True)
    spill.unlink(missing_ok=True)
    free = shutil.disk_usage(spill.parent).free
    if needed > free:
        raise UserError(
            "The disk has no room for the teacher's answers.",
            where=str(spill),
            value=f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB free",
            remedy="free some space; fewer steps or rows, or `tokens: replies`, need less",
        )
    return torch.from_file(str(spill), shared=True, size=size.numel(), dtype=dtype).view(size)


@torch.no_grad()
def make_references(model: torch.nn.Module, samples: list[Sample]) -> list[Reference]:
    """Run the teacher over held-out rows.

    Args:
        model: The BF16 persona, in `eval` mode.
        samples: Held-out rows.
    """
    device = output_weight(model).device
    references = []
    for rows in evaluation_order([len(sample.input_ids) for sample in samples]):
        batch = collate(samples, rows, "replies")
        states = hidden_states(model, batch.input_ids.to(device), batch.targets.to(device))
        references.append(Reference(batch, states.cpu()))
    return references


@torch.no_grad()
def compare(model: torch.nn.Module, references: list[Reference], samples: list[Sample]) -> Divergence:
    """Measure a student against the teacher's answers.

    Args:
        model: The student, in `eval` mode.
        references: From `make_references` on the same rows.
        samples: These rows.

    Returns:
        Divergence; sums are taken in float64, row by row.
    """
    weight = output_weight(model)
    kl, agree, count = ([0.0] * len(samples) for _ in range(3))
    for batch, teacher in references:
        targets = batch.targets.to(weight.device)
        student = hidden_states(model, batch.input_ids.to(weight.device), targets)
        scores = position_scores(student, teacher.to(weight.device), weight)
        counts = (batch.targets != IGNORED).sum(dim=1).tolist()
        parts = zip(batch.rows, scores.kl.double().cpu().split(counts), scores.agree.cpu().split(counts), strict=True)
        for row, row_kl, row_agree in parts:
            kl[row], agree[row], count[row] = float(row_kl.sum()), float(row_agree.sum()), float(len(row_kl))
    categories = {}
    for name in sorted({sample.category for sample in samples}):
        members = [row for row, sample in enumerate(samples) if sample.category == name]
        tokens = sum(count[row] for row in members)
        categories[name] = CategoryDivergence(
            sum(kl[row] for row in members) / tokens,
            sum(agree[row] for row in members) / tokens,
            int(tokens),
            len(members),
        )
    tokens = sum(count)
    return Divergence(
        kl=sum(kl) / tokens,
        kl_se=_ratio_standard_error(kl, count),
        top1=sum(agree) / tokens,
        tokens=int(tokens),
        conversations=len(samples),
        categories=categories,
    )


def _ratio_standard_error(sums: list[float], counts: list[float]) -> float | None:
    """Standard error of sum(sums) / sum(counts) over independent units (Cochran, Sampling Techniques, eq. 2.39)."""
    n, tokens = len(sums), sum(counts)
    if n < 2:
        return None
    ratio = sum(sums) / tokens
    residual = sum((total - ratio * count) ** 2 for total, count in zip(sums, counts, strict=True))
    return math.sqrt(residual * n / (n - 1)) / tokens
