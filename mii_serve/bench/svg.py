"""Plots as SVG text: lines, dots and bars on two axes, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 48, 44
COLORS = ("#2563a8", "#c2571a", "#3b8a3e", "#8a3b83", "#6b6b6b", "#b08b00", "#1f8a8a")
MAX_DOTS = 4000
"""More cannot be told apart, and make the page heavy."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    name: str
    points: Points
    style: Literal["line", "dots", "bars", "marked"] = "line"
    color: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """`log_y` needs values above 0; what is not is left out."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_y: bool = False
    rule_x: tuple[float, str] | None = None
    x_names: Sequence[str] = field(default=())

    def svg(self) -> str:
        """The picture, with a title and a text for those who cannot see it."""
        shown = [(one, [p for p in one.points if math.isfinite(p[1]) and (p[1] > 0 or not self.log_y)]) for one in self.series]
        every = [point for _, points in shown for point in points]
        x_low, x_high = _span([x for x, _ in every] + ([self.rule_x[0]] if self.rule_x else []), from_zero=not self.x_names)
        if any(one.style == "bars" for one in self.series):
            x_high += 0.5
        if self.x_names:
            x_low, x_high = -0.5, len(self.x_names) - 0.5
        y_low, y_high = _span([y for _, y in every] or [1.0], from_zero=not self.log_y)
        if self.log_y:
            y_low, y_high = 10 ** math.floor(math.log10(y_low)), 10 ** math.ceil(math.log10(max(y_high, y_low * 1.001)))

        def x_at(x: float) -> float:
            return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

        def y_at(y: float) -> float:
            share = math.log(y / y_low) / math.log(y_high / y_low) if self.log_y else (y - y_low) / (y_high - y_low)
            return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            f'role="img" aria-label="{escape(self.title)}" font-family="sans-serif" font-size="11">',
            f"<title>{escape(self.title)}</title>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            f'<text x="{LEFT}" y="16" font-size="13" font-weight="bold" fill="#222222">{escape(self.title)}</text>',
        ]
        for tick in _ticks(y_low, y_high, is_log=self.log_y):
            y = y_at(tick)
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
            parts.append(_text(LEFT - 6, y + 4, f"{tick:g}", anchor="end"))
        ticks = [(float(i), name) for i, name in enumerate(self.x_names)]
        for tick, name in ticks or [(t, f"{t:g}") for t in _ticks(x_low, x_high, is_log=False)]:
            parts.append(_text(x_at(tick), HEIGHT - BOTTOM + 16, name))
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, self.x_label))
        parts.append(_text(14, (TOP + HEIGHT - BOTTOM) / 2, self.y_label, is_upright=True))
        if self.rule_x is not None:
            x = x_at(self.rule_x[0])
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#aa2222" stroke-dasharray="4 3"/>'
            )
            is_right = x > (LEFT + WIDTH - RIGHT) / 2
            parts.append(_text(x - 4 if is_right else x + 4, TOP + 12, self.rule_x[1], anchor="end" if is_right else "start"))
        for index, (one, points) in enumerate(shown):
            color = one.color or COLORS[index % len(COLORS)]
            parts += _drawn(one.style, [(x_at(x), y_at(y)) for x, y in points], color, _bar_width(points))
        parts += _legend([(one.name, one.color or COLORS[i % len(COLORS)]) for i, (one, _) in enumerate(shown) if one.name])
        return "".join([*parts, "</svg>"])


def _text(x: float, y: float, text: str, *, anchor: str = "middle", is_upright: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if is_upright else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#444444"{turn}>{escape(text)}</text>'


def _drawn(style: str, points: Points, color: str, bar_width: float) -> list[str]:
    if not points:
        return []
    if style == "dots":
        return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{color}" fill-opacity="0.7"/>' for x, y in thinned(points)]
    if style == "bars":
        bottom, half = HEIGHT - BOTTOM, bar_width / 2
        size = f'width="{bar_width:.1f}" fill="{color}"'
        return [f'<rect x="{x - half:.1f}" y="{y:.1f}" height="{max(0.0, bottom - y):.1f}" {size}/>' for x, y in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in thinned(points))
    made = [f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.8"/>']
    if style == "marked":
        made += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
    return made


def thinned(points: Points) -> Points:
    """At most `MAX_DOTS` of them, evenly, the last one among them."""
    if len(points) <= MAX_DOTS:
        return points
    return [points[round(i * (len(points) - 1) / (MAX_DOTS - 1))] for i in range(MAX_DOTS)]


def _bar_width(points: Points) -> float:
    return max(1.0, 0.8 * (WIDTH - LEFT - RIGHT) / max(1, len(points)))


def _legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    parts, x = [], WIDTH - RIGHT
    for name, color in reversed(entries):
        x -= 6 * len(name) + 24
        parts.append(f'<rect x="{x}" y="{TOP - 20}" width="10" height="10" fill="{color}"/>')
        parts.append(f'<text x="{x + 14}" y="{TOP - 11}" fill="#222222">{escape(name)}</text>')
    return parts


def _span(values: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if from_zero:
        low = min(low, 0.0)
    if high <= low:
        high = low + (abs(low) or 1.0)
    return low, high


def _ticks(low: float, high: float, *, is_log: bool) -> list[float]:
    if is_log:
        return [10.0**power for power in range(round(math.log10(low)), round(math.log10(high)) + 1)]
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]
