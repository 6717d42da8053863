"""The canvas on stderr, drawn as the sampler fills it in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mdiff.cli.views.console import is_coloured, message, printable

if TYPE_CHECKING:
    from rich.console import Console

    from mdiff.pipeline import Generation
    from mdiff.sampling import State

HIDDEN = "░"
FRAMES_A_SECOND = 12
# Where nothing can be redrawn, this many snapshots are printed one below the other.
SNAPSHOTS = 10


def watched(run: Generation) -> Iterator[State]:
    """The states of a run, its first sample drawn as it fills in."""
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

    unpadded = run.valid[0].nonzero()[:, 0] if run.valid is not None else slice(None)

    def frame(fresh: list[bool]) -> Text:
        shown = Text()
        for piece, new in zip(run.pieces(0), fresh):
            style = "dim" if piece is None else "bold" if new else ""
            shown.append(HIDDEN if piece is None else printable(piece), style)
        return shown

    first = frame([False] * len(run.tokens(0)))
    with Live(first, console=console, refresh_per_second=FRAMES_A_SECOND, transient=True) as live:
        for state in run:
            live.update(frame(state.revealed[0][unpadded].tolist()))
            yield state


def _printed(run: Generation) -> Iterator[State]:
    total = max(1, sum(piece is None for piece in run.pieces(0)))
    printed = 0
    for state in run:
        pieces = run.pieces(0)
        done = total - sum(piece is None for piece in pieces)
        if done * SNAPSHOTS // total > printed:
            printed = done * SNAPSHOTS // total
            text = "".join(HIDDEN if piece is None else piece for piece in pieces)
            message(f"[{done}/{total}] {printable(text)}")
        yield state
