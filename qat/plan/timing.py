"""Seconds of a step: what has to be done, over what a GPU does of it, by factors fitted to measured steps.

    seconds = max(issuing, working)
    issuing = issue_block * block_passes + issue_weight * weight_passes
    working = flops / (PRODUCTS * peak)                      products and scans
            + streamed / bandwidth                           base weights, once a pass
            + making * made / bandwidth                      effective and rounded weights, and their gradients
            + activating * activations / bandwidth           activations

The processor issues kernels while the GPU works on earlier ones, so the slower of the two sets the pace. Four factors
are fitted (least squares of the logarithms, so that every case counts by its relative error), to steps measured on one
kind of GPU; on another its data sheet's peak and bandwidth take their place, and the issuing times stay. How much of
the peak products reach is measured by itself and not fitted: operations and activations grow together, and steps alone
cannot tell them apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from qat.plan.gpus import GPUS, Gpu
from qat.plan.shape import CARDS
from qat.plan.work import Network, Step, Work, read_network

MEASURED = Path(__file__).resolve().parent / "measured.json"
PRODUCTS = 790 / 989
"""Share of the data sheet's peak that a BF16 product of 8192 x 8192 x 8192 reached on an H200 (torch 2.11.0+cu130)."""
OPTIMIZER = 36.0
"""Bytes a trainable number and step: AdamW reads and writes factor, gradient and two moments; the norm reads again."""
_STARTS = (
    (1e-3, 2e-4, 2.0, 1.0),
    (2e-3, 5e-4, 1.0, 2.0),
    (1e-3, 5e-4, 2.0, 4.0),
    (3e-3, 1e-3, 2.0, 4.0),
    (6e-3, 2e-3, 1.0, 8.0),
)


class Case(NamedTuple):
    """One measured step.

    Attributes:
        name: Model and adapter in words.
        way: Whose code: `qat`, or `transformers` with PEFT; each has factors of its own.
        gpu: Name in `GPUS`.
        model: Hub id of the model whose card gives the sizes.
        layers: Only the first so many layers; None for all.
        batch: Rows.
        length: Tokens of a row.
        checkpointing: With gradient checkpointing.
        targets: Of the adapter.
        rank: Of the adapter.
        route: How weights with an adapter were computed (`qat.plan.work`); None: by a low-rank product on the tokens,
            which for the few that attention has costs next to nothing.
        rounded: Experts and linears are rounded to four bits in the forward.
        teacher: The step holds a teacher's forward too.
        logits: `whole`: of all positions at once; `pieces`: as `qat.train.objective` makes them.
        optimizer: The optimizer's step is in the seconds.
        seconds: Of a forward and backward.
        peak_gib: Peak memory of the GPU; None where it was not written down.
        source: Where and with what it was measured.
        memory: How base weights are kept: `bf16` or `nvfp4`.
    """

    name: str
    way: str
    gpu: str
    model: str
    layers: int | None
    batch: int
    length: int
    checkpointing: bool
    targets: tuple[str, ...]
    rank: int
    route: str | None
    rounded: bool
    teacher: bool
    logits: str
    optimizer: bool
    seconds: float
    peak_gib: float | None
    source: str
    memory: str = "bf16"


class Factors(NamedTuple):
    """What is fitted.

    Attributes:
        issue_block: Seconds to issue the kernels of one block in one pass.
        issue_weight: The same for one expert weight's adapter or rounding.
        making: Times the least traffic of adapters and rounding.
        activating: Times the counted traffic that activations take.
    """

    issue_block: float
    issue_weight: float
    making: float
    activating: float


class Error(NamedTuple):
    """A measured case against the estimate of a model that never saw it.

    Attributes:
        case: The case.
        seconds: Estimated with factors fitted to all other cases.
        relative: (estimated - measured) / measured.
    """

    case: Case
    seconds: float
    relative: float


def seconds(work: Work, gpu: Gpu, factors: Factors) -> float:
    """Time of a step; see the module's text."""
    issuing = factors.issue_block * work.block_passes + factors.issue_weight * work.weight_passes
    moving = work.streamed + factors.making * work.made + factors.activating * work.activations
    return max(issuing, work.flops / (PRODUCTS * gpu.flops) + moving / gpu.bandwidth)


def fit(samples: Sequence[tuple[Work, Gpu, float]]) -> Factors:
    """Fit the factors to measured steps.

    Args:
        samples: What was to be done, on what, in how many seconds.

    Returns:
        The factors with the least sum of squared logarithms of estimate / measured.
    """
    import numpy as np
    from scipy.optimize import least_squares

    def residuals(logs: Any) -> list[float]:
        factors = Factors(*np.exp(logs))
        return [math.log(seconds(work, gpu, factors) / measured) for work, gpu, measured in samples]

    # Where a case changes sides of the maximum the slope jumps, so one start may end in a neighbouring valley.
    best = min((least_squares(residuals, np.log(start)) for start in _STARTS), key=lambda found: float(found.cost))
    return Factors(*(float(value) for value in np.exp(best.x)))


def load_cases(path: Path = MEASURED) -> list[Case]:
    """Read measured cases."""
    return [Case(**{**row, "targets": tuple(row["targets"])}) for row in json.loads(path.read_text(encoding="utf-8"))]


def own_cases() -> list[Case]:
    """The measured steps of this package's own training, which is what a recipe runs."""
    return [case for case in load_cases() if case.way == "qat"]


def timed_cases() -> list[Case]:
    """The measured steps on a BF16 base: what unpacking another one takes is not in the time model."""
    return [case for case in load_cases() if case.memory == "bf16"]


def case_config(case: Case) -> dict[str, Any]:
    """The sizes of a case's model: of its card, cut to the case's layers."""
    card = CARDS / f"{case.model.replace('/', '--')}.json"
    config: dict[str, Any] = json.loads(card.read_text(encoding="utf-8"))["config"]
    if case.layers is not None:
        config["hybrid_override_pattern"] = config["hybrid_override_pattern"][: case.layers]
    return config


def case_work(case: Case, network: Network) -> Work:
    """What a case's step had to do."""
    tokens = case.batch * case.length
    adapted = {weight.name for weight in network.named(case.targets)} if case.route else set()
    rounded = {weight.name for weight in network.weights if weight.target} if case.rounded else set()
    logits = "divergence" if case.teacher else case.logits
    shape = (tokens, case.length, tokens, case.checkpointing)
    work = network.work(Step(*shape, adapted, case.route or "formed", rounded, logits=logits))
    if case.optimizer:
        trainable = sum(weight.factors(case.rank) for weight in network.named(case.targets))
        work = work._replace(streamed=work.streamed + OPTIMIZER * trainable)
    if not case.teacher:
        return work
    asked = network.work(Step(tokens, case.length, 0, backward=False))
    return Work(*(own + other for own, other in zip(work, asked, strict=True)))


def samples_of(cases: Sequence[Case]) -> list[tuple[Work, Gpu, float]]:
    """What `fit` takes, of measured cases."""
    return [(case_work(case, read_network(case_config(case))), GPUS[case.gpu], case.seconds) for case in cases]


def leave_one_out(cases: Sequence[Case]) -> list[Error]:
    """Estimate every case from all others of its way."""
    samples = samples_of(cases)
    found = []
    for index, (case, (work, gpu, measured)) in enumerate(zip(cases, samples, strict=True)):
        others = [samples[other] for other in range(len(cases)) if other != index and cases[other].way == case.way]
        estimated = seconds(work, gpu, fit(others))
        found.append(Error(case, estimated, estimated / measured - 1))
    return found


@lru_cache(maxsize=1)
def shipped_factors() -> Factors:
    """The factors fitted to the measured steps of this package's own training."""
    return fit(samples_of(_own_timed()))


@lru_cache(maxsize=1)
def shipped_error() -> float:
    """The largest leave-one-out error among them, relative."""
    return max(abs(error.relative) for error in leave_one_out(_own_timed()))


def _own_timed() -> list[Case]:
    return [case for case in timed_cases() if case.way == "qat"]


def measured_gpus() -> Mapping[str, int]:
    """How many of them were measured on each GPU."""
    counts: dict[str, int] = {}
    for case in _own_timed():
        counts[case.gpu] = counts.get(case.gpu, 0) + 1
    return counts
