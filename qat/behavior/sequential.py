"""What it costs to look again, and how to pay for it beforehand.

One look at 95 % confidence claims a PASS wrongly with probability 2.5 %. Who asks the same candidate again until the
gate passes has as many tries as patience. The error is spent over the looks instead (Lan and DeMets 1983, "Discrete
sequential boundaries for clinical trials", Biometrika 70):

- `planned` looks share it equally: confidence 1 - alpha / planned at each;
- without a plan, look k spends alpha / (k (k + 1)). The sum over all k is alpha, so the statement holds at every look,
  however many follow: always valid in the sense of Howard, Ramdas, McAuliffe and Sekhon 2021, "Time-uniform,
  nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49.

Both rest on the union bound alone, so looks may share answers in whole, in part or not at all: asking the same cases
with new seeds makes looks that are neither independent nor of independent increments, which the sharper boundaries of
Pocock or O'Brien and Fleming need.
"""

from __future__ import annotations

from typing import NamedTuple

from qat.errors import UserError


class Look(NamedTuple):
    """Which look at one candidate this is.

    Attributes:
        number: 1 for the first.
        planned: How many were planned before the first; None: no plan, any number may follow.
    """

    number: int
    planned: int | None = None


def confidence_at(confidence: float, look: Look | None) -> float:
    """Two-sided confidence to judge this look with, so that all looks together err with 1 - `confidence` at most.

    Args:
        confidence: Of all looks together.
        look: None: the only look, judged at `confidence`.

    Raises:
        UserError: The look is none of the planned ones.
    """
    if look is None:
        return confidence
    if look.number < 1 or (look.planned is not None and look.number > look.planned):
        raise UserError(
            "This look was not planned.",
            where="look",
            value=f"{look.number} of {look.planned}",
            remedy="plan the looks before the first, or leave the plan out: any number is valid then",
        )
    alpha = 1 - confidence
    share = look.planned if look.planned is not None else look.number * (look.number + 1)
    return 1 - alpha / share


def wrong_claims(confidence: float, looks: int) -> float:
    """Chance that at least one of so many independent looks at `confidence` makes a given one-sided claim wrongly."""
    return 1.0 - (1.0 - (1.0 - confidence) / 2) ** looks
