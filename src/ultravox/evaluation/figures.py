"""The report's charts as inline SVG. Colours come from the page's CSS variables, so that they follow light and dark.

Each chart is drawn for a stated width in CSS pixels; the page shows the narrow drawing on a phone instead of shrinking
the wide one until nobody can read it.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

MAX_AXIS = 1.5  # rates beyond 150% are drawn as an arrow at the edge: a babbling control must not squash the rest


@dataclass(frozen=True, slots=True)
class IntervalRow:
    """One line of an interval chart; ``value`` None draws no dot. ``role``: model, control or bound."""

    label: str
    value: float | None
    interval: Sequence[float] | None
    role: str
    absent: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a line chart: x in minutes, y in its own unit."""

    name: str
    x: list[float]
    y: list[float]


def percent(value: float | None) -> str:
    """A rate as people read it: 0.2741 → 27.4%."""
    return "n/a" if value is None else f"{100 * value:.1f}%"


def percent_interval(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None or interval is None:
        return percent(value)
    return f"{100 * value:.1f}% [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _text(x: float, y: float, content: str, *, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(content)}</text>'


def _svg(width: int, height: float, body: Sequence[str], title: str, extra: str = "") -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(title)}" {extra}>{"".join(body)}</svg>'
    )


def interval_chart(rows: Sequence[IntervalRow], *, width: int, title: str) -> Markup:
    """Dots with 95% intervals on one percent axis. Under 600 px the labels stand above their lines."""
    narrow = width < 600
    left, right = (8, width - 12) if narrow else (232, width - 184)
    row_height, top = (50, 8) if narrow else (34, 12)
    present = [high for row in rows for high in [*(row.interval or []), row.value or 0.0]]
    limit = min(MAX_AXIS, max(1.0, math.ceil(max(present, default=1.0) * 4) / 4))
    bottom = top + row_height * len(rows)

    def place(value: float) -> float:
        return left + (right - left) * min(max(value, 0.0), limit) / limit

    body = []
    step = 0.25 if not narrow else 0.5
    for index in range(round(limit / step) + 1):
        x = place(index * step)
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" class="grid"/>')
        anchor = "middle" if 0 < index < round(limit / step) or not narrow else ("start" if index == 0 else "end")
        body.append(_text(x, bottom + 18, f"{index * step:.0%}", kind="tick", anchor=anchor))
    for index, row in enumerate(rows):
        y = top + row_height * (index + (0.72 if narrow else 0.5))
        value_text = percent_interval(row.value, row.interval) if row.value is not None else "not measured"
        if narrow:
            body.append(_text(left, y - 15, row.label, kind=f"label {row.role}"))
            body.append(_text(right, y - 15, value_text, kind="value", anchor="end"))
        else:
            body.append(_text(left - 14, y + 4, row.label, kind=f"label {row.role}", anchor="end"))
            body.append(_text(right + 14, y + 4, value_text, kind="value"))
        if row.value is None:
            continue
        tooltip = f"<title>{escape(f'{row.label}: {value_text}')}</title>"
        low, high = row.interval or (row.value, row.value)
        body.append(
            f'<g class="mark {row.role}">{tooltip}'
            f'<line x1="{place(low):.1f}" x2="{place(high):.1f}" y1="{y}" y2="{y}"/>'
        )
        if row.value > limit:
            body.append(f'<path d="M{right - 8} {y - 6} L{right} {y} L{right - 8} {y + 6}"/></g>')
        else:
            body.append(f'<circle cx="{place(row.value):.1f}" cy="{y}" r="6"/></g>')
    return _svg(width, bottom + 28, body, title)


def _log_ticks(low: float, high: float) -> list[float]:
    ticks = [
        base * 10.0**power
        for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for base in (1, 2, 5)
    ]
    inside = [tick for tick in ticks if low <= tick <= high]
    decades = [tick for tick in inside if math.isclose(math.log10(tick) % 1, 0, abs_tol=1e-9)]
    return inside if len(inside) <= 8 else decades or inside


def _nice_step(span: float, target: int) -> float:
    raw = max(span, 1e-9) / target
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * base for base in (1, 2, 5, 10) if power * base >= raw)


def line_chart(
    series: Sequence[Series],
    stages: Sequence[tuple[str, float, float]],
    *,
    width: int,
    height: int,
    title: str,
    logarithmic: bool = False,
    as_percent: bool = False,
    dots: bool = False,
) -> Markup:
    """Lines over elapsed minutes; ``stages`` (name, from, to) are shaded bands on the same axis."""
    left, right, top, bottom = 46, width - 10, 24, height - 26
    values = [y for line in series for y in line.y]
    if not values or not stages:
        return Markup("")
    end = max(to for _, _, to in stages) or 1.0
    if logarithmic:
        low, high = min(values) * 0.9, max(values) * 1.1
        ticks = _log_ticks(low, high)
    else:
        step = _nice_step(max(values), 4)
        low, high = 0.0, step * math.ceil(max(values) / step)
        ticks = [step * index for index in range(round(high / step) + 1)]

    def place_x(x: float) -> float:
        return left + (right - left) * x / end

    def place_y(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if logarithmic else (y - low) / (high - low)
        return bottom - (bottom - top) * share

    body = []
    for index, (name, start, stop) in enumerate(stages):
        x, band = place_x(start), place_x(stop) - place_x(start)
        body.append(f'<rect x="{x:.1f}" y="{top}" width="{band:.1f}" height="{bottom - top}" class="band{index % 2}"/>')
        if band > 7 * len(name):
            body.append(_text(x + 4, top - 8, name, kind=f"stage stage{index % 4}"))
    for tick in ticks:
        y = place_y(tick)
        label = f"{tick:.0%}" if as_percent else f"{tick:g}"
        body.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        body.append(_text(left - 6, y + 4, label, kind="tick", anchor="end"))
    x_step = _nice_step(end, 4 if width < 600 else 8)
    for index in range(int(end / x_step + 1e-9) + 1):
        label = f"{index * x_step:g}" + (" min" if index == 0 else "")
        body.append(
            _text(place_x(index * x_step), bottom + 18, label, kind="tick", anchor="middle" if index else "start")
        )
    names = [name for name, _, _ in stages]
    points = []
    for line in series:
        colour = names.index(line.name) % 4 if line.name in names else 0
        path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
        body.append(f'<polyline points="{path}" class="line stage{colour}"/>')
        for x, y in zip(line.x, line.y, strict=True):
            if dots:
                body.append(f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3.5" class="dot stage{colour}"/>')
            shown = percent(y) if as_percent else f"{y:.3g}"
            points.append([round(place_x(x), 1), round(place_y(y), 1), f"{line.name}, {x:.1f} min: {shown}"])
    hover = f'class="hover" data-points="{escape(json.dumps(points))}"'
    return _svg(width, height, body, title, hover)


def token_chart(
    picture_uri: str, frames: int, tokens: Sequence[str], cosines: Sequence[float], seconds: float
) -> Markup:
    """A log-mel picture with, under it, the nearest text token of every audio token; 22 px for each audio token.

    Args:
        picture_uri: ``data:`` address of the log-mel PNG, one pixel for each of ``frames`` mel frames (100 a second).
        seconds: time of one audio token.
    """
    cell, mel_height, text_height = 22, 120, 92
    width = max(1, len(tokens)) * cell
    shown = frames / 100 / seconds * cell  # the picture's width: the last token may reach past the end of the clip
    body = [f'<image href="{picture_uri}" width="{shown:.1f}" height="{mel_height}" preserveAspectRatio="none"/>']
    for second in range(int(frames / 100) + 1):
        x = second / seconds * cell
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{mel_height}" y2="{mel_height + 6}" class="axis"/>')
        body.append(_text(x + 3, mel_height + 14, f"{second} s", kind="tick"))
    top = mel_height + 20
    # Cosines with thousands of rows are never low: what lies near no token has the cosine that chance gives, and at
    # least half of all positions are such blanks or repeats. So colour begins at the clip's own median.
    floor, ceiling = (statistics.median(cosines), max(cosines)) if cosines else (0.0, 1.0)
    for index, (token, cosine) in enumerate(zip(tokens, cosines, strict=True)):
        x, strength = index * cell, max(0.0, cosine - floor) / max(ceiling - floor, 1e-9)
        tooltip = f"audio token {index}, {index * seconds:.1f} s: “{token}”, cosine {cosine:.2f}"
        body.append(
            f'<g class="cell"><title>{escape(tooltip)}</title>'
            f'<rect x="{x}" y="{top}" width="{cell - 1}" height="{text_height}" '
            f'style="fill-opacity:{0.06 + 0.5 * strength:.2f}"/>'
            f'<text transform="translate({x + cell / 2 + 4:.1f} {top + text_height - 5}) rotate(-90)" '
            f'style="opacity:{0.35 + 0.65 * strength:.2f}">{escape(token.strip()[:13] or "·")}</text></g>'
        )
    return _svg(width, top + text_height, body, "Log-mel spectrogram and the nearest text token of each audio token")


def histogram(values: Sequence[float], *, width: int, height: int, title: str, unit: str, bins: int = 40) -> Markup:
    """Bars of how many values lie in each of equal ranges; the highest 1% share the last bar, which says so."""
    left, right, top, bottom = 46, width - 10, 12, height - 26
    ordered = sorted(values)
    end = max(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 1e-9) * (1 + 1e-9)
    counts = [0] * bins
    for value in ordered:
        counts[min(bins - 1, int(value / end * bins))] += 1
    step = max(1.0, _nice_step(max(counts), 4))
    high = step * math.ceil(max(counts) / step)
    body = []
    for index in range(round(high / step) + 1):
        y = bottom - (bottom - top) * index * step / high
        body.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        body.append(_text(left - 6, y + 4, f"{index * step:g}", kind="tick", anchor="end"))
    bar = (right - left) / bins
    for index, count in enumerate(counts):
        size, is_last = (bottom - top) * count / high, index == bins - 1
        upper = f"{ordered[-1]:.3g}" if is_last else f"{(index + 1) * end / bins:.3g}"
        tooltip = f"{index * end / bins:.3g} to {upper} {unit}: {count}"
        body.append(
            f'<g class="mark model"><title>{escape(tooltip)}</title>'
            f'<rect x="{left + index * bar + 0.5:.1f}" y="{bottom - size:.1f}" width="{bar - 1:.1f}" '
            f'height="{size:.1f}" fill="currentColor"/></g>'
        )
    x_step = _nice_step(end, 4 if width < 600 else 8)
    for index in range(int(end / x_step) + 1):
        label = f"{index * x_step:g}" + (f" {unit}" if index == 0 else "")
        x = left + (right - left) * index * x_step / end
        body.append(_text(x, bottom + 18, label, kind="tick", anchor="middle" if index else "start"))
    return _svg(width, height, body, title)
