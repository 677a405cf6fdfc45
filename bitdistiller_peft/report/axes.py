"""Numbers for people, and the scale of an axis: where values go, and where ticks stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_LOG_FROM = 100.0
"""Positive values that span more than this get a logarithmic axis."""


def short(value: float) -> str:
    """A number in four significant digits, with commas from a thousand on; a dash for what is none."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e4:
        text = f"{value:.4g}"
        return text if abs(value) < 1000 else f"{float(text):,.0f}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.3g}"


def num_bytes(size: float) -> str:
    """A size in the unit that suits it."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


def duration(seconds: float) -> str:
    """A time, in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


@dataclass(frozen=True)
class Axis:
    """From values to positions.

    Attributes:
        low: value at `start`.
        high: value at `end`.
        start: position of `low`, in the units of the drawing.
        end: position of `high`.
        is_log: whether equal factors take equal room.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """The position of a value."""
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis: 1, 2 or 5 times a power of ten, or powers alone."""
        if self.is_log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, math.ceil((last - first) / 5))
            return [10.0**power for power in range(first, last + 1, step)]
        width = _step(self.high - self.low)
        first, last = math.ceil(self.low / width - 1e-9), math.floor(self.high / width + 1e-9)
        return [round(number * width, 12) for number in range(first, last + 1)]


def fit_axis(values: Sequence[float], start: float, end: float, *, from_zero: bool = False) -> Axis:
    """An axis that holds all values.

    Args:
        values: finite numbers, at least one.
        start: position of the lowest one.
        end: position of the highest one.
        from_zero: begin at zero, unless the values call for a logarithmic axis.
    """
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_FROM:
        # whole powers of ten, so that there are ticks at both ends
        return Axis(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high)), start, end, is_log=True)
    low = min(low, 0.0) if from_zero else low
    if low == high:
        spread = abs(low) or 1.0
        low, high = (low - spread / 2, high + spread / 2) if not from_zero else (min(0.0, low), max(high, 0.0) or 1.0)
    step = _step(high - low)
    return Axis(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, end)


def _step(span: float) -> float:
    """Distance of about five ticks."""
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
