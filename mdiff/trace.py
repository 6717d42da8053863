"""A page on which one can scrub through the order in which the tokens appeared."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from mdiff.filling import State
from mdiff.tokens import TokenSpace

TEMPLATE = "trace.html"


@dataclass(frozen=True)
class Record:
    """How one sample came about, place by place of its canvas.

    `kind` names the drawing of the page that shows it ("flow": pieces of text in a row).
    `pieces` is what each place holds in the end, `step` when it was last written (0 is given)
    and `log_prob` the nats of that draw. `figures` is a line about the sample.
    """

    kind: str
    pieces: list[str]
    step: list[int]
    log_prob: list[float]
    steps: int
    figures: str


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

    def records(self, modality: Any, figures: Sequence[str]) -> list[Record]:
        """One record a sample, with a line of figures for each."""
        found = []
        for row, line in enumerate(figures):
            seen = self.valid[row]
            pieces = modality.pieces(self.tokens[row][seen].tolist())
            found.append(
                Record(
                    kind="flow",
                    pieces=[piece or "" for piece in pieces],
                    step=self.step[row][seen].tolist(),
                    log_prob=[round(x, 3) for x in self.log_prob[row][seen].tolist()],
                    steps=int(self.own_steps[row]),
                    figures=line,
                )
            )
        return found


def page(records: Sequence[Record], *, title: str) -> str:
    """A self-contained HTML page of the records; it fetches nothing.

    Text from the model never becomes markup: it travels as JSON without angle brackets, and
    the page sets it as text.
    """
    data = json.dumps([asdict(record) for record in records], ensure_ascii=True)
    for character, escape in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        data = data.replace(character, escape)
    plain = "\n\n".join("".join(record.pieces) for record in records)
    template = (files("mdiff") / TEMPLATE).read_text(encoding="utf-8")
    parts = {"TITLE": html.escape(title), "PLAIN": html.escape(plain), "DATA": data}
    return re.sub("%%([A-Z]+)%%", lambda place: parts[place[1]], template)
