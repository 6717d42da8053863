"""The canvas on stderr, drawn as the sampler fills it in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from mdiff.cli.views.console import is_coloured, message, printable
from mdiff.cli.views.revisions import REWRITTEN, TAKEN_BACK, Revisions

if TYPE_CHECKING:
    from rich.console import Console

    from mdiff.pipeline import Generation
    from mdiff.sampling import State

HIDDEN = "░"
HIDDEN_AGAIN = "▒"
FRAMES_A_SECOND = 12
# Where nothing can be redrawn, this many snapshots are printed one below the other.
SNAPSHOTS = 10


def watched(run: Generation) -> Iterator[State]:
    """The states of a run, its first sample drawn as it fills in.

    What is hidden again has another shade, and what holds another token than before a line below.
    """
    if sys.stderr.isatty():
        from rich.console import Console

        console = Console(stderr=True, no_color=not is_coloured(sys.stderr), highlight=False)
        # rich draws nothing where TERM=dumb, or TTY_COMPATIBLE=0, says that it could not.
        if console.is_terminal and not console.is_dumb_terminal:
            yield from _redrawn(run, console)
            return
    yield from _printed(run)


def _redrawn(run: Generation, console: Console) -> Iterator[State]:
    from rich.live import Live
    from rich.text import Text

    marks, (hidden, begin) = _Marks(run), _shown(run)
    back, rewritten = (f"rgb({','.join(map(str, rgb))})" for rgb in (TAKEN_BACK, REWRITTEN))

    def frame(fresh: list[bool]) -> Text:
        shown = Text()
        marked = list(zip(run.pieces(0), fresh, *marks.add()))
        for piece, new, again, other in marked[begin:]:
            if piece is None:
                shown.append(HIDDEN_AGAIN if again else HIDDEN, back if again else "dim")
                continue
            styles = ["bold"] * new + [f"underline {rewritten}"] * other
            shown.append(printable(piece), " ".join(styles))
        return shown

    first = frame([False] * len(hidden))
    with Live(first, console=console, refresh_per_second=FRAMES_A_SECOND, transient=True) as live:
        for state in run:
            live.update(frame(state.revealed[0][marks.unpadded].tolist()))
            yield state


class _Marks:
    """Of the first sample: which positions are hidden again, and which were ever rewritten."""

    def __init__(self, run: Generation) -> None:
        self.run, self.unpadded = run, slice(None) if run.valid is None else run.valid[0]
        self.revisions = Revisions(run.canvas[:1], run.mask_id)
        self.taken_back = self.rewritten = torch.zeros_like(run.canvas[:1], dtype=torch.bool)

    def add(self) -> tuple[list[bool], list[bool]]:
        """Those of the current canvas, one entry a token."""
        again, other = self.revisions.add(self.run.tally.tokens[:1])
        self.taken_back, self.rewritten = self.taken_back | again, self.rewritten | other
        return again[0][self.unpadded].tolist(), self.rewritten[0][self.unpadded].tolist()


def _shown(run: Generation) -> tuple[list[bool], int]:
    """Whether each position is to be written, and the first to show: of a chat, of the answer."""
    hidden = run.hidden(0)
    return hidden, 0 if run.ending.echo or True not in hidden else hidden.index(True)


def _printed(run: Generation) -> Iterator[State]:
    hidden, begin = _shown(run)
    total = max(1, sum(hidden))
    printed, marks, shown, last = 0, _Marks(run), "", ""
    for state in run:
        pieces, (again, other) = run.pieces(0), marks.add()
        done = sum(piece is not None for piece, new in zip(pieces, hidden) if new)
        counts = {"taken back": int(marks.taken_back.sum()), "rewritten": sum(other)}
        head = [f"{done}/{total}", *(f"{n} {words}" for words, n in counts.items() if n)]
        text = "".join(
            (HIDDEN_AGAIN if back else HIDDEN) if piece is None else piece
            for piece, back in list(zip(pieces, again))[begin:]
        )
        shown = f"[{', '.join(head)}] {printable(text)}"
        if done * SNAPSHOTS // total > printed:
            printed, last = done * SNAPSHOTS // total, shown
            message(shown)
        yield state
    if shown != last:
        # Rewritten after the last mask was gone.
        message(shown)
