"""A page that replays the order in which the tokens were revealed."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL.Image import Image

    from mdiff.modalities.image import ImageModality
    from mdiff.pipeline import Generation
    from mdiff.sampling import State

TEMPLATE = "trace.html"
# The words of a picture, in the order in which they are shown.
WORDS = ("label", "caption")


@dataclass(frozen=True)
class Grid:
    """A finished picture, `source` a PNG as a data: URL, in `rows` x `columns` positions.

    `step` is the step of the last code written at each position, row by row, and `log_prob` the
    nats of all its codes.
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
    """The history of one sample, by the positions of its canvas.

    `kind` names the drawing of the page ("flow": pieces of text in a row; "grid": the positions
    of a picture, in `grid`, and the pieces of its words beside it). `pieces` is the final text of
    each position, `step` the step at which it was last written (0 is given) and `log_prob` the
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
    """Records the step at which each position of a batch was last written."""

    def __init__(self, run: Generation) -> None:
        self.run, canvas, valid = run, run.canvas, run.valid
        self.valid = torch.ones_like(canvas, dtype=torch.bool) if valid is None else valid
        self.tokens = canvas
        self.step = torch.zeros_like(canvas)
        self.own_steps = torch.zeros(len(canvas), dtype=torch.int64, device=canvas.device)
        self.log_prob = torch.zeros(canvas.shape, dtype=torch.float64, device=canvas.device)

    def add(self, state: State) -> None:
        """One more state; each sample counts the steps in which a token of it changed."""
        changed = (state.tokens != self.tokens) | state.revealed
        self.own_steps = self.own_steps + changed.any(1)
        self.step = torch.where(changed, self.own_steps[:, None], self.step)
        self.log_prob = torch.where(changed, state.log_prob.double(), self.log_prob)
        self.tokens = state.tokens

    def records(self, figures: Sequence[str]) -> list[Record]:
        """One record of text a sample, with a line of figures for each."""
        return [
            Record("flow", *self._flow(row), int(self.own_steps[row]), line)
            for row, line in enumerate(figures)
        ]

    def picture_records(
        self, modality: ImageModality, figures: Sequence[str], pictures: Sequence[Image]
    ) -> list[Record]:
        """One record of a picture a sample, with a line of figures for each."""
        found = []
        for row, (line, picture) in enumerate(zip(figures, pictures)):
            flow = self._flow(row)
            words, grid = _words(modality, flow, picture), _grid(modality, flow, picture)
            found.append(Record("grid", *words, int(self.own_steps[row]), line, grid))
        return found

    def _flow(self, row: int) -> Flow:
        valid = self.valid[row]
        return (
            [piece or "" for piece in self.run.pieces(row)],
            self.step[row][valid].tolist(),
            [round(x, 3) for x in self.log_prob[row][valid].tolist()],
        )


# The pieces, steps and nats of the positions of a canvas, or of a part of it, in order.
Flow = tuple[list[str], list[int], list[float]]


def _grid(modality: ImageModality, flow: Flow, picture: Image) -> Grid:
    rows, columns = modality.latent_grid
    each = modality.codec.codes_per_position
    first = modality.span("image").start
    starts = range(first, first + rows * columns * each, each)
    _, step, log_prob = flow
    return Grid(
        source=data_url(picture),
        width=picture.width,
        height=picture.height,
        rows=rows,
        columns=columns,
        step=[max(step[start : start + each]) for start in starts],
        log_prob=[round(sum(log_prob[start : start + each]), 3) for start in starts],
    )


def _words(modality: ImageModality, flow: Flow, picture: Image) -> Flow:
    """The words of a picture: parts of its canvas, and a label that is a condition."""
    pieces: list[str] = []
    step: list[int] = []
    log_prob: list[float] = []
    for name in WORDS:
        words = picture.info.get(name)
        if words is None:
            continue
        if pieces:
            # A line break, given.
            pieces, step, log_prob = [*pieces, "\n"], [*step, 0], [*log_prob, 0.0]
        if name not in modality.part_names:
            pieces, step, log_prob = [*pieces, str(words)], [*step, 0], [*log_prob, 0.0]
            continue
        span = modality.span(name)
        pieces += [str(words)] if name == "label" else flow[0][span]
        step, log_prob = step + flow[1][span], log_prob + flow[2][span]
    return pieces, step, log_prob


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
    return re.sub("%%([A-Z]+)%%", lambda match: parts[match[1]], template)
