"""Small charts as inline SVG text: a histogram, ranges, columns and bars, in the colours of the page around them.

Each is 360 units wide, to be shown at 320 to 520 pixels, so that its labels stay readable on a phone. Colours are
CSS classes, which the page defines (``STYLE``). Not here: any layout of a page.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["STYLE", "Bar", "Range", "bars", "columns", "escaped", "histogram", "ranges"]

WIDTH = 360
BINS = 32

STYLE = """
svg { display: block; width: 100%; height: auto; font: 11px system-ui, "Noto Sans CJK SC", sans-serif; }
@media (max-width: 520px) { svg { font-size: 12.5px; } }
svg text { fill: var(--text); }
svg .muted { fill: var(--muted); }
svg .grid { stroke: var(--grid); }
svg .axis { stroke: var(--muted); }
svg .mark { stroke: var(--text); stroke-width: 1.5; stroke-dasharray: 3 2; }
svg .line { stroke: var(--accent); stroke-width: 3; }
svg .tick { stroke: var(--text); stroke-width: 2; }
svg .accent { fill: var(--accent); }
svg .plain { fill: var(--other); }
"""


class Bar(NamedTuple):
    """One horizontal bar: its label, its length, the length in words, and whether it is the candidate's."""

    label: str
    value: float
    shown: str
    candidate: bool


class Range(NamedTuple):
    """One row of a range chart: a line from ``minimum`` to ``mean`` with a tick at ``percentile_1``."""

    label: str
    minimum: float
    percentile_1: float
    mean: float


@dataclass(frozen=True)
class _Scale:
    """Maps the numbers from ``low`` to ``high``, which differ, to positions from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, least: float | None = None) -> _Scale:
        """A scale over all values, widened where they are all the same; ``least`` is where it begins at the latest."""
        low, high = min(values), max(values)
        low = low if least is None else min(low, least)
        room = 0.0 if high - low > 1e-12 else max(abs(high) * 1e-3, 1e-6)
        return cls(low - (room if least is None else 0.0), high + room, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 4, *, whole: bool = False) -> list[tuple[float, str]]:
        """About ``count`` round numbers within the scale, each with its label; ``whole`` numbers only if asked."""
        step = self._step(count, whole=whole)
        digits = next(n for n in range(16) if n == 15 or abs(step * 10**n - round(step * 10**n)) < 1e-6)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(number * step, f"{number * step:,.{digits}f}") for number in range(first, last + 1)]

    def rounded(self, count: int = 4, *, whole: bool = False) -> _Scale:
        """The scale up to the next tick, so that the largest value lies below a labelled line."""
        step = self._step(count, whole=whole)
        return dataclasses.replace(self, high=math.ceil(self.high / step - 1e-9) * step)

    def _step(self, count: int, *, whole: bool) -> float:
        rough = (self.high - self.low) / count
        if whole and rough <= 1:
            return 1.0
        power = 10.0 ** math.floor(math.log10(rough))
        factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
        return next(factor * power for factor in factors if factor * power >= rough * 0.999)


def histogram(values: NDArray[np.float64], *, label: str, marks: Mapping[str, float]) -> str:
    """How many of the ``values``, at least one, fall into each of 32 equal bins; ``marks`` are named lines."""
    top, bottom, right = 34, 168, WIDTH - 12
    x = _Scale.over(values.tolist(), 0, right)
    counts, edges = np.histogram(values, bins=BINS, range=(x.low, x.high))
    y = _Scale.over([float(counts.max())], bottom, top, least=0.0).rounded(whole=True)
    left = _margin(y.ticks(whole=True))
    x = dataclasses.replace(x, start=left)
    parts = [_value_axis(y, left, right, unit="texts", whole=True), _bottom_axis(x, bottom, label)]
    for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count:
            width = max(x(high) - x(low) - 1, 0.5)
            parts.append(
                _box(
                    x(low), y(count), width, bottom - y(count), "accent", f"{low:.5f} to {high:.5f}: {count}"
                )
            )
    for row, (name, value) in enumerate(marks.items()):
        parts.append(_line(x(value), top - 8, x(value), bottom, "mark"))
        anchor, shift = ("end", -4) if x(value) > WIDTH / 2 else ("start", 4)
        parts.append(_text(x(value) + shift, 10 + 12 * row, f"{name} {value:.5f}", anchor=anchor))
    return _svg(204, f"histogram of {label}", parts)


def ranges(rows: Sequence[Range], *, label: str) -> str:
    """For each row a line from its minimum to its mean, on one axis; nothing but the axis without rows."""
    left, right, step = 66, WIDTH - 64, 28
    bottom = 8 + step * len(rows)
    values = [value for row in rows for value in row[1:]] or [1.0]
    x = _Scale.over(values, left, right)
    parts = [_line(x(value), 4, x(value), bottom, "grid") for value, _ in x.ticks(3)]
    parts.append(_bottom_axis(x, bottom, label, count=3))
    for number, row in enumerate(rows):
        y = 8 + step * (number + 0.5)
        parts.append(_text(left - 10, y + 4, row.label, anchor="end"))
        parts.append(_line(x(row.minimum), y, x(row.mean), y, "line"))
        parts.append(_line(x(row.percentile_1), y - 7, x(row.percentile_1), y + 7, "tick"))
        parts.append(_element("circle", {"cx": x(row.mean), "cy": y, "r": 5, "class": "accent"}))
        parts.append(_text(WIDTH - 4, y + 4, f"{row.mean:.5f}", anchor="end"))
    return _svg(bottom + 36, f"{label}: minimum, 1st percentile and mean", parts)


def columns(values: Sequence[float], *, label: str, unit: str) -> str:
    """A column for each value from 0 up, numbered from 0; nothing but the axes without values."""
    top, bottom, right = 20, 160, WIDTH - 8
    y = _Scale.over(values or [1.0], bottom, top, least=0.0).rounded()
    left = _margin(y.ticks())
    parts = [_value_axis(y, left, right, unit=unit)]
    step = (right - left) / max(len(values), 1)
    every = math.ceil(len(values) / 13)
    for number, value in enumerate(values):
        x = left + step * number
        title = f"{number}: {value:.4g} {unit}"
        parts.append(_box(x + step * 0.15, y(value), step * 0.7, bottom - y(value), "accent", title))
        if number % every == 0:
            parts.append(_text(x + step / 2, bottom + 14, str(number), anchor="middle"))
    parts.append(_line(left, bottom, right, bottom, "axis"))
    parts.append(_text((left + right) / 2, bottom + 31, label, anchor="middle", muted=True))
    return _svg(bottom + 38, f"{label}, {unit}", parts)


def bars(rows: Sequence[Bar], *, label: str) -> str:
    """A bar for each row from 0 on, with its value in words beside it."""
    left, right, step = 64, WIDTH - 84, 30
    x = _Scale.over([row.value for row in rows] or [1.0], left, right, least=0.0)
    parts = []
    for number, row in enumerate(rows):
        y = 4 + step * number
        parts.append(_text(left - 8, y + 15, row.label, anchor="end"))
        colour = "accent" if row.candidate else "plain"
        parts.append(_box(left, y, max(x(row.value) - left, 0.5), 22, colour, f"{row.label}: {row.shown}"))
        parts.append(_text(max(x(row.value), left) + 6, y + 15, row.shown))
    bottom = 4 + step * len(rows)
    parts.append(_line(left, 0, left, bottom, "axis"))
    parts.append(_text(left, bottom + 14, label, muted=True))
    return _svg(bottom + 22, label, parts)


def escaped(value: str) -> str:
    """Text for HTML and XML alike: markup escaped, and characters that neither may hold shown as U+FFFD."""
    clean = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", value)
    return html.escape(clean, quote=True)


def _margin(ticks: Sequence[tuple[float, str]]) -> float:
    """Room for the labels of a value axis, at 7 units a character, which 12.5-unit digits stay below."""
    return max(38.0, 8.0 + 7.0 * max(len(shown) for _, shown in ticks))


def _value_axis(y: _Scale, left: float, right: float, *, unit: str, whole: bool = False) -> str:
    """Horizontal grid lines with their values at the left, and the unit above them."""
    parts = [_text(2, y.end - 9, unit, muted=True)]
    for value, shown in y.ticks(whole=whole):
        parts.append(_line(left, y(value), right, y(value), "grid"))
        parts.append(_text(left - 6, y(value) + 4, shown, anchor="end", muted=True))
    return "".join(parts)


def _bottom_axis(x: _Scale, bottom: float, label: str, *, count: int = 4) -> str:
    parts = [_line(x.start, bottom, x.end, bottom, "axis")]
    for value, shown in x.ticks(count):
        parts.append(_line(x(value), bottom, x(value), bottom + 4, "axis"))
        parts.append(_text(x(value), bottom + 16, shown, anchor="middle", muted=True))
    parts.append(_text((x.start + x.end) / 2, bottom + 31, label, anchor="middle", muted=True))
    return "".join(parts)


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    attributes = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {WIDTH} {height:g}",
        "role": "img",
        "aria-label": label,
    }
    return _element("svg", attributes, "".join(parts))


def _box(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    place: dict[str, float | str] = {"x": x, "y": y, "width": width, "height": height, "class": colour}
    return _element("rect", place, _element("title", {}, escaped(title)))


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return _element("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": kind})


def _text(x: float, y: float, content: str, *, anchor: str = "start", muted: bool = False) -> str:
    place: dict[str, float | str] = {"x": x, "y": y, "text-anchor": anchor}
    return _element("text", {**place, **({"class": "muted"} if muted else {})}, escaped(content))


def _element(name: str, attributes: Mapping[str, float | str], content: str = "") -> str:
    """``content`` is markup."""
    written = "".join(
        f' {key}="{escaped(value) if isinstance(value, str) else format(value, ".4g")}"'
        for key, value in attributes.items()
    )
    return f"<{name}{written}>{content}</{name}>"
