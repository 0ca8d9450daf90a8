"""How far two arms are apart at the tokens of the same replies: the estimator, and how it is counted.

Flips are rare: two arms may pass and fail the same cases and yet differ in every word. How likely each of them takes
each token of the same replies shows the difference long before a check does.

**Estimator.** A server lists the most likely tokens of a position only. Let S be the tokens that stand in both lists,
and r = 1 - sum over S the rest of each distribution. Then

    kl = sum over S of p log(p / q)  +  r_p log(r_p / r_q)

is the divergence of the two distributions with everything outside S taken as one token. By the chain rule of relative
entropy (Cover and Thomas, Elements of Information Theory, 2.67) the full KL(p || q) is this plus r_p times the
divergence of the rests: `kl` never overstates, and `rest`, the mean of r_p, is the weight of what it does not see.
How far the rests are apart cannot be bounded from truncated lists; with all tokens listed `kl` is exact.

Sums are over tokens; standard errors take the cases as the independent units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qat.behavior import stats

RESOLUTION = 1e-6
"""The least rest of a distribution: sums of probabilities in float32 with six decimals are not known better."""

Top = Mapping[int, float]
"""Token to log probability, in nats: the most likely ones of one position."""


class Position(NamedTuple):
    """Two distributions over the next token set side by side.

    Attributes:
        kl: Estimate of KL(reference || arm), nats; see the module.
        agree: Whether both hold the same token most likely.
        rest: Mass of the reference that the estimate takes as one token.
    """

    kl: float
    agree: bool
    rest: float


class Part(NamedTuple):
    """Divergence over the tokens of some cases.

    Attributes:
        kl: Nats per token.
        kl_se: Its standard error, clustered by case; None where the cases are too few.
        top1: Share of tokens at which both hold the same token most likely.
        top1_se: Its standard error, likewise.
        rest: Mean mass of the reference that `kl` takes as one token.
        tokens: Tokens of the replies, the end token included.
        cases: Distinct cases.
    """

    kl: float
    kl_se: float | None
    top1: float
    top1_se: float | None
    rest: float
    tokens: int
    cases: int


class SuiteDivergence(NamedTuple):
    """An arm against the reference on the reference's replies.

    Attributes:
        reference: The arm whose replies were scored.
        suite: Name of the suite.
        sha256: Of its cases.
        sampling: Under which the replies were written.
        top: Tokens listed at each position.
        unscored: Replies that the server could not score.
        overall: Over all tokens.
        categories: The same by category.
    """

    reference: str
    suite: str
    sha256: str
    sampling: str
    top: int
    unscored: int
    overall: Part
    categories: dict[str, Part]

    def to_json(self) -> dict[str, Any]:
        """As it stands in `<arm>.divergence.json`: the fields of `overall` beside the others."""
        fields = self._asdict()
        fields |= fields.pop("overall")._asdict()
        return fields | {"categories": {name: found._asdict() for name, found in self.categories.items()}}


def compare_position(reference: Top, arm: Top) -> Position:
    """Two truncated distributions; both must hold at least their most likely token."""
    common = reference.keys() & arm.keys()
    p, q = ({token: math.exp(top[token]) for token in common} for top in (reference, arm))
    rest_p, rest_q = (max(1.0 - math.fsum(known.values()), RESOLUTION) for known in (p, q))
    terms = [p[token] * (reference[token] - arm[token]) for token in common]
    kl = math.fsum([*terms, rest_p * math.log(rest_p / rest_q)])
    # Below zero only by the rounding of the two rests.
    return Position(max(kl, 0.0), _likeliest(reference) == _likeliest(arm), rest_p)


def _likeliest(top: Top) -> int:
    """The most likely token; of several the first, as argmax has it."""
    return min(top, key=lambda token: (-top[token], token))


class Sums:
    """Sums over the tokens of one case."""

    def __init__(self) -> None:
        self.kl = self.agree = self.rest = 0.0
        self.tokens = 0

    def add(self, position: Position) -> None:
        """Count one token."""
        self.kl += position.kl
        self.agree += position.agree
        self.rest += position.rest
        self.tokens += 1


def mean(cases: Sequence[Sums]) -> Part:
    """Means over the tokens of these cases, of which there is at least one."""
    tokens = [case.tokens for case in cases]
    total = sum(tokens)
    kl, agree = [case.kl for case in cases], [case.agree for case in cases]
    return Part(
        kl=math.fsum(kl) / total,
        kl_se=ratio_error(kl, tokens),
        top1=math.fsum(agree) / total,
        top1_se=ratio_error(agree, tokens),
        rest=math.fsum(case.rest for case in cases) / total,
        tokens=total,
        cases=len(cases),
    )


def ratio_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of sum(sums) / sum(counts) over clusters (Cochran, Sampling Techniques, 1977, eq. 2.39).

    None where the clusters are too few.
    """
    n, total = len(sums), sum(counts)
    if stats.too_few(n):
        return None
    ratio = math.fsum(sums) / total
    residual = math.fsum((part - ratio * count) ** 2 for part, count in zip(sums, counts, strict=True))
    return math.sqrt(residual * n / (n - 1)) / total
