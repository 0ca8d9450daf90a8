"""The statistics of the matrix, from its record alone.

Everything is paired with the BF16 persona of the same base: same cases, same facts, same rows. Intervals are of 95 %
and over questions: one training of one seed stands behind each arm, so what another seed would give is not in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from qat.behavior import paired, stats
from qat.behavior.divergence import ratio_error
from qat.matrix import design

CONFIDENCE = 0.95
MARGIN = 0.03
"""Of equivalence of pass rates: the promise of the recipes' gate."""
RESAMPLES = 4000
FRAMES = ("chat", "dialogue")


class Difference(NamedTuple):
    """A difference with its interval.

    Attributes:
        value: Arm minus reference.
        low: Lower end.
        high: Upper end.
        p: Two-sided, unadjusted.
    """

    value: float
    low: float
    high: float
    p: float


class Row(NamedTuple):
    """One arm, measured against the BF16 persona of its base; differences are None for that persona itself.

    Attributes:
        arm: Its settings.
        passed: Pass rate on the suite.
        manners: Share of cases without a fault of manners.
        knowledge: Frame to share of facts known.
        kl: From the BF16 persona, nats a reply token.
        kl_se: Its standard error.
        top1: Top-1 agreement with it.
        d_passed: Difference of pass rates.
        d_knowledge: Frame to difference of facts known, clustered by subject.
        d_nats: Text to difference of -log p, nats a token, clustered by row.
        d_uneven: Fall of manners minus fall of knowledge in a chat: above 0, manners suffer more.
        chosen: Whether its learning rate is the one that validation chose; True where there was nothing to choose.
    """

    arm: design.Arm
    passed: stats.Rate
    manners: stats.Rate
    knowledge: dict[str, stats.Rate]
    kl: float
    kl_se: float
    top1: float
    d_passed: Difference | None
    d_knowledge: dict[str, Difference]
    d_nats: dict[str, Difference]
    d_uneven: Difference | None
    chosen: bool


def rows_of(record: Mapping[str, Any], base: str) -> list[Row]:
    """The measured arms of a base, in the order of the design; none where its BF16 persona was not measured."""
    results, shared = record["results"], record["shared"].get(base)
    reference = results.get(f"{base}/bf16")
    if shared is None or reference is None:
        return []
    arms = [arm for arm in design.arms_of(base) if arm.name in results]
    chosen = _chosen(results, arms)
    return [_row(arm, results[arm.name], reference, shared, arm in chosen) for arm in arms]


def _chosen(results: Mapping[str, Any], arms: Sequence[design.Arm]) -> set[design.Arm]:
    """Of every way of training the rate whose own validation went lowest: neither suite nor held-out replies chose."""
    best: dict[tuple[Any, ...], design.Arm] = {}
    for arm in arms:
        key = (arm.kind, arm.preset, arm.trains)
        if key not in best or _validation(results[arm.name]) < _validation(results[best[key].name]):
            best[key] = arm
    return set(best.values())


def _validation(result: Mapping[str, Any]) -> float:
    training = result["training"]
    return 0.0 if training is None else float(training["loop"]["best"])


def _row(
    arm: design.Arm, result: Mapping[str, Any], reference: Mapping[str, Any], shared: Mapping[str, Any], chosen: bool
) -> Row:
    cases, subjects = shared["cases"], shared["subjects"]
    divergence = result["divergence"]
    own = result is reference
    return Row(
        arm=arm,
        passed=_rate(result["passed"], cases),
        manners=_rate(result["manners"], cases),
        knowledge={frame: _rate(result["knowledge"][frame], subjects) for frame in FRAMES},
        kl=divergence["kl"],
        kl_se=divergence["kl_se"] or 0.0,
        top1=divergence["top1"],
        d_passed=None if own else difference(result["passed"], reference["passed"], cases),
        d_knowledge={}
        if own
        else {f: difference(result["knowledge"][f], reference["knowledge"][f], subjects) for f in FRAMES},
        d_nats={}
        if own
        else {
            text: _nats(found, reference["perplexity"][text], shared["tokens"][text])
            for text, found in result["perplexity"].items()
        },
        d_uneven=None
        if own
        else uneven(
            _falls(result["manners"], reference["manners"]),
            _falls(result["knowledge"]["chat"], reference["knowledge"]["chat"]),
            subjects,
        ),
        chosen=chosen,
    )


def _rate(digits: str, clusters: Sequence[str]) -> stats.Rate:
    outcomes = [stats.Outcome(name, digit == "1") for digit, name in zip(digits, clusters, strict=True)]
    return stats.rate(outcomes, CONFIDENCE)


def difference(arm: str, reference: str, clusters: Sequence[str]) -> Difference:
    """Paired difference of two rates given as texts of 0 and 1, with Tango's interval; `clusters` names the units."""
    pairs = [
        paired.Pair(name, one == "1", other == "1") for name, one, other in zip(clusters, arm, reference, strict=True)
    ]
    counts = paired.paired_counts(pairs)
    low, high = paired.tango_interval(counts, CONFIDENCE)
    p = 2 * stats.tail(abs(paired.tango_z(counts, 0.0)), counts.df)
    return Difference(counts.difference, low, high, min(1.0, p))


def _nats(arm: Sequence[float], reference: Sequence[float], tokens: Sequence[int]) -> Difference:
    """Difference of mean -log p a token; rows are the units (ratio estimator)."""
    sums = [one - other for one, other in zip(arm, reference, strict=True)]
    return normal(sum(sums) / sum(tokens), ratio_error(sums, tokens) or 0.0)


def normal(value: float, error: float) -> Difference:
    """A normal interval from a standard error."""
    half = stats.quantile(CONFIDENCE) * error
    p = 1.0 if error == 0 else 2 * stats.tail(abs(value) / error)
    return Difference(value, value - half, value + half, min(1.0, p))


def _falls(arm: str, reference: str) -> list[int]:
    return [int(other) - int(one) for one, other in zip(arm, reference, strict=True)]


def uneven(manners: Sequence[int], knowledge: Sequence[int], subjects: Sequence[str]) -> Difference:
    """Fall of manners minus fall of knowledge, with a bootstrap interval (percentiles).

    Args:
        manners: Fall of each case: 1 lost, -1 won, 0 the same.
        knowledge: Fall of each fact.
        subjects: Of each fact; facts of one subject are drawn together.

    Returns:
        In shares; `p` from the bootstrap's standard error.
    """
    rng = np.random.default_rng(design.SEED)
    cases = np.asarray(manners, dtype=float)
    names = sorted(set(subjects))
    place = {name: number for number, name in enumerate(names)}
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for fall, name in zip(knowledge, subjects, strict=True):
        sums[place[name]] += fall
        counts[place[name]] += 1
    drawn = rng.multinomial(len(cases), np.full(len(cases), 1 / len(cases)), size=RESAMPLES)
    units = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    resampled = drawn @ cases / len(cases) - (units @ sums) / (units @ counts)
    value = float(cases.mean() - sums.sum() / counts.sum())
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    error = float(resampled.std(ddof=1))
    return Difference(value, low, high, normal(value, error).p)


def holm(rows: Sequence[Row], field: str) -> dict[str, float]:
    """Adjusted p-values of `d_passed` or `d_uneven` over the family of a base: plain NVFP4 and the chosen arms."""
    found: dict[str, Difference] = {row.arm.name: getattr(row, field) for row in family(rows)}
    return paired.holm({name: each.p for name, each in found.items()})


def family(rows: Sequence[Row]) -> list[Row]:
    """The arms about which something is claimed."""
    return [row for row in rows if row.chosen and row.arm.kind not in ("base", "bf16")]


class Ratio(NamedTuple):
    """A ratio of two divergences; its interval takes them for independent, which is too wide: they share replies."""

    value: float
    low: float
    high: float


def ratio(row: Row, other: Row) -> Ratio:
    """KL of one arm over that of another, by the delta method on logarithms."""
    half = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * math.hypot(row.kl_se / row.kl, other.kl_se / other.kl)
    value = row.kl / other.kl
    return Ratio(value, value * math.exp(-half), value * math.exp(half))


class Test(NamedTuple):
    """One test of a hypothesis.

    Attributes:
        hypothesis: H1 to H5.
        where: Base and settings.
        figure: In words.
        verdict: `holds`, `refuted` (the interval lies on the other side) or `open`.
    """

    hypothesis: str
    where: str
    figure: str
    verdict: str


HYPOTHESES = {
    "H1": "plain NVFP4 of `all` layers diverges more than `nvidia-nano`",
    "H2": "distillation diverges less than plain NVFP4",
    "H3": "QAT by cross entropy diverges more than distillation",
    "H4": "a distilled arm passes the suite within 3 points of the BF16 persona",
    "H5": "FP4 costs more manners than knowledge",
}


def tests_of(rows: Sequence[Row]) -> list[Test]:
    """The tests laid down in docs/quality_matrix.md, on the chosen arms of one base."""
    chosen = {(row.arm.kind, row.arm.preset, row.arm.trains): row for row in family(rows)}
    found: list[Test] = []

    def compared(hypothesis: str, over: tuple[Any, ...], under: tuple[Any, ...], *, larger: bool) -> None:
        if over in chosen and under in chosen:
            each = ratio(chosen[over], chosen[under])
            above, below = each.low > 1, each.high < 1
            figure = f"KL ratio {each.value:.2f} [{each.low:.2f}, {each.high:.2f}]"
            found.append(Test(hypothesis, _where(chosen[over].arm), figure, _verdict(above, below, larger=larger)))

    compared("H1", ("ptq", "all", None), ("ptq", "nvidia-nano", None), larger=True)
    for preset in design.PRESETS:
        for trains in design.TRAINS:
            compared("H2", ("qad", preset, trains), ("ptq", preset, None), larger=False)
            compared("H3", ("qat", preset, trains), ("qad", preset, trains), larger=True)
    adjusted = holm(rows, "d_uneven") if chosen else {}
    for row in chosen.values():
        change, balance = row.d_passed, row.d_uneven
        if change is None or balance is None:
            continue
        if row.arm.kind == "qad":
            verdict = _verdict(change.low > -MARGIN, change.high < -MARGIN, larger=True)
            found.append(Test("H4", _where(row.arm), f"pass rate {points(change)}", verdict))
        sure = adjusted[row.arm.name] < 1 - CONFIDENCE
        verdict = _verdict(sure and balance.value > 0, sure and balance.value < 0, larger=True)
        figure = f"{points(balance)}, Holm p {adjusted[row.arm.name]:.2g}"
        found.append(Test("H5", _where(row.arm), figure, verdict))
    return sorted(found, key=lambda test: test.hypothesis)


def _verdict(above: bool, below: bool, *, larger: bool) -> str:
    if not above and not below:
        return "open"
    return "holds" if above == larger else "refuted"


def _where(arm: design.Arm) -> str:
    return ", ".join(part for part in (arm.kind, arm.preset, arm.trains) if part is not None)


def points(change: Difference) -> str:
    """In points: `-2.4 [-3.6, -1.3]`."""
    return f"{100 * change.value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
