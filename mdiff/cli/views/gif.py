"""An animated GIF of pictures as they are filled in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mdiff.cli.views.grid import enlarged, fitting_scale, grid_of

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor

    from mdiff.modalities import ShowsImages

# From a row's number and its picture to the picture that is shown.
Finish = Callable[[int, "Image"], "Image"]

FRAMES = 32
FRAME_MS = 120
LAST_MS = 2500
# A film is enlarged less than a grid: its file grows with each frame.
SIDE = 400
# The colours of a GIF but for the one that stands for "as before", and the number of frames that
# they are chosen from.
COLOURS = 255
SAMPLED = 4


class Reel:
    """The canvases (B, L) of one batch in order, thinned evenly to fewer than 2 * FRAMES."""

    def __init__(self, canvas: Tensor, finish: Finish) -> None:
        self.finish = finish
        self.kept = [canvas]
        self.last = canvas
        self.count = 0
        self.stride = 1

    def add(self, tokens: Tensor) -> None:
        """One more state."""
        self.last = tokens
        self.count += 1
        if self.count % self.stride == 0:
            self.kept.append(tokens)
        if len(self.kept) >= 2 * FRAMES:
            self.kept = self.kept[::2]
            self.stride *= 2

    def at(self, share: float) -> Tensor:
        """The canvases after a share of the way, 0 the first and 1 the last."""
        if share >= 1:
            return self.last
        return self.kept[round(share * (len(self.kept) - 1))]


class Film:
    """The reels of all batches, shown side by side."""

    def __init__(self, modality: ShowsImages) -> None:
        self.modality = modality
        self.reels: list[Reel] = []

    def reel(self, canvas: Tensor, finish: Finish) -> Reel:
        """A reel for one more batch."""
        self.reels.append(Reel(canvas, finish))
        return self.reels[-1]

    def frames(self, *, columns: int | None = None) -> list[Image]:
        """The grids from the first state to the last, hidden positions grey."""
        count = min(FRAMES, max(len(reel.kept) for reel in self.reels) + 1)
        shares = [number / max(1, count - 1) for number in range(count)]
        return [grid_of(self._pictures(share), columns=columns) for share in shares]

    def _pictures(self, share: float) -> list[Image]:
        from mdiff.modalities.image import as_picture

        return [
            reel.finish(row, as_picture(picture))
            for reel in self.reels
            for row, picture in enumerate(self.modality.shown(reel.at(share).cpu()))
        ]


def write_gif(frames: Sequence[Image], path: Path, *, scale: int | None = None) -> None:
    """Write frames of one size as a GIF that repeats, its last frame held.

    All frames share one table of colours, so that what does not change does not flicker;
    frames that are the same are shown as one. The pixels become squares of `scale`; None is as
    large as fits.
    """
    table = _table(frames)
    factor = fitting_scale(frames[0], side=SIDE) if scale is None else scale
    kept: list[Image] = []
    for frame in frames:
        drawn = enlarged(_in_colours(frame, table), factor)
        if not kept or drawn.tobytes() != kept[-1].tobytes():
            kept.append(drawn)
    kept[0].save(
        path, save_all=True, append_images=kept[1:], loop=0, optimize=True,
        duration=[*[FRAME_MS] * (len(kept) - 1), LAST_MS],
    )  # fmt: skip


def _in_colours(frame: Image, table: Image) -> Image:
    from PIL import Image

    return frame.convert("RGB").quantize(palette=table, dither=Image.Dither.NONE)


def _table(frames: Sequence[Image]) -> Image:
    """A picture with the colours of some frames, and exactly white and the grey of the mask."""
    from PIL import Image

    from mdiff.modalities.image import GREY

    width, height = frames[0].size
    sampled = Image.new("RGB", (width, height * SAMPLED))
    for number in range(SAMPLED):
        frame = frames[number * (len(frames) - 1) // (SAMPLED - 1)]
        sampled.paste(frame.convert("RGB"), (0, number * height))
    exact = [255] * 3 + [GREY] * 3
    rest = COLOURS - len(exact) // 3
    table = sampled.quantize(rest, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    found = (table.getpalette() or [])[: 3 * rest]
    table.putpalette(exact + found + [0] * (3 * COLOURS - len(exact) - len(found)))
    return table
