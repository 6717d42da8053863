"""The drawing of the rooms and their imports: python tests/support/rooms_drawing.py

Writes docs/pictures/rooms.svg from the parsed imports. Rooms stand on a descending staircase, the
highest floor first; the dot in the row of one room and the column of another says how many
imports of files the first makes of the second. An import upwards is below the stairs, in red.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rooms import FLOORS, Package, floor

ROOT = Path(__file__).resolve().parents[2]
DRAWING = ROOT / "docs" / "pictures" / "rooms.svg"

COLUMN, ROW, BOX, LEFT, TOP, RIGHT, BOTTOM = 46, 40, 210, 70, 12, 22, 38
# Okabe & Ito's colours, which most colour-blind people can tell apart; one a floor.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#8C6BB1",
    "#B8860B",
    "#666666",
)
EXPLAINED = (
    "A row: what a room imports. A column: which rooms import it. A number: imports, counted by "
    "importing file and by imported room or file."
)
STYLE = """
.paper { fill: #ffffff } .band { fill: #f3f4f6 } .box { fill: #ffffff }
text { fill: #1f2328 } .small { fill: #59636e } .wire { stroke: #c4c9d0 } .count { fill: #ffffff }
@media (prefers-color-scheme: dark) {
  .paper { fill: #0d1117 } .band { fill: #161b22 } .box { fill: #0d1117 }
  text { fill: #e6edf3 } .small { fill: #9198a1 } .wire { stroke: #3d444d }
}"""


def imports_between(package: Package) -> Counter[tuple[str, str]]:
    """How many (file, imported file or room) pairs there are from a room to another one."""
    rooms = set().union(*FLOORS)
    pairs = ((a.partition(".")[0], b.partition(".")[0]) for a, b in package.arrows)
    return Counter((a, b) for a, b in pairs if a != b and {a, b} <= rooms)


def order(counts: Counter[tuple[str, str]]) -> list[str]:
    """The rooms from the highest floor down, on a floor those first that import most."""
    imported = Counter(a for a, _ in counts.elements())
    rooms = set().union(*FLOORS)
    return sorted(rooms, key=lambda room: (-floor(room), -imported[room], room))


def drawing(package: Package) -> str:
    """The text of the SVG file."""
    counts = imports_between(package)
    rooms = order(counts)
    column = {room: LEFT + BOX + number * COLUMN for number, room in enumerate(rooms)}
    row = {room: TOP + number * ROW + ROW // 2 for number, room in enumerate(rooms)}
    width, height = LEFT + BOX + len(rooms) * COLUMN + RIGHT, TOP + len(rooms) * ROW + BOTTOM
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img">',
        "<title>Rooms of mdiff by floor, and how many imports lead from each to which</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}" rx="8"/>',
        *bands(rooms, width),
        *wires(counts, column, row),
        *(line for room in rooms for line in box(package, room, column[room], row[room])),
        *(dot(pair, number, column, row) for pair, number in sorted(counts.items())),
        _text("small", 18, height - 14, EXPLAINED, 'font-size="12"'),
        "</svg>\n",
    ])  # fmt: skip


def bands(rooms: list[str], width: int) -> list[str]:
    """A stripe and a label for each floor that has rooms."""
    drawn = []
    levels = sorted({floor(room) for room in rooms})
    for stripe, level in enumerate(levels):
        here = [number for number, room in enumerate(rooms) if floor(room) == level]
        y, height = TOP + here[0] * ROW, len(here) * ROW
        shape = f'width="{width - 16}" height="{height}"'
        if stripe % 2 == 0:
            drawn.append(f'<rect class="band" x="8" y="{y}" {shape}/>')
        drawn.append(_text("small", 18, y + height // 2 + 4, f"floor {level}", 'font-size="12"'))
    return drawn


def _text(kind: str, x: int, y: int, text: str, style: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" {style}>{text}</text>'


def wires(
    counts: Counter[tuple[str, str]], column: dict[str, int], row: dict[str, int]
) -> list[str]:
    """Lines from each box to its dots, and from the dots of a column down to the box below."""
    drawn = []
    for room in column:
        ends = [column[b] for a, b in counts if a == room]
        if ends:
            drawn.append(_line(column[room], row[room], max(ends), row[room]))
        starts = [row[a] for a, b in counts if b == room]
        if starts:
            x, y = column[room], row[room] - ROW // 2 + 5
            drawn.append(_line(x, min(starts), x, y))
            drawn.append(
                f'<path class="wire" d="M{x - 4} {y - 6}L{x} {y}L{x + 4} {y - 6}" fill="none"/>'
            )
    return drawn


def _line(x1: int, y1: int, x2: int, y2: int) -> str:
    return f'<line class="wire" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def box(package: Package, room: str, x: int, y: int) -> list[str]:
    """A room, its right end in its column, with its number of files and lines."""
    sources = [source for source in package.sources if source.room == room]
    lines = sum(len(source.lines) for source in sources)
    files = f"{len(sources)} files" if len(sources) > 1 else "1 file"
    size = f"{files}, {lines:,} lines"
    left, top, middle = x - BOX + 16, y - ROW // 2 + 6, y + 5
    colour = COLOURS[floor(room)]
    return [
        f'<rect class="box" x="{left}" y="{top}" width="{BOX}" height="{ROW - 12}" rx="5" '
        f'stroke="{colour}" stroke-width="2"/>',
        _text("name", left + 9, middle, room, 'font-weight="600"'),
        _text("small", left + BOX - 8, middle, size, 'font-size="11" text-anchor="end"'),
    ]


def dot(pair: tuple[str, str], number: int, column: dict[str, int], row: dict[str, int]) -> str:
    """The number of imports from a room to another; the dot's area grows with it."""
    x, y = column[pair[1]], row[pair[0]]
    wrong = floor(pair[1]) >= floor(pair[0])
    colour = "#d1242f" if wrong else COLOURS[floor(pair[0])]
    radius = 7 + 2 * number**0.5
    shape = f'cx="{x}" cy="{y}" r="{min(radius, ROW / 2 - 1):.1f}"'
    style = 'font-size="11" text-anchor="middle"'
    return f'<circle {shape} fill="{colour}"/>' + _text("count", x, y + 4, str(number), style)


if __name__ == "__main__":
    DRAWING.write_text(drawing(Package(ROOT)), encoding="utf-8")
