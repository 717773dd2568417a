"""Line charts as SVG text: no dependency, a few kilobytes, readable in a diff. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 72, 20, 44, 56
COLOURS = ("#1f6feb", "#d1495b", "#2a9d8f", "#e09f3e", "#6d597a", "#495057")
FONT = 'font-family="system-ui, sans-serif" font-size="12"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line. points: (x, y), drawn in the order given.  dashed: for what is computed rather than measured."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """label: with its unit.  log: powers of ten (all values above 0).  zero: a linear axis starts at 0."""

    label: str
    log: bool = False
    zero: bool = True


def line_chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """A whole SVG document. Raises ValueError when there is no point, one that is not finite, or one ≤ 0 on a log axis."""
    points = [point for line in series for point in line.points]
    if not points:
        raise ValueError(f"{title!r} has no point to draw")
    across = _Scale(x, [p[0] for p in points], LEFT, WIDTH - RIGHT)
    up = _Scale(y, [p[1] for p in points], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {FONT}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(WIDTH / 2, 22, title, anchor="middle", size=15),
        *_grid(across, up),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x.label, anchor="middle"),
        f'<g transform="rotate(-90 16 {(TOP + HEIGHT - BOTTOM) / 2})">'
        + _text(16, (TOP + HEIGHT - BOTTOM) / 2, y.label, anchor="middle")
        + "</g>",
    ]
    for number, line in enumerate(series):
        parts += _line(line, COLOURS[number % len(COLOURS)], across, up)
        parts += _legend(line, COLOURS[number % len(COLOURS)], TOP + 14 + 18 * number)
    return "\n".join([*parts, "</svg>\n"])


class _Scale:
    """Values of one axis → pixels, and where its ticks are."""

    def __init__(self, axis: Axis, values: Sequence[float], begin: float, end: float) -> None:
        if not all(math.isfinite(v) and (v > 0 or not axis.log) for v in values):
            raise ValueError(f"axis {axis.label!r}: wanted finite numbers{' above 0' if axis.log else ''}")
        low, high = min(values), max(values)
        if axis.log:
            self.ticks = _log_ticks(low, high)
        else:
            self.ticks = _ticks(min(low, 0.0) if axis.zero else low, high)
        self._log, self._begin, self._end = axis.log, begin, end
        self._low, self._high = self._of(min(low, self.ticks[0])), self._of(max(high, self.ticks[-1]))

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self._low) / ((self._high - self._low) or 1.0)
        return self._begin + share * (self._end - self._begin)

    def _of(self, value: float) -> float:
        return math.log10(value) if self._log else value


def _ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover [low, high]."""
    span = high - low if high - low > 1e-9 * abs(high) else abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; with 2 and 5 times them where the range is short. They cover [low, high]."""
    wide = math.log10(high / low) > 3
    steps = (1.0,) if wide else (1.0, 2.0, 5.0)
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    marks = [float(f"{m}e{e}") for e in range(first, last + 1) for m in steps]
    below = [mark for mark in marks if mark <= low * (1 + 1e-9)][-1:]
    above = [mark for mark in marks if mark >= high * (1 - 1e-9)][:1]
    ticks = sorted({*below, *(mark for mark in marks if low < mark < high), *above})
    return ticks if len(ticks) > 1 else [ticks[0], ticks[0] * 10]


def _grid(across: _Scale, up: _Scale) -> list[str]:
    bottom, top = HEIGHT - BOTTOM, TOP
    parts = []
    for tick in across.ticks:
        at = across(tick)
        parts.append(f'<line x1="{at:.1f}" y1="{top}" x2="{at:.1f}" y2="{bottom}" stroke="#eceff1"/>')
        parts.append(_text(at, bottom + 18, short(tick), anchor="middle"))
    for tick in up.ticks:
        at = up(tick)
        parts.append(f'<line x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}" stroke="#dfe3e6"/>')
        parts.append(_text(LEFT - 8, at + 4, short(tick), anchor="end"))
    return parts


def _line(line: Series, colour: str, across: _Scale, up: _Scale) -> list[str]:
    dots = [(across(x), up(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>']
    if not line.dashed:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in dots]
    return parts


def _legend(line: Series, colour: str, y: float) -> list[str]:
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    mark = f'<line x1="{LEFT + 10}" y1="{y}" x2="{LEFT + 34}" y2="{y}" stroke="{colour}" stroke-width="2"{dash}/>'
    return [mark, _text(LEFT + 40, y + 4, line.name)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="#24292f">{escape(text)}</text>'
    )


def short(value: float) -> str:
    """1500 → 1.5k, 2e9 → 2G, 0.25 → 0.25."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{suffix}"
    return f"{value:.4g}"
