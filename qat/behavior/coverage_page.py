"""The statistics page: the measurements of `qat.behavior.coverage` as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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
        f"{10 * found['runs']:,} drawn suites per cell differs from it by {100 * max(gaps):.2f} points at most. Close "
        f"to 100 % there are rates at which it covers less, whatever n: least over all rates, n = {_least(found)}.",
        _grid(found["wilson"], "n", ("rate",), "exact"),
        *_edges(found),
        _bar("## Cases asked several times: rates", found["clustered_rate"], ("shipped", "naive")),
        "Shipped / every answer taken as independent. Rows: cases x repeats; columns: pass rate, correlation of two "
        "answers of one case. The shipped interval errs on the wide side: how alike the answers of a case are is not "
        "known from a few failing cases.",
        _grid(found["clustered_rate"], ("cases", "repeats"), ("rate", "correlation"), "shipped", "naive"),
        "### Cases that do not count alike\n\nErrors leave some cases fewer answers, and suites may weigh cases. "
        "Coverage; two answers of one case correlate by 0.5, columns: pass rate. Where a tenth of the cases carries "
        "half of the weight, an interval is that of a few cases and covers as little as "
        f"{_pct(min(row['covered'] for row in found['uneven_rate']))} %.",
        _grid(found["uneven_rate"], ("layout", "cases"), ("rate",), "covered"),
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
        "## Every night against one baseline\n\nA served model judged each of 30 nights against one stored baseline "
        "(floor 90 %, drop 3 points); the reference passes 95 %, two runs of one model differ in 3.8 % of the cases. "
        "Shares in percent, of nights, and of baselines that saw at least one such night. A verdict of one night errs "
        "as promised; over a month one lucky night is likely, so what counts is the share of nights, or `--look` where "
        "any single PASS would release the model.",
        _table(
            ["cases", "truly worse by, points", "PASS", "FAIL", "a PASS in 30 nights", "a FAIL in 30 nights",
             "a PASS, night k as `--look k`"],
            [[str(r["cases"]), f"{100 * r['drop']:g}",
              *(_pct(r[key]) for key in ("pass", "fail", "ever_pass", "ever_fail", "ever_pass_look"))]
             for r in found["nightly"]],
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


def _least(found: dict[str, Any]) -> str:
    return ", ".join(f"{row['n']}: {_pct(row['least'])} %" for row in found["wilson_least"])


def _edges(found: dict[str, Any]) -> list[str]:
    """What the gate gets wrong about a candidate that stands exactly at its limit."""
    floors, drops = found["floor_errors"], found["drop_errors"]
    worst = max(max(row["passed"], row["failed"]) for row in floors)
    return [
        "### At the edge of the floor\n\nThe true rate is the floor: chance of a wrong PASS / of a wrong FAIL / of a "
        "wrong FAIL by Wilson's interval alone, in percent, exact. 2.5 are promised; the gate calls a floor reached or "
        f"missed only where the exact interval agrees, and errs in {_pct(worst)} % at most. Columns: floor.",
        _grid(floors, "n", ("floor",), "passed", "failed", "wilson_failed"),
        "### At the edge of the drop\n\nThe candidate is worse by exactly the allowed drop: chance of a wrong PASS / "
        f"of a wrong FAIL, in percent, exact. Wrong passes {_pct(max(r['passed'] for r in drops))} % at most, wrong "
        f"failures {_pct(max(r['failed'] for r in drops))} %. Columns: drop, flips each way.",
        _grid(drops, "n", ("max_drop", "flips"), "passed", "failed"),
    ]


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
