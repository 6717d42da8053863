"""An animated GIF of pictures as they are filled in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mdiff.cli.views.grid import enlarged, fitting_scale, grid_of
from mdiff.cli.views.revisions import REWRITTEN, TAKEN_BACK, Revisions

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor

    from mdiff.modalities.image import ImageModality

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
# Of 255, by how much a rewritten position takes its colour.
TINT = 150


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

    def __init__(self, modality: ImageModality) -> None:
        self.modality = modality
        self.reels: list[Reel] = []
        # Whether a frame shows that a token was taken back or rewritten.
        self.is_marked = False

    def reel(self, canvas: Tensor, finish: Finish) -> Reel:
        """A reel for one more batch."""
        self.reels.append(Reel(canvas, finish))
        return self.reels[-1]

    def frames(self, *, columns: int | None = None) -> list[Image]:
        """The grids from the first state to the last, hidden positions grey.

        A position that is hidden again is filled with TAKEN_BACK, and one that holds another
        token than in the frames before is tinted with REWRITTEN in this frame.
        """
        count = min(FRAMES, max(len(reel.kept) for reel in self.reels) + 1)
        shown = [Revisions(reel.kept[0], self.modality.space.mask_id) for reel in self.reels]
        shares = [number / max(1, count - 1) for number in range(count)]
        frames = [self._pictures(share, shown) for share in shares]
        if self.is_marked:
            # The last one is held: without marks.
            frames.append(self._pictures(1.0, shown))
        return [grid_of(pictures, columns=columns) for pictures in frames]

    def _pictures(self, share: float, shown: Sequence[Revisions]) -> list[Image]:
        from mdiff.modalities.image import as_picture

        found = []
        for reel, before in zip(self.reels, shown):
            tokens = reel.at(share)
            marks = [self._positions(each).cpu() for each in before.add(tokens)]
            for row, picture in enumerate(self.modality.shown(tokens.cpu())):
                finished = reel.finish(row, as_picture(picture))
                found.append(self._marked(finished, *(each[row] for each in marks)))
        return found

    def _positions(self, codes: Tensor) -> Tensor:
        """The positions (B, h, w) bool of pictures with such a code, of the canvas' (B, L) bool."""
        layout = (*self.modality.latent_grid, self.modality.codec.codes_per_position)
        return codes[:, self.modality.span("image")].reshape(-1, *layout).any(3)

    def _marked(self, picture: Image, taken_back: Tensor, rewritten: Tensor) -> Image:
        from PIL import Image

        for at, colour, tint in ((taken_back, TAKEN_BACK, 255), (rewritten, REWRITTEN, TINT)):
            if bool(at.any()):
                self.is_marked, picture = True, picture.convert("RGB")
                cover = Image.fromarray((at * tint).byte().numpy())
                cover = cover.resize(picture.size, Image.Resampling.NEAREST)
                picture.paste(colour, (0, 0), cover)
        return picture


def write_gif(
    frames: Sequence[Image], path: Path, *, scale: int | None = None,
    colours: Sequence[tuple[int, int, int]] = (),
) -> None:  # fmt: skip
    """Write frames of one size as a GIF that repeats, its last frame held.

    All frames share one table of colours, so that what does not change does not flicker;
    frames that are the same are shown as one, and `colours` are exact. The pixels become
    squares of `scale`; None is as large as fits.
    """
    table = _table(frames, colours)
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


def _table(frames: Sequence[Image], colours: Sequence[tuple[int, int, int]]) -> Image:
    """A picture with the colours of some frames; white, the mask's grey and `colours` exactly."""
    from PIL import Image

    from mdiff.modalities.image import GREY

    width, height = frames[0].size
    sampled = Image.new("RGB", (width, height * SAMPLED))
    for number in range(SAMPLED):
        frame = frames[number * (len(frames) - 1) // (SAMPLED - 1)]
        sampled.paste(frame.convert("RGB"), (0, number * height))
    exact = [255] * 3 + [GREY] * 3 + [part for colour in colours for part in colour]
    rest = COLOURS - len(exact) // 3
    table = sampled.quantize(rest, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    found = (table.getpalette() or [])[: 3 * rest]
    table.putpalette(exact + found + [0] * (3 * COLOURS - len(exact) - len(found)))
    return table
