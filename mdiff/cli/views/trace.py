"""A page that replays the order in which the tokens were revealed."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch

from mdiff.modalities import EndsText

if TYPE_CHECKING:
    from PIL.Image import Image

    from mdiff.modalities.image import ImageModality
    from mdiff.pipeline import Generation
    from mdiff.sampling import State

TEMPLATE = "trace.html"
# The words of a picture, in the order in which they are shown.
WORDS = ("label", "caption")
# Of nats.
DECIMALS = 3


class Stint(NamedTuple):
    """What a position held from step `first` until step `last`, where it lost that token."""

    piece: str
    first: int
    last: int


class Position(NamedTuple):
    """One position of a finished canvas: its piece of text, and how its token came about.

    `step` is the step at which the token came to stand there for good (0 is given), `log_prob`,
    `entropy` and `margin` are those of its last draw, `times` how often the position was written
    and `past` what it held before.
    """

    piece: str
    step: int = 0
    log_prob: float = 0.0
    entropy: float = 0.0
    margin: float = 0.0
    times: int = 0
    past: tuple[Stint, ...] = ()


@dataclass(frozen=True)
class Grid:
    """A finished picture, `source` a PNG as a data: URL, in `rows` x `columns` positions.

    `step` is the step of the last code written at each position, row by row, and `log_prob` the
    nats of all its codes; so is `entropy`. `margin` is the least and `times` the most of a code,
    `past` when all codes were there but not yet all for good.
    """

    source: str
    width: int
    height: int
    rows: int
    columns: int
    step: list[int]
    log_prob: list[float]
    entropy: Sequence[float] = ()
    margin: Sequence[float] = ()
    times: Sequence[int] = ()
    past: Sequence[Sequence[Stint]] = ()


@dataclass(frozen=True)
class Record:
    """The history of one sample, by the positions of its canvas.

    `kind` names the drawing of the page ("flow": pieces of text in a row; "grid": the positions
    of a picture, in `grid`, and the pieces of its words beside it). `pieces` is the final text of
    each position; it and the others are the fields of `Position`, `past` empty where no position
    has any. `figures` is a line about the sample.
    """

    kind: str
    pieces: list[str]
    step: list[int]
    log_prob: list[float]
    steps: int
    figures: str
    grid: Grid | None = None
    entropy: Sequence[float] = ()
    margin: Sequence[float] = ()
    times: Sequence[int] = ()
    past: Sequence[Sequence[Stint]] = ()


class Recorder:
    """Records the steps at which each position of a batch held which token."""

    def __init__(self, run: Generation) -> None:
        self.run, canvas, valid = run, run.canvas, run.valid
        self.valid = torch.ones_like(canvas, dtype=torch.bool) if valid is None else valid
        self.tokens = canvas
        self.step = torch.zeros_like(canvas)
        self.own_steps = torch.zeros(len(canvas), dtype=torch.int64, device=canvas.device)
        # By row and column.
        self.past: dict[tuple[int, int], list[Stint]] = defaultdict(list)

    def add(self, state: State) -> None:
        """One more state; each sample counts the steps in which a token of it was written."""
        changed = state.tokens != self.tokens
        self.own_steps = self.own_steps + (changed | state.revealed).any(1)
        lost = changed & (self.tokens != self.run.mask_id)
        for row in lost.any(1).nonzero()[:, 0].tolist():
            columns = self.valid[row].nonzero()[:, 0].tolist()
            ids, medium = self.tokens[row, columns].tolist(), self.run.modality
            if isinstance(medium, EndsText):
                before = medium.pieces(ids, whole=True)
            else:
                before = medium.pieces(ids)
            steps, now = self.step[row].tolist(), int(self.own_steps[row])
            pieces = dict(zip(columns, before))
            for column in lost[row].nonzero()[:, 0].tolist():
                stint = Stint(pieces[column] or "", steps[column], now)
                self.past[row, column].append(stint)
        self.step = torch.where(changed, self.own_steps[:, None], self.step)
        self.tokens = state.tokens

    def records(self, figures: Sequence[str]) -> list[Record]:
        """One record of text a sample, with a line of figures for each."""
        return [
            self._record("flow", row, line, self._flow(row)) for row, line in enumerate(figures)
        ]

    def picture_records(
        self, modality: ImageModality, figures: Sequence[str], pictures: Sequence[Image]
    ) -> list[Record]:
        """One record of a picture a sample, with a line of figures for each."""
        found = []
        for row, (line, picture) in enumerate(zip(figures, pictures)):
            flow = self._flow(row)
            words, grid = _words(modality, flow, picture), _grid(modality, flow, picture)
            found.append(self._record("grid", row, line, words, grid))
        return found

    def _record(
        self, kind: str, row: int, line: str, flow: Sequence[Position], grid: Grid | None = None
    ) -> Record:
        pieces, steps = [position.piece for position in flow], int(self.own_steps[row])
        return Record(
            kind=kind, pieces=pieces, steps=steps, figures=line, grid=grid, **_columns(flow)
        )

    def _flow(self, row: int) -> list[Position]:
        columns = self.valid[row].nonzero()[:, 0].tolist()
        writing = self.run.tally.writing.of_row(row, self.valid)
        return [
            Position(
                piece or "", step, round(log_prob, DECIMALS), round(entropy, DECIMALS),
                round(margin, DECIMALS), times, tuple(self.past.get((row, column), ())),
            )
            for piece, step, column, _, log_prob, entropy, margin, times in zip(
                self.run.pieces(row), self.step[row, columns].tolist(), columns, *writing
            )
        ]  # fmt: skip


class Columns(TypedDict):
    """The fields of positions from `step` on, one list each."""

    step: list[int]
    log_prob: list[float]
    entropy: Sequence[float]
    margin: Sequence[float]
    times: Sequence[int]
    past: Sequence[Sequence[Stint]]


def _columns(positions: Sequence[Position]) -> Columns:
    past = [each.past for each in positions]
    return {
        "step": [each.step for each in positions],
        "log_prob": [each.log_prob for each in positions],
        "entropy": [each.entropy for each in positions],
        "margin": [each.margin for each in positions],
        "times": [each.times for each in positions],
        "past": past if any(past) else (),
    }


def _grid(modality: ImageModality, flow: Sequence[Position], picture: Image) -> Grid:
    rows, columns = modality.latent_grid
    each = modality.codec.codes_per_position
    first = modality.span("image").start
    starts = range(first, first + rows * columns * each, each)
    positions = [_joined(flow[start : start + each]) for start in starts]
    size = picture.width, picture.height
    return Grid(data_url(picture), *size, rows, columns, **_columns(positions))


def _joined(codes: Sequence[Position]) -> Position:
    """The position of a picture that several codes make up."""
    held = [[*((each.first, each.last) for each in code.past), (code.step, None)] for code in codes]
    past, final = [], max(code.step for code in codes)
    ends = sorted({end for spans in held for span in spans for end in span if end is not None})
    for first, last in pairwise(end for end in ends if end <= final):
        if all(any(a <= first and (b is None or first < b) for a, b in spans) for spans in held):
            past.append(Stint("", first, last))
    return Position(
        "", final, round(sum(code.log_prob for code in codes), DECIMALS),
        round(sum(code.entropy for code in codes), DECIMALS),
        min(code.margin for code in codes), max(code.times for code in codes), tuple(past),
    )  # fmt: skip


def _words(modality: ImageModality, flow: Sequence[Position], picture: Image) -> list[Position]:
    """The words of a picture: parts of its canvas, and a label that is a condition."""
    found: list[Position] = []
    for name in WORDS:
        words = picture.info.get(name)
        if words is None:
            continue
        if found:
            # A line break, given.
            found.append(Position("\n"))
        if name not in modality.part_names:
            found.append(Position(str(words)))
        elif name == "label":
            found += [each._replace(piece=str(words)) for each in flow[modality.span(name)]]
        else:
            found += flow[modality.span(name)]
    return found


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
