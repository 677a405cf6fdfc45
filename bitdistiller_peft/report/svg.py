"""Drawings as inline SVG: curves, a heat map, a histogram, a divided bar.

Plain text, no script, nothing fetched. Colours are classes of the page's style sheet, so that they follow light and
dark. Every drawing has a title and a description for screen readers, and every foreign text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitdistiller_peft.report.axes import Axis, fit_axis, short
from bitdistiller_peft.report.escape import html_text

WIDTH, HEIGHT = 420.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 80.0, 12.0, 14.0, 40.0
_LEGEND = 24.0
_MARKED = 40
"""Up to so many points are marked one by one."""


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: for the legend.
        xs: where.
        ys: how much; what is not finite is left out.
    """

    name: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]

    def points(self) -> list[tuple[float, float]]:
        """What can be drawn."""
        pairs = zip(self.xs, self.ys, strict=True)
        return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def drawing(title: str, description: str, body: Sequence[str], height: float = HEIGHT) -> str:
    """Wrap shapes into an SVG that says what it is.

    Args:
        title: for screen readers and tool tips.
        description: what it shows in a sentence.
        body: shapes.
        height: of the drawing; the width is always `WIDTH`.
    """
    label = html_text(f"{title}. {description}")
    head = f'<svg class="chart" viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{label}">'
    words = (f"<title>{html_text(title)}</title>", f"<desc>{html_text(description)}</desc>")
    return "\n".join((head, *words, *body, "</svg>"))


def text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "tick") -> str:
    """A word at a place.

    Args:
        x: where.
        y: its base line.
        words: escaped here.
        anchor: ``"start"``, ``"middle"`` or ``"end"``.
        kind: class of the style sheet.
    """
    return f'<text class="{kind}" x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">{html_text(words)}</text>'


def line_chart(title: str, series: Sequence[Series], *, x_name: str, y_name: str, from_zero: bool = False) -> str:
    """Draw curves over a common axis.

    Args:
        title: what is shown.
        series: at most four, each with a finite point.
        x_name: of the horizontal axis.
        y_name: of the vertical axis.
        from_zero: let the vertical axis begin at zero.
    """
    drawn = [(one, one.points()) for one in series]
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    across = Axis(*_apart(min(xs), max(xs)), LEFT, WIDTH - RIGHT)
    up = fit_axis(ys, HEIGHT - BOTTOM, TOP + (14 if len(series) > 1 else 0), from_zero=from_zero)
    body = [*_frame(across, up, x_name, y_name)]
    for number, (one, points) in enumerate(drawn):
        places = [(across.at(x), up.at(y)) for x, y in points]
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
        body.append(f'<polyline class="line s{number}" points="{path}"/>')
        if len(places) <= _MARKED:
            body += [f'<circle class="dot s{number}" cx="{x:.2f}" cy="{y:.2f}" r="2.2"/>' for x, y in places]
        if len(series) > 1:
            body += _legend(number, one.name, (WIDTH - _LEGEND) / max(3, len(series)))
    last = ", ".join(f"{one.name} ends at {short(points[-1][1])}" for one, points in drawn)
    scale = ", logarithmic scale" if up.is_log else ""
    return drawing(title, f"{y_name} over {x_name}{scale}: {last}.", body)


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: dict[tuple[int, int], float]) -> str:
    """Draw a table of numbers as shades; the numbers stand in the cells.

    Args:
        title: what is shown.
        rows: names, top to bottom.
        columns: names, left to right.
        values: number of each ``(row, column)``; others stay empty.
    """
    low, high = min(values.values()), max(values.values())
    left, top, height = 40.0, 62.0, 15.0
    width = (WIDTH - left - 4) / len(columns)
    body = []
    for at, name in enumerate(columns):
        x = left + width * (at + 0.35)
        turned = f'transform="rotate(-32 {x:.1f} {top - 5:.1f})"'
        body.append(f'<text class="tick" x="{x:.1f}" y="{top - 5:.1f}" {turned}>{html_text(name)}</text>')
    body += [text(left - 5, top + height * (at + 0.73), name, anchor="end") for at, name in enumerate(rows)]
    for (row, column), value in sorted(values.items()):
        share = (value - low) / (high - low) if high > low else 0.0
        x, y = left + width * column, top + height * row
        words = html_text(f"{rows[row]} {columns[column]}: {value:.4f}")
        body.append(
            f'<g><rect class="heat" x="{x:.2f}" y="{y:.2f}" width="{width - 1:.2f}" height="{height - 1:.2f}" '
            f'fill-opacity="{0.1 + 0.9 * share:.3f}"/><title>{words}</title>'
            + text(x + width / 2, y + height * 0.73, _in_cell(value, width), anchor="middle", kind=_on(share))
            + "</g>"
        )
    worst = max(values, key=lambda place: values[place])
    words = f"From {short(low)}, palest, to {short(high)}, strongest; most in {rows[worst[0]]}, {columns[worst[1]]}."
    return drawing(title, words, body, top + height * len(rows) + 4)


@dataclass(frozen=True)
class Bars:
    """Shares over a range of values.

    Attributes:
        edges: where the bars begin and end, one more than `shares`.
        shares: what falls between, in [0, 1].
    """

    edges: tuple[float, ...]
    shares: tuple[float, ...]


def two_histograms(title: str, before: Bars | None, after: Bars, levels: Sequence[float], x_name: str) -> str:
    """Draw what was there over what became of it, with a line at every level.

    Args:
        title: what is shown.
        before: the weights before; `None` where they are not known.
        after: the weights after.
        levels: the values that a code can stand for.
        x_name: of the common axis.
    """
    low, high = after.edges[0], after.edges[-1]
    across = Axis(low, high, LEFT, WIDTH - RIGHT)
    half = (HEIGHT + 70 - TOP - BOTTOM) / 2
    parts = [(before, "before", 0), (after, "after", 1)]
    body: list[str] = []
    for bars, name, number in parts:
        floor, ceiling = TOP + half * (number + 1), TOP + half * number + 22
        up = fit_axis([*(bars.shares if bars else (1.0,)), 0.0], floor, ceiling, from_zero=True)
        body += [f'<line class="grid" x1="{LEFT:.2f}" x2="{WIDTH - RIGHT:.2f}" y1="{floor:.2f}" y2="{floor:.2f}"/>']
        body += [text(LEFT - 5, up.at(tick) + 4, f"{100 * tick:.3g} %", anchor="end") for tick in up.ticks()[1::2]]
        for left, right, share in zip(bars.edges, bars.edges[1:], bars.shares, strict=False) if bars else ():
            x, y = across.at(left), up.at(share)
            size = f'width="{max(across.at(right) - x - 0.4, 0.6):.2f}" height="{floor - y:.2f}"'
            body.append(f'<rect class="bar s{number}" x="{x:.2f}" y="{y:.2f}" {size}/>')
        body.append(text(LEFT, ceiling - 8, name if bars else f"{name}: not known", kind="name"))
    bottom = TOP + 2 * half
    for level in levels:
        x = across.at(level)
        body.append(f'<line class="level" x1="{x:.2f}" x2="{x:.2f}" y1="{TOP + 18:.2f}" y2="{bottom:.2f}"/>')
    body += [text(across.at(tick), bottom + 14, short(tick), anchor="middle") for tick in across.ticks()]
    body.append(text((LEFT + WIDTH) / 2, bottom + 30, x_name, anchor="middle", kind="name"))
    words = f"Levels at {', '.join(short(level) for level in levels)}."
    return drawing(title, words, body, bottom + BOTTOM)


def divided_bar(title: str, parts: Sequence[tuple[str, float]]) -> str:
    """Draw one bar, divided by size, with a legend.

    Args:
        title: what is shown.
        parts: name and size; none below zero, not all zero.
    """
    total = math.fsum(size for _, size in parts)
    body, x = [], 4.0
    for number, (name, size) in enumerate(parts):
        width = (WIDTH - 8) * size / total
        words = html_text(f"{name}: {100 * size / total:.1f} %")
        shape = f'<rect class="bar s{number % 8}" x="{x:.2f}" y="6" width="{max(width, 0.3):.2f}" height="26"/>'
        body.append(f"<g>{shape}<title>{words}</title></g>")
        x += width
        column, row = number % 2, number // 2
        left, base = 6 + column * WIDTH / 2, 54.0 + 18 * row
        body.append(f'<rect class="bar s{number % 8}" x="{left:.2f}" y="{base - 9:.2f}" width="10" height="10"/>')
        body.append(text(left + 15, base, f"{name} {100 * size / total:.1f} %"))
    largest = max(parts, key=lambda part: part[1])
    words = f"The largest part is {largest[0]}, {100 * largest[1] / total:.1f} %."
    return drawing(title, words, body, 54.0 + 18 * ((len(parts) - 1) // 2) + 10)


def _frame(across: Axis, up: Axis, x_name: str, y_name: str) -> list[str]:
    """Grid lines, ticks and names of both axes."""
    lines = []
    for tick in up.ticks():
        y = up.at(tick)
        lines.append(f'<line class="grid" x1="{LEFT:.2f}" x2="{WIDTH - RIGHT:.2f}" y1="{y:.2f}" y2="{y:.2f}"/>')
        lines.append(text(LEFT - 5, y + 4, short(tick), anchor="end"))
    bottom = HEIGHT - BOTTOM
    lines += [text(across.at(tick), bottom + 15, short(tick), anchor="middle") for tick in across.ticks()]
    lines.append(text((LEFT + WIDTH - RIGHT) / 2, bottom + 32, x_name, anchor="middle", kind="name"))
    middle = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 11 {middle:.2f})"'
    lines.append(f'<text class="name" x="11" y="{middle:.2f}" text-anchor="middle" {turned}>{html_text(y_name)}</text>')
    return lines


def _legend(number: int, name: str, room: float) -> list[str]:
    x = _LEGEND + number * room
    line = f'<line class="line s{number}" x1="{x:.2f}" x2="{x + 14:.2f}" y1="12" y2="12"/>'
    return [line, text(x + 17, 16, name, kind="tick")]


def _apart(low: float, high: float) -> tuple[float, float]:
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _in_cell(value: float, width: float) -> str:
    return "" if width < 22 else f"{value:.2f}" if value < 10 else f"{value:.2g}"


def _on(share: float) -> str:
    return "cell strong" if share > 0.55 else "cell"
