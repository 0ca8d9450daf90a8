"""A verdict as Markdown, for the comment on a pull request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qat.behavior.sequential import wrong_claims

MAX_LISTED = 20
"""Flips listed by name; a comment is read by people, the rest stands in verdict.json."""
_ICONS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "❔"}


def markdown(verdict: Mapping[str, Any]) -> str:
    """The summary of one verdict.

    Args:
        verdict: The content of verdict.json.
    """
    suite, gate, decision = verdict["suite"], verdict["gate"], verdict["verdict"]
    parts = [
        f"## {_ICONS[decision]} {decision}: {_cell(gate['candidate'])} on {_cell(suite['name'])} {suite['version']}",
        "\n".join(f"- {_line(reason)}" for reason in verdict["reasons"]),
        _arms(verdict),
        _comparisons(verdict["comparisons"]),
        *_categories(verdict),
        *_flips(verdict["comparisons"], gate),
        _footnote(verdict),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _arms(verdict: Mapping[str, Any]) -> str:
    rows = [
        [name, _rate(arm["overall"]), str(arm["overall"]["n"]), str(arm["errors"]), arm["overall"]["method"] or "--"]
        for name, arm in verdict["arms"].items()
    ]
    return _table(["arm", "pass rate, %", "n", "errors", "interval"], rows)


def _comparisons(comparisons: Sequence[Mapping[str, Any]]) -> str:
    if not comparisons:
        return ""
    rows = [
        [
            f"{row['arm']} − {row['reference']}",
            points(row),
            str(row["pairs"]),
            f"{len(row['flips_worse'])} / {len(row['flips_better'])}",
            f"{self_flips(row['self_flips'])} / {self_flips(row['reference_self_flips'])}",
            "--" if row["p_mcnemar"] is None else f"{row['p_mcnemar']:.2g} ({row['p_holm']:.2g})",
            "--"
            if row["equivalent"] is None
            else f"{'yes' if row['equivalent'] else 'not shown'} within {100 * row['margin']:g}",
        ]
        for row in comparisons
    ]
    columns = ["paired", "difference, points", "pairs", "lost / won", "flips against itself, arm / reference",
               "McNemar p (Holm)", "equivalent"]  # fmt: skip
    return _table(columns, rows)


def points(row: Mapping[str, Any]) -> str:
    """Difference and interval in percentage points, or `too few`."""
    if row["difference"] is None:
        return "too few"
    return f"{100 * row['difference']:+.1f} ({100 * row['ci_low']:+.1f} to {100 * row['ci_high']:+.1f})"


def self_flips(found: Mapping[str, Any] | None) -> str:
    """The flip rate of an arm against itself, or `--` where it was not asked twice."""
    if found is None:
        return "--"
    return f"{found['flips']} of {found['pairs']}"


def _categories(verdict: Mapping[str, Any]) -> list[str]:
    candidate = verdict["gate"]["candidate"]
    compared = next((row for row in verdict["comparisons"] if row["arm"] == candidate), None)
    changes = {} if compared is None else {change["category"]: change for change in compared["categories"]}
    rows = []
    for name, rate in verdict["arms"][candidate]["categories"].items():
        change = changes.get(name)
        rows.append(
            [
                name,
                _rate(rate),
                str(rate["n"]),
                "--" if change is None else points(change),
                "--" if change is None else f"{change['worse']} / {change['better']}",
                "--" if change is None else f"{change['p_holm']:.2g}",
            ]
        )
    columns = ["category", "pass rate, %", "n", "difference, points", "lost / won", "p (Holm)"]
    return [_folded(f"Categories of {candidate}", _table(columns, rows))]


def _flips(comparisons: Sequence[Mapping[str, Any]], gate: Mapping[str, Any]) -> list[str]:
    row = next((row for row in comparisons if row["arm"] == gate["candidate"]), None)
    if row is None or not (row["flips_worse"] or row["flips_better"]):
        return []
    lines = [f"{what}: {_names(row[key])}" for what, key in (("Lost", "flips_worse"), ("Won", "flips_better"))]
    return [_folded(f"Flips against {row['reference']}", "\n\n".join(lines))]


def _names(cases: Sequence[str]) -> str:
    shown = ", ".join(f"`{_cell(case)}`" for case in cases[:MAX_LISTED]) or "none"
    return shown + (f" and {len(cases) - MAX_LISTED} more" if len(cases) > MAX_LISTED else "")


def _footnote(verdict: Mapping[str, Any]) -> str:
    gate, look = verdict["gate"], verdict["look"]
    percent = f"{100 * look['confidence']:.4g} %"
    if look["number"] is None:
        single, five = (100 * wrong_claims(gate["confidence"], looks) for looks in (1, 5))
        looked = (
            f"Judged as the only look at this candidate; a wrong PASS has a chance of {single:.3g} % at most, "
            f"and of {five:.3g} % where it is asked afresh until one of five looks passes."
        )
    else:
        plan = "any number may follow" if look["planned"] is None else f"{look['planned']} were planned"
        looked = f"Look {look['number']} ({plan}); all looks together hold {100 * gate['confidence']:.4g} %."
    return (
        f"<sub>Intervals: {percent}, two-sided; rates by Wilson, paired differences by Tango, answers of one case "
        f"counted as one cluster; those of categories are not adjusted for their number. {looked} "
        f"Suite {verdict['suite']['sha256'][:12]}.</sub>"
    )


def _rate(rate: Mapping[str, Any]) -> str:
    if rate["rate"] is None:
        return f"too few ({rate['passed']} of {rate['n']})"
    return f"{100 * rate['rate']:.1f} ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in lines)


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{_cell(title)}</summary>\n\n{content}\n\n</details>"


def _cell(text: str) -> str:
    """Text of a suite or a server, which must not close a table or start a tag."""
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
