"""Curves as an SVG file, both axes logarithmic."""

import math
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 20, 48
# Okabe & Ito's colours, which most colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Ticks are these times the powers of ten: the first row, or the second where that gives few.
TICKS, MORE_TICKS, FEW = (1, 2, 5), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), 4


@dataclass(frozen=True)
class Curve:
    """One line: its name and its points (x, y), all above 0."""

    name: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from `low` to `high`, drawn from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        """The coordinate of a value."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round numbers inside."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found: list[float] = []
        for ticks in (TICKS, MORE_TICKS):
            each = [tick * 10.0**power for power in powers for tick in ticks]
            found = [value for value in each if self.low <= value <= self.high]
            if len(found) >= FEW:
                break
        return found


def _axis(values: list[float], start: float, stop: float) -> Axis:
    return Axis(min(values) / 1.15, max(values) * 1.15, start, stop)


def write_curves(
    curves: list[Curve], path: Path, *, x: str, y: str, floor: tuple[str, float] | None = None
) -> None:
    """Write the curves with a legend; `floor` is a dashed line with its name."""
    points = [point for curve in curves for point in curve.points]
    across = _axis([point[0] for point in points], LEFT, WIDTH - RIGHT)
    up = _axis(
        [*([floor[1]] if floor else []), *(point[1] for point in points)], HEIGHT - BOTTOM, TOP
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for value in across.ticks():
        at = across.at(value)
        parts.append(_line(at, TOP, at, HEIGHT - BOTTOM, "#ddd"))
        parts.append(_text(at, HEIGHT - BOTTOM + 16, f"{value:g}", "middle"))
    for value in up.ticks():
        at = up.at(value)
        parts.append(_line(LEFT, at, WIDTH - RIGHT, at, "#ddd"))
        parts.append(_text(LEFT - 6, at + 4, f"{value:g}", "end"))
    if floor is not None:
        at = up.at(floor[1])
        parts.append(_line(LEFT, at, WIDTH - RIGHT, at, "#666", dashed=True))
        parts.append(_text(LEFT + 6, at - 4, floor[0], "start"))
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        points = [(across.at(a), up.at(b)) for a, b in curve.points]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        height = TOP + 16 + 16 * number
        parts.append(_line(WIDTH - 250, height - 4, WIDTH - 226, height - 4, colour, width=2))
        parts.append(_text(WIDTH - 220, height, curve.name, "start"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x, "middle"))
    turned = f'transform="rotate(-90 14 {HEIGHT / 2})"'
    parts.append(_text(14, HEIGHT / 2, y, "middle", turned))
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, *, width: int = 1,
    dashed: bool = False,
) -> str:  # fmt: skip
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"{dash}/>'
    )


def _text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'
