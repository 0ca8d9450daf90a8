"""The page: numbers of the run folder, formatted, put into one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from qat.report import charts
from qat.report.collect import Contents, Curve, Log, collect
from qat.storage import write_atomic

TEMPLATES = Path(__file__).resolve().parent / "templates"
MISSING = "–"

_SENTENCES = {
    "PASS": "The candidate may be shipped.",
    "FAIL": "The candidate must not be shipped.",
    "INCONCLUSIVE": "The evidence does not decide; more cases or seeds are needed.",
}
_QUANTITIES = {"loss": "loss, nats a token", "kl": "KL to BF16, nats a token"}


class ArmRow(NamedTuple):
    """One line of the arms table, formatted."""

    name: str
    kind: str
    role: str
    bar: Markup
    rate: str
    n: str
    errors: int | None
    interval: str
    difference: str
    difference_interval: str
    kl: str
    suite_kl: str
    top1: str
    other_experts: str
    size: str
    seconds: str
    note: str


class StageRow(NamedTuple):
    """One line of the stages table; `share` is of the longest stage, in percent."""

    name: str
    status: str
    seconds: str
    share: float
    memory: str


class Figure(NamedTuple):
    """A chart with its caption; the legend names the series in drawing order."""

    title: str
    svg: Markup
    legend: list[str]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder.

    Args:
        run_dir: The folder of one run; parts that are not there yet are named in the report.

    Returns:
        The path of the report.

    Raises:
        UserError: The folder is no run folder, or cannot be written.
    """
    path = run_dir / "report.html"
    write_atomic(path, render_page(collect(run_dir)))
    return path


def render_page(contents: Contents) -> str:
    """The HTML text; everything from the run is escaped."""
    decision = str(contents.verdict.get("verdict", "NO VERDICT"))
    template = environment().get_template("report.html.j2")
    return template.render(
        run=contents,
        decision=decision,
        sentence=_SENTENCES.get(decision, "The suite has not been judged yet."),
        arms=[_arm_row(contents, arm) for arm in contents.arms],
        samplings=_sampling_table(contents),
        categories=_category_table(contents),
        comparisons=[_comparison_row(row) for row in contents.verdict.get("comparisons", ())],
        figures=[figure for log in contents.logs for figure in _figures(log)],
        lengths=length_chart(contents.audit),
        stages=_stage_rows(contents),
        total=duration(sum(record.get("seconds") or 0.0 for record in contents.stages.values())),
        outputs=_outputs(contents),
    )


def environment() -> jinja2.Environment:
    """The templates' environment: everything is escaped."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        # A file of another version may lack a key: that cell stays empty.
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(percent=percent)
    return made


def percent(value: object, digits: int = 1) -> str:
    """A share as a percentage, a dash where it is unknown."""
    return f"{100 * value:.{digits}f} %" if isinstance(value, int | float) else MISSING


def points(value: float | None) -> str:
    """A difference of shares in percentage points, signed."""
    return MISSING if value is None else f"{100 * value:+.1f}".replace("-", "−")


def number(value: float | None, digits: int = 3) -> str:
    """A number with significant digits, a dash where it is unknown."""
    return MISSING if value is None else f"{value:.{digits}g}"


def duration(seconds: float | None) -> str:
    """Seconds as `45 s`, `3 min 05 s` or `2 h 03 min`."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: int | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return MISSING
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}" if count < 1000 * factor else f"{count / factor:,.0f} {unit}"
    return f"{count} B"


def _arm_row(contents: Contents, arm: Mapping[str, Any]) -> ArmRow:
    name = arm["name"]
    rate = contents.verdict.get("arms", {}).get(name, {}).get("overall") or {}
    known = rate.get("rate") is not None and rate.get("low") is not None and rate.get("high") is not None
    errors = contents.verdict.get("arms", {}).get(name, {}).get("errors")
    comparison: Mapping[str, Any] = next(
        (row for row in contents.verdict.get("comparisons", ()) if row.get("arm") == name), {}
    )
    drift = contents.divergence.get(name) or {}
    router = drift.get("router") or {}
    stage = contents.stages.get(f"behavior/{name}", {})
    on_suite = stage.get("notes", {}).get("divergence") or {}
    low, high = comparison.get("ci_low"), comparison.get("ci_high")
    roles = [role for role in ("candidate", "reference") if contents.gate.get(role) == name]
    return ArmRow(
        name=name,
        kind=" ".join(str(arm[key]) for key in ("kind", "preset") if arm.get(key)),
        role=", ".join(roles),
        bar=charts.rate_bar(rate, contents.gate.get("pass_floor")) if known else Markup(""),
        rate=percent(rate.get("rate")),
        n=str(rate.get("n", MISSING)),
        errors=errors if isinstance(errors, int) else None,
        interval=f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f}" if known else "",
        difference=points(comparison.get("difference")),
        difference_interval="" if low is None or high is None else f"{points(low)} to {points(high)}",
        kl=MISSING if drift.get("kl") is None else f"{drift['kl']:.4f}",
        suite_kl="" if on_suite.get("kl") is None else f"{on_suite['kl']:.4f}",
        top1=percent(drift.get("top1")),
        other_experts="" if router.get("changed") is None else percent(router["changed"]),
        size=size(contents.sizes.get(name)),
        seconds=duration(stage.get("seconds")),
        note=str(rate.get("reason") or comparison.get("reason") or ""),
    )


def _sampling_table(contents: Contents) -> list[tuple[str, list[tuple[str, Mapping[str, Any] | None]]]]:
    """Rows of (sampling, [(arm, rate)]); empty where only one sampling was asked."""
    arms = contents.verdict.get("arms", {})
    names = list(dict.fromkeys(name for rates in arms.values() for name in rates.get("samplings", {})))
    if len(names) < 2:
        return []
    return [(name, [(arm, rates.get("samplings", {}).get(name)) for arm, rates in arms.items()]) for name in names]


def _category_table(contents: Contents) -> list[tuple[str, list[tuple[str, Mapping[str, Any] | None]]]]:
    arms = contents.verdict.get("arms", {})
    names = sorted({name for rates in arms.values() for name in rates.get("categories", {})})
    return [(name, [(arm, rates.get("categories", {}).get(name)) for arm, rates in arms.items()]) for name in names]


def _comparison_row(row: Mapping[str, Any]) -> dict[str, Any]:
    equivalent = row.get("equivalent")
    return {
        "arm": row.get("arm"),
        "reference": row.get("reference"),
        "pairs": row.get("pairs"),
        "worse": len(row.get("flips_worse") or ()),
        "better": len(row.get("flips_better") or ()),
        "difference": points(row.get("difference")),
        "self_flips": _self_flips(row.get("self_flips")),
        "reference_self_flips": _self_flips(row.get("reference_self_flips")),
        "p_mcnemar": number(row.get("p_mcnemar"), 2),
        "p_holm": "" if row.get("p_holm") is None else number(row["p_holm"], 2),
        "tost_p": number(row.get("tost_p"), 2),
        "margin": points(row.get("margin")).lstrip("+"),
        "equivalent": "too few" if equivalent is None else "yes" if equivalent else "not shown",
    }


def _self_flips(found: Mapping[str, Any] | None) -> tuple[str, str]:
    """How often an arm disagrees with itself, and the rate with its interval; dashes where it was not asked twice."""
    if not found:
        return MISSING, ""
    count = f"{found.get('flips')} of {found.get('pairs')}"
    if found.get("rate") is None:
        return count, str(found.get("reason") or "")
    return count, f"{percent(found['rate'])}, {100 * found['low']:.1f} to {100 * found['high']:.1f}"


def _figures(log: Log) -> list[Figure]:
    """Loss of training and validation in one chart, KL in its own: they have different units."""
    charted: Sequence[tuple[str, list[tuple[str, str]]]] = (
        ("loss", [("training", "loss"), ("validation", "eval_loss")]),
        ("kl", [("validation", "kl")]),
    )
    figures = []
    for quantity, series in charted:
        curves: list[tuple[str, Curve]] = [(label, log.curves[key]) for label, key in series if key in log.curves]
        if curves:
            title = f"{log.stage}: {'loss' if quantity == 'loss' else 'KL'}"
            drawn = charts.line_chart(curves, _QUANTITIES[quantity])
            figures.append(Figure(title, drawn, [label for label, _ in curves]))
    return figures


def length_chart(audit: Mapping[str, Any]) -> Markup | None:
    """The lengths of the audit's rows as a histogram; None where it has none."""
    bins = (audit.get("lengths") or {}).get("histogram")
    return charts.histogram(bins, audit.get("max_length")) if bins else None


def _stage_rows(contents: Contents) -> list[StageRow]:
    longest = max((record.get("seconds") or 0.0 for record in contents.stages.values()), default=0.0)
    return [
        StageRow(
            name=name,
            status=str(record.get("status", MISSING)),
            seconds=duration(record.get("seconds")),
            share=100 * (record.get("seconds") or 0.0) / longest if longest else 0.0,
            memory=MISSING if record.get("peak_rss_mb") is None else f"{record['peak_rss_mb']:,.0f} MB",
        )
        for name, record in contents.stages.items()
    ]


def _outputs(contents: Contents) -> list[tuple[str, str]]:
    """Path and SHA-256 of everything that the stages made."""
    return [
        (path, str(digest))
        for record in contents.stages.values()
        for path, digest in (record.get("outputs") or {}).items()
    ]
