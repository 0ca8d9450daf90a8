"""Measures what the statistics promise: how often intervals cover the truth, looks err, and drops are found.

Exact enumeration where the outcomes can be listed, simulation elsewhere; always of the shipped functions.
`scripts/measure_statistics.py` publishes the result as docs/benchmarks/statistics.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, multinomial

from qat.behavior import paired, power, stats
from qat.behavior.sequential import Look, confidence_at

Signs = NDArray[np.int_]
"""(cases, repeats) -> +1 gained, -1 lost, 0 the same."""

CONFIDENCE = 0.95
SIZES = (20, 50, 120, 300, 1000)
RATES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99)
CASES, REPEATS = (30, 60, 120), (3, 10)
CLUSTERED_RATES, CORRELATIONS = (0.8, 0.9, 0.95, 0.98), (0.1, 0.5, 0.9)
DROPS, FLIPS = (0.0, 0.03, 0.1), (0.005, 0.02, 0.05)


class Covered(NamedTuple):
    """Share of intervals that hold the truth: of the shipped one, and of one that takes every answer as independent."""

    shipped: float
    naive: float


def wilson_exact(n: int, rate: float) -> float:
    """Coverage of Wilson's interval, summed over every number of passes."""
    return float(sum(binom.pmf(k, n, rate) for k in range(n + 1) if _holds(_wilson(k, n), rate)))


def wilson_simulated(n: int, rate: float, runs: int, rng: np.random.Generator) -> float:
    """Coverage of `stats.rate` on drawn answers, one a case."""
    return float(np.mean([_holds(_wilson(int(k), n), rate) for k in rng.binomial(n, rate, runs)]))


@cache
def _wilson(passed: int, n: int) -> stats.Interval:
    found = stats.rate([stats.Outcome(str(i), i < passed) for i in range(n)], CONFIDENCE)
    assert found.low is not None and found.high is not None
    return stats.Interval(found.low, found.high)


def _holds(interval: stats.Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def tango_exact(n: int, gained: float, lost: float) -> float:
    """Coverage of Tango's interval, summed over every table of n single pairs.

    A truth lies in the interval where the score test does not reject it; tests hold that the two agree.
    """
    z, covered = stats.quantile(CONFIDENCE), 0.0
    most_lost, most_gained = (int(binom.ppf(1 - 1e-10, n, share)) for share in (lost, gained))
    for b, c in product(range(most_gained + 1), range(most_lost + 1)):
        if b + c <= n and abs(paired.tango_z(paired.PairedCounts(b, c, n), gained - lost)) <= z:
            covered += float(multinomial.pmf([b, c, n - b - c], n, [gained, lost, 1 - gained - lost]))
    return covered


def clustered_rate(
    cases: int, repeats: int, rate: float, correlation: float, runs: int, rng: np.random.Generator
) -> Covered:
    """Coverage of a rate over cases whose difficulty is beta-distributed, asked several times.

    Args:
        cases: Clusters.
        repeats: Answers a case.
        rate: True pass rate.
        correlation: Between two answers of one case, in (0, 1).
        runs: Simulated suites.
        rng: Source of randomness.
    """
    strength = (1 - correlation) / correlation
    hits = np.zeros(2)
    for _ in range(runs):
        passed = rng.binomial(repeats, rng.beta(rate * strength, (1 - rate) * strength, cases))
        rows = [stats.Outcome(str(case), turn < k) for case, k in enumerate(passed) for turn in range(repeats)]
        found = stats.rate(rows, CONFIDENCE)
        assert found.rate is not None and found.low is not None and found.high is not None
        naive = stats.wilson(found.rate, found.n, CONFIDENCE)
        hits += found.low <= rate <= found.high, _holds(naive, rate)
    return Covered(*(hits / runs))


def draw_signs(cases: int, repeats: int, drop: float, flips: float, averaged: bool, rng: np.random.Generator) -> Signs:
    """Paired answers under the model of `qat.behavior.power`: whole cases lost, and flips either way."""
    turns = rng.random((cases, repeats if averaged else 1))
    noise = np.where(turns < flips, -1, np.where(turns < 2 * flips, 1, 0))
    signs = np.where(rng.random((cases, 1)) < drop, -1, noise)
    return signs if averaged else np.repeat(signs, repeats, axis=1)


def counts_of(signs: Signs) -> paired.PairedCounts:
    """The shipped counts of drawn pairs."""
    return paired.paired_counts(
        [paired.Pair(str(c), s > 0, s < 0) for c, row in enumerate(signs.tolist()) for s in row]
    )


def clustered_difference(
    cases: int, repeats: int, drop: float, flips: float, runs: int, rng: np.random.Generator
) -> dict[str, float]:
    """Coverage of a paired difference with repeats: shipped, naive, and the percentile bootstrap over cases."""
    hits = np.zeros(3)
    for _ in range(runs):
        signs = draw_signs(cases, repeats, drop, flips, True, rng)
        found = counts_of(signs)
        gained, lost, n = int((signs > 0).sum()), int((signs < 0).sum()), signs.size
        low, high = _bootstrap(signs, rng)
        hits += (
            abs(paired.tango_z(found, -drop)) <= stats.quantile(CONFIDENCE, found.df),
            abs(paired.tango_z(paired.PairedCounts(gained, lost, n), -drop)) <= stats.quantile(CONFIDENCE),
            low <= -drop <= high,
        )
    return dict(zip(("shipped", "naive", "bootstrap"), (hits / runs).tolist(), strict=True))


def _bootstrap(signs: Signs, rng: np.random.Generator, draws: int = 400) -> tuple[float, float]:
    means = signs.mean(axis=1)
    chosen = rng.multinomial(len(means), np.full(len(means), 1 / len(means)), draws)
    low, high = np.quantile(chosen @ means / len(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    # Sums of thirds and tenths must not miss an end by rounding.
    return float(low) - 1e-9, float(high) + 1e-9


def wrong_passes(looks: int, fresh: bool, runs: int, rng: np.random.Generator, cases: int = 300) -> dict[str, float]:
    """How often "not worse by more than 3 points" is claimed at any look of a candidate exactly 3 points worse.

    Args:
        looks: Looks taken; the first claim ends the asking.
        fresh: Every look asks new cases; otherwise each adds a repeat of the same cases to all answers so far.
        runs: Simulated candidates.
        rng: Source of randomness.
        cases: In the suite.
    """
    margin, flips = 0.03, 0.05
    plans = {
        "fixed": lambda look: CONFIDENCE,
        "any number": lambda look: confidence_at(CONFIDENCE, Look(look)),
        "planned": lambda look: confidence_at(CONFIDENCE, Look(look, looks)),
    }
    claimed = dict.fromkeys(plans, 0)
    for _ in range(runs):
        signs = draw_signs(cases, looks, margin, flips, True, rng)
        open_plans = set(plans)
        for look in range(1, looks + 1):
            seen = draw_signs(cases, 1, margin, flips, True, rng) if fresh else signs[:, :look]
            found = counts_of(seen)
            p = paired.tost(found, margin).p_lower
            for name in [name for name in open_plans if p <= (1 - plans[name](look)) / 2]:
                claimed[name] += 1
                open_plans.remove(name)
    return {name: count / runs for name, count in claimed.items()}


def simulated_power(
    cases: int, repeats: int, drop: float, limit: float, assumed: power.Assumptions, runs: int, rng: np.random.Generator
) -> float:
    """Share of simulated suites in which the interval lies wholly below `limit`, or above it where nothing dropped."""
    hits = 0
    for _ in range(runs):
        found = counts_of(draw_signs(cases, repeats, drop, assumed.flips, assumed.averaged, rng))
        z = paired.tango_z(found, limit) * (-1 if drop else 1)
        hits += z >= stats.quantile(CONFIDENCE, found.df)
    return hits / runs


def measure(runs: int, seed: int) -> dict[str, Any]:
    """Every table of the page.

    Args:
        runs: Simulated suites per cell; a coverage of 95 % then has a standard error of 0.22 / sqrt(runs).
        seed: Of the simulation.
    """
    rng = np.random.default_rng(seed)
    return {
        "runs": runs,
        "seed": seed,
        "confidence": CONFIDENCE,
        "wilson": [
            {"n": n, "rate": p, "exact": wilson_exact(n, p), "simulated": wilson_simulated(n, p, 10 * runs, rng)}
            for n, p in product(SIZES, RATES)
        ],
        "tango": [
            {"n": n, "gained": f, "lost": f + d, "exact": tango_exact(n, f, f + d)}
            for n, d, f in product((50, 120, 300), DROPS, FLIPS)
        ],
        "clustered_rate": [
            {"cases": c, "repeats": m, "rate": p, "correlation": r, **clustered_rate(c, m, p, r, runs, rng)._asdict()}
            for c, m, p, r in product(CASES, REPEATS, CLUSTERED_RATES, CORRELATIONS)
        ],
        "clustered_difference": [
            {"cases": c, "repeats": m, "drop": d, "flips": f, **clustered_difference(c, m, d, f, runs, rng)}
            for c, m, d, f in product(CASES, REPEATS, DROPS, FLIPS)
        ],
        "looks": [
            {"looks": looks, "fresh": fresh, **wrong_passes(looks, fresh, runs, rng)}
            for looks, fresh in product((1, 2, 5), (True, False))
        ],
        "power": list(_power_rows(runs, rng)),
    }


def _power_rows(runs: int, rng: np.random.Generator, target: float = 0.8) -> Iterator[dict[str, Any]]:
    for flips, drop, repeats in product(FLIPS, (0.03, 0.05, 0.1), (1, 3)):
        assumed = power.Assumptions(flips, "", True)
        needed = power.cases_needed(repeats, drop, drop, target, assumed, CONFIDENCE)
        assert needed.detect is not None and needed.clear is not None
        yield {
            "flips": flips,
            "drop": drop,
            "repeats": repeats,
            "target": target,
            "detect": needed.detect,
            "detected": simulated_power(needed.detect, repeats, drop, 0.0, assumed, runs, rng),
            "clear": needed.clear,
            "cleared": simulated_power(needed.clear, repeats, 0.0, -drop, assumed, runs, rng),
        }


def page(found: dict[str, Any]) -> str:
    """The measurements as Markdown.

    Args:
        found: What `measure` gave, with `command`, `seconds` and `environment`.
    """
    gaps = [abs(row["exact"] - row["simulated"]) for row in found["wilson"]]
    exact = [row["exact"] for row in found["wilson"]]
    parts = [
        f"# Statistics\n\n`{found['command']}`, {found['environment']}, {found['seconds']:.0f} s. Raw numbers: "
        f"[statistics.json](statistics.json). {found['runs']:,} simulated suites per cell, seed {found['seed']}; "
        "coverage in percent of 95 % intervals.",
        "## One answer a case: Wilson\n\nExact coverage, summed over every number of passes. Its mean over this "
        f"grid is {_pct(sum(exact) / len(exact))} %, its least value {_pct(min(exact))} %; `stats.rate` on "
        f"{10 * found['runs']:,} drawn suites per cell differs from it by {100 * max(gaps):.2f} points at most.",
        _grid(found["wilson"], "n", ("rate",), "exact"),
        _bar("## Cases asked several times: rates", found["clustered_rate"], ("shipped", "naive")),
        "Shipped / every answer taken as independent. Rows: cases x repeats; columns: pass rate, correlation of two "
        "answers of one case. The shipped interval errs on the wide side: how alike the answers of a case are is not "
        "known from a few failing cases.",
        _grid(found["clustered_rate"], ("cases", "repeats"), ("rate", "correlation"), "shipped", "naive"),
        _bar("## Paired differences, one answer a case: Tango", found["tango"], ("exact",)),
        "Exact, over every table of n pairs. Columns: share lost, share gained.",
        _grid(found["tango"], "n", ("lost", "gained"), "exact"),
        _bar("## Paired differences with repeats", found["clustered_difference"], ("shipped", "naive", "bootstrap")),
        "Shipped / every answer taken as independent / percentile bootstrap over cases. Columns: drop (whole cases "
        "lost), flips each way.",
        _grid(found["clustered_difference"], ("cases", "repeats"), ("drop", "flips"), "shipped", "naive", "bootstrap"),
        "## Looking again\n\nA candidate exactly 3 points worse, 300 cases, gate at 3 points, asked until it passes: "
        "share that passes at any look, in percent; 2.5 are promised. *Fresh* looks ask new cases, *added* ones a "
        "further repeat of the same.",
        _table(
            ["looks", "answers", "95 % at every look", "`--look k`", "`--look k --looks n`"],
            [[str(r["looks"]), "fresh" if r["fresh"] else "added",
              *(_pct(r[plan]) for plan in ("fixed", "any number", "planned"))] for r in found["looks"]],
        ),
        "## Power\n\nCases that `qat test --power` asks for, and how often simulated suites of that size show the drop "
        f"or pass unchanged; {_pct(found['power'][0]['target'])} % were asked for. Least: "
        f"{_pct(min(min(r['detected'], r['cleared']) for r in found['power']))} %.",
        _table(
            ["flips each way", "drop", "repeats", "cases to show it", "shown, %", "to pass unchanged", "passed, %"],
            [[f"{r['flips']:g}", f"{r['drop']:g}", str(r["repeats"]), str(r["detect"]), _pct(r["detected"]),
              str(r["clear"]), _pct(r["cleared"])] for r in found["power"]],
        ),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _bar(title: str, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    texts = []
    for name in names:
        values = [row[name] for row in rows]
        texts.append(f"{name}: least {_pct(min(values))} %, mean {_pct(sum(values) / len(values))} %")
    return f"{title}\n\n{'; '.join(texts)}."


def _grid(rows: Sequence[dict[str, Any]], down: str | Sequence[str], across: Sequence[str], *values: str) -> str:
    down = (down,) if isinstance(down, str) else down
    columns = list(dict.fromkeys(tuple(row[name] for name in across) for row in rows))
    lines: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        lines.setdefault(tuple(row[n] for n in down), []).append(" / ".join(_pct(row[v]) for v in values))
    heads = [" x ".join(down), *(", ".join(f"{value:g}" for value in column) for column in columns)]
    return _table(heads, [[" x ".join(map(str, key)), *cells] for key, cells in lines.items()])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows))


def _pct(share: float) -> str:
    return f"{100 * share:.1f}"
