"""Charts as inline SVG; colours and fonts come from the page's style sheet, so that dark mode and print work.

Coordinates are user units of the `viewBox`; the pictures scale with the page. Every text goes through markupsafe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from qat.report.collect import Curve

_WIDTH, _HEIGHT = 560.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 14.0, 14.0, 40.0
_LOG_RATIO = 100.0
_THINNED = 400

_DOT = Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}: step {:g}, {:.4g}</title></circle>')
_BAR = Markup(
    '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{} to {} tokens: {}</title></rect>'
)
_CHART = Markup('<svg class="chart" viewBox="0 0 {:g} {:g}" role="img"><title>{}</title>{}</svg>')


class Scale(NamedTuple):
    """From values to coordinates, linear or logarithmic, with the values of its grid lines."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Coordinate of a value."""
        bend = math.log10 if self.logarithmic else float
        share = (bend(value) - bend(self.low)) / (bend(self.high) - bend(self.low))
        return self.start + share * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) that cover [low, high] with about `count` steps."""
    if not high > low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _value_scale(values: Sequence[float]) -> Scale:
    """Vertical scale: logarithmic where all values are positive and span a factor of 100, else linear from zero."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= _LOG_RATIO:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [10.0**power for power in powers]
        return Scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP, ticks, logarithmic=True)
    ticks = nice_ticks(min(low, 0.0), high)
    return Scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP, ticks)


def line_chart(curves: Sequence[tuple[str, Curve]], quantity: str) -> Markup:
    """Draw curves over training steps.

    Args:
        curves: Label and curve, at least one with at least one point; drawn as series 1, 2, … of the style sheet.
        quantity: What the vertical axis shows, with its unit.

    Returns:
        An SVG element with a title for screen readers.
    """
    values = [value for _, curve in curves for value in curve.values if math.isfinite(value)]
    steps = [step for _, curve in curves for step in curve.steps]
    if not values:
        return Markup('<p class="missing">no finite value was logged</p>')
    vertical = _value_scale(values)
    first, last = min(0.0, *steps), max(1.0, *steps)
    inside = [tick for tick in nice_ticks(first, last) if first <= tick <= last]
    horizontal = Scale(first, last, _LEFT, _WIDTH - _RIGHT, inside)
    parts = [_grid(horizontal, vertical, quantity, "step")]
    for number, (label, curve) in enumerate(curves, start=1):
        points = [(x, y) for x, y in _thin(curve) if math.isfinite(y) and not (vertical.logarithmic and y <= 0)]
        path = " ".join(f"{horizontal(x):.1f},{vertical(y):.1f}" for x, y in points)
        parts.append(Markup('<polyline class="line s{}" points="{}"/>').format(number, path))
        if len(points) <= 40:
            parts += [_DOT.format(number, horizontal(x), vertical(y), label, x, y) for x, y in points]
    title = f"{quantity}: {', '.join(label for label, _ in curves)}"
    return _CHART.format(_WIDTH, _HEIGHT, title, Markup("").join(parts))


def _thin(curve: Curve) -> list[tuple[float, float]]:
    """Every n-th point, the last one always: an SVG of 10,000 points helps nobody."""
    points = list(zip(curve.steps, curve.values, strict=True))
    stride = max(1, len(points) // _THINNED)
    return points[::stride] + ([points[-1]] if (len(points) - 1) % stride else [])


def _grid(horizontal: Scale, vertical: Scale, quantity: str, along: str) -> Markup:
    parts = []
    for tick in vertical.ticks:
        y = vertical(tick)
        parts.append(
            Markup('<line class="grid" x1="{:g}" x2="{:g}" y1="{:.1f}" y2="{:.1f}"/>').format(
                _LEFT, _WIDTH - _RIGHT, y, y
            )
        )
        parts.append(Markup('<text class="tick end" x="{:g}" y="{:.1f}">{:g}</text>').format(_LEFT - 7, y + 4, tick))
    for tick in horizontal.ticks:
        parts.append(
            Markup('<text class="tick mid" x="{:.1f}" y="{:g}">{:g}</text>').format(
                horizontal(tick), _HEIGHT - _BOTTOM + 17, tick
            )
        )
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    label = Markup('<text class="axis mid" x="{:g}" y="{:g}">{}</text>')
    parts.append(label.format((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 5, along))
    parts.append(
        Markup('<text class="axis mid" transform="translate(13 {:g}) rotate(-90)">{}</text>').format(middle, quantity)
    )
    return Markup("").join(parts)


def rate_bar(rate: Mapping[str, Any], floor: float | None) -> Markup:
    """A pass rate as a dot with its interval on a track from 0 to 100 %, and the gate's floor as a mark."""
    low, high, value = (100 * rate[key] for key in ("low", "high", "rate"))
    mark = Markup("")
    if floor is not None:
        mark = Markup('<line class="floor" x1="{0:.1f}" x2="{0:.1f}" y1="1" y2="17"/>').format(4 + 1.52 * 100 * floor)
    return Markup(
        '<svg class="rate" viewBox="0 0 160 18" role="img"><title>{:.1f} %, interval {:.1f} to {:.1f} %</title>'
        '<rect class="track" x="4" y="7" width="152" height="4" rx="2"/>{}'
        '<line class="interval" x1="{:.1f}" x2="{:.1f}" y1="9" y2="9"/>'
        '<circle class="value" cx="{:.1f}" cy="9" r="4.5"/></svg>'
    ).format(value, low, high, mark, 4 + 1.52 * low, 4 + 1.52 * high, 4 + 1.52 * value)


def histogram(bins: Sequence[Mapping[str, int]], limit: int | None) -> Markup:
    """Row lengths in tokens; the length limit is a mark where it falls among them.

    Args:
        bins: `from`, `to` (both included) and `count`, in order and without gaps.
        limit: The longest row that is trained whole, or None.
    """
    ticks = nice_ticks(0.0, float(max(each["count"] for each in bins)), 4)
    vertical = Scale(0.0, ticks[-1], _HEIGHT - _BOTTOM, _TOP, ticks)
    first, last = bins[0]["from"], bins[-1]["to"] + 1
    inside = [tick for tick in nice_ticks(float(first), float(last)) if first <= tick <= last]
    horizontal = Scale(float(first), float(last), _LEFT, _WIDTH - _RIGHT, inside)
    parts = [_grid(horizontal, vertical, "rows", "tokens")]
    for each in bins:
        left, right, top = horizontal(each["from"]), horizontal(each["to"] + 1), vertical(each["count"])
        width, height = max(1.0, right - left - 2), _HEIGHT - _BOTTOM - top
        parts.append(_BAR.format(left + 1, top, width, height, each["from"], each["to"], each["count"]))
    if limit is not None and first <= limit <= last:
        parts.append(
            Markup('<line class="floor" x1="{0:.1f}" x2="{0:.1f}" y1="{1:g}" y2="{2:g}"/>').format(
                horizontal(limit), _TOP, _HEIGHT - _BOTTOM
            )
        )
    return _CHART.format(_WIDTH, _HEIGHT, "Row lengths in tokens", Markup("").join(parts))
