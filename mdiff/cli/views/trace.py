"""A page on which one can scrub through the order in which the tokens appeared."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from mdiff.sampling import State
from mdiff.tokens import TokenSpace

TEMPLATE = "trace.html"
# What may be said of a picture, in the order in which it is shown.
WORDS = ("label", "caption")


@dataclass(frozen=True)
class Grid:
    """A finished picture, `source` a PNG as a data: URL, in `rows` x `columns` places.

    `step` is when the last code of each place was written, row by row, and `log_prob` the nats
    of all its codes.
    """

    source: str
    width: int
    height: int
    rows: int
    columns: int
    step: list[int]
    log_prob: list[float]


@dataclass(frozen=True)
class Record:
    """How one sample came about, place by place of its canvas.

    `kind` names the drawing of the page that shows it ("flow": pieces of text in a row; "grid":
    the places of a picture, in `grid`, and the pieces of its words beside it). `pieces` is what
    each place holds in the end, `step` when it was last written (0 is given) and `log_prob` the
    nats of that draw. `figures` is a line about the sample.
    """

    kind: str
    pieces: list[str]
    step: list[int]
    log_prob: list[float]
    steps: int
    figures: str
    grid: Grid | None = None


class Recorder:
    """Remembers, for each place of a batch, the step at which it was last written."""

    def __init__(self, canvas: Tensor, valid: Tensor | None, *, space: TokenSpace) -> None:
        self.valid = torch.ones_like(canvas, dtype=torch.bool) if valid is None else valid
        self.mask_id = space.mask_id
        self.tokens = canvas
        self.step = torch.zeros_like(canvas)
        self.own_steps = torch.zeros(len(canvas), dtype=torch.int64, device=canvas.device)
        self.log_prob = torch.zeros(canvas.shape, dtype=torch.float64, device=canvas.device)

    def add(self, state: State) -> None:
        """One more state; each sample counts the steps in which something of it changed."""
        changed = (state.tokens != self.tokens) | state.revealed
        self.own_steps = self.own_steps + changed.any(1)
        self.step = torch.where(changed, self.own_steps[:, None], self.step)
        self.log_prob = torch.where(changed, state.log_prob.double(), self.log_prob)
        self.tokens = state.tokens

    def records(
        self, modality: Any, figures: Sequence[str], *, pictures: Sequence[Image] = ()
    ) -> list[Record]:
        """One record a sample, with a line of figures for each, and its picture if it is one."""
        found = []
        for row, line in enumerate(figures):
            seen = self.valid[row]
            flow = _Flow(
                [piece or "" for piece in modality.pieces(self.tokens[row][seen].tolist())],
                self.step[row][seen].tolist(),
                [round(x, 3) for x in self.log_prob[row][seen].tolist()],
            )
            grid = None
            if pictures:
                grid = _grid(modality, flow, pictures[row])
                flow = _words(modality, flow, pictures[row])
            found.append(
                Record(
                    kind="flow" if grid is None else "grid",
                    pieces=flow.pieces,
                    step=flow.step,
                    log_prob=flow.log_prob,
                    steps=int(self.own_steps[row]),
                    figures=line,
                    grid=grid,
                )
            )
        return found


class _Flow(NamedTuple):
    """The places of a canvas, or of a part of it, in order."""

    pieces: list[str]
    step: list[int]
    log_prob: list[float]


def _grid(modality: Any, flow: _Flow, picture: Image) -> Grid:
    rows, columns = modality.latent_grid
    each = modality.codec.codes_per_position
    first = modality.span("image").start
    starts = range(first, first + rows * columns * each, each)
    return Grid(
        source=data_url(picture),
        width=picture.width,
        height=picture.height,
        rows=rows,
        columns=columns,
        step=[max(flow.step[start : start + each]) for start in starts],
        log_prob=[round(sum(flow.log_prob[start : start + each]), 3) for start in starts],
    )


def _words(modality: Any, flow: _Flow, picture: Image) -> _Flow:
    """What is said of a picture: parts of the canvas, and what the model was told beside it."""
    columns: tuple[list[Any], ...] = ([], [], [])
    for name in WORDS:
        said = picture.info.get(name)
        if said is None:
            continue
        places: list[list[Any]] = [[said], [0], [0.0]]
        if name in modality.part_names:
            places = [column[modality.span(name)] for column in flow]
            if name == "label":
                places[0] = [said]
        if columns[0]:
            # A line break, there from the start.
            places = [[between, *rest] for between, rest in zip(("\n", 0, 0.0), places)]
        for column, more in zip(columns, places):
            column.extend(more)
    return _Flow(*columns)


def data_url(picture: Image) -> str:
    """The picture as a PNG in a data: URL."""
    packed = io.BytesIO()
    picture.save(packed, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode("ascii")


def page(records: Sequence[Record], *, title: str) -> str:
    """A self-contained HTML page of the records; it fetches nothing.

    Text from the model never becomes markup: it travels as JSON without angle brackets, and
    the page sets it as text.
    """
    data = json.dumps([asdict(record) for record in records], ensure_ascii=True)
    for character, escape in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        data = data.replace(character, escape)
    plain = "\n\n".join("".join(record.pieces) for record in records)
    template = (files("mdiff.cli.views") / TEMPLATE).read_text(encoding="utf-8")
    parts = {"TITLE": html.escape(title), "PLAIN": html.escape(plain), "DATA": data}
    return re.sub("%%([A-Z]+)%%", lambda place: parts[place[1]], template)
