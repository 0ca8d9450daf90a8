"""Which groups of a network keep more bits: the smallest divergence within a byte budget.

Each group takes one of several formats, with so many bytes and so much divergence; divergences of groups are added.
That is a multiple-choice knapsack. It is solved exactly by keeping, group after group, the choices that no other one
beats in both bytes and divergence (Nemhauser and Ullmann 1969). A network has few sizes of layers, so their sums
coincide and the list stays short; where it outgrows `MOST_CHOICES`, one choice in each slice of bytes is kept and the
result says that it need not be the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qat.errors import UserError

MOST_CHOICES = 200_000
"""Unbeaten partial choices that are kept."""


class Option(NamedTuple):
    """One format of a group.

    Attributes:
        format: `bf16` or one of `qat.quant.presets.FORMATS`.
        bytes: On disk, scales included.
        kl: Divergence from the BF16 persona with this group alone quantized, nats per reply token.
    """

    format: str
    bytes: int
    kl: float


class Choice(NamedTuple):
    """A format for every group.

    Attributes:
        formats: By group.
        bytes: Of all groups and what is fixed.
        kl: Sum of the groups' divergences: what the whole would have if they simply added up.
        exact: No other choice within the budget has a smaller sum.
    """

    formats: dict[str, str]
    bytes: int
    kl: float
    exact: bool


def choose(groups: Mapping[str, Sequence[Option]], budget: int, fixed: int = 0, limit: int = MOST_CHOICES) -> Choice:
    """Choose a format for every group.

    Args:
        groups: Options by group, at least one each.
        budget: Bytes for everything.
        fixed: Bytes of what has no choice.
        limit: Most partial choices kept.

    Raises:
        UserError: Even the smallest formats do not fit.
    """
    smallest = [min(option.bytes for option in options) for options in groups.values()]
    if fixed + sum(smallest) > budget:
        raise UserError(
            "The byte budget is below what the smallest formats need.",
            value=f"{budget:,} bytes",
            remedy=f"Give at least {fixed + sum(smallest):,} bytes; {fixed:,} of them cannot be quantized.",
        )
    sizes, losses = np.array([fixed], dtype=np.int64), np.zeros(1)
    taken: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    rest, exact = sum(smallest), True
    for options, least in zip(groups.values(), smallest, strict=True):
        rest -= least
        all_sizes = np.concatenate([sizes + option.bytes for option in options])
        all_losses = np.concatenate([losses + option.kl for option in options])
        kept = _unbeaten(all_sizes, all_losses, budget - rest)
        if len(kept) > limit:
            kept, exact = kept[_one_a_slice(all_sizes[kept], limit)], False
        taken.append((kept % len(sizes), kept // len(sizes)))
        sizes, losses = all_sizes[kept], all_losses[kept]
    place = len(sizes) - 1  # the largest, hence of the smallest divergence
    total, kl = int(sizes[place]), float(losses[place])
    formats: dict[str, str] = {}
    for (name, options), (parents, picks) in zip(reversed(list(groups.items())), reversed(taken), strict=True):
        formats[name] = options[int(picks[place])].format
        place = int(parents[place])
    return Choice(dict(reversed(formats.items())), total, kl, exact)


def _unbeaten(sizes: npt.NDArray[np.int64], losses: npt.NDArray[np.float64], most: int) -> npt.NDArray[np.int64]:
    """Places, by rising size, of those within `most` bytes that nothing of the same or smaller size equals or beats."""
    order = np.lexsort((losses, sizes))
    order = order[sizes[order] <= most]
    before = np.minimum.accumulate(np.concatenate([[np.inf], losses[order]]))[:-1]
    found: npt.NDArray[np.int64] = order[losses[order] < before]
    return found


def _one_a_slice(sizes: npt.NDArray[np.int64], limit: int) -> npt.NDArray[np.int64]:
    """The last place (smallest divergence) in each of `limit` slices of the range of rising sizes."""
    edges = np.linspace(sizes[0], sizes[-1], limit + 1)[1:]
    found: npt.NDArray[np.int64] = np.unique(np.maximum(np.searchsorted(sizes, edges, side="right") - 1, 0))
    return found
