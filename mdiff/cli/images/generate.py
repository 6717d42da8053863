"""Pictures for `mdiff generate` and `mdiff edit`: generated, written and reported."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from mdiff.cli.images.requests import Request, refuse_problems, refuse_unknown, with_pictures
from mdiff.cli.rules import PICTURES
from mdiff.cli.views.console import message, printable, result, result_json, writable
from mdiff.cli.views.gif import Film, Finish, write_gif
from mdiff.cli.views.grid import picture_target, write_pictures
from mdiff.cli.views.revisions import TAKEN_BACK
from mdiff.cli.views.samples import entries, figures, summary
from mdiff.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from mdiff.cli.views.trace import Record
    from mdiff.modalities.image import ImageModality
    from mdiff.pipeline import CallOptions, Generated, Generation, Pipeline

# Seconds between two messages on the progress of a long job.
REPORT_EVERY = 10.0


@dataclass(frozen=True)
class Wanted:
    """Where pictures and their trace go: `out` is a grid or a folder, `scale` enlarges a grid.

    A grid has `columns`, or is about square.
    """

    out: Path | None
    scale: int | None
    trace: Path | None
    as_json: bool
    title: str
    columns: int | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and self.scale < 1:
            raise ConfigError(f"--scale-up {self.scale}: need at least 1")
        if self.out is not None:
            picture_target(self.out)
        writable(self.trace)

    def of(self, requests: int, num_samples: int) -> Wanted:
        """With a row of the grid for each request where several have several samples."""
        return replace(self, columns=num_samples) if min(requests, num_samples) > 1 else self

    def with_target(self, name: str) -> Wanted:
        """With a file for the grid where none was given: a new .png of this name, here."""
        if self.out is not None:
            return self
        stem = Path(name).resolve().name or "pictures"
        numbered = (f"{stem}-{number}.png" if number > 1 else f"{stem}.png" for number in count(1))
        out = next(path for path in map(Path, numbered) if not path.exists())
        message(f"no --out: the grid goes to {out}")
        return replace(self, out=picture_target(out))


def is_film(trace: Path) -> bool:
    """Whether a trace is an animated GIF rather than a page."""
    return trace.suffix.lower() == ".gif"


def shows_pictures(pipeline: Pipeline) -> bool:
    """Whether the model is one of pictures."""
    from mdiff.modalities import ShowsImages

    return isinstance(pipeline.modality, ShowsImages)


def medium_of(pipeline: Pipeline) -> str:
    """The medium of a model, for its rules on options."""
    return PICTURES if shows_pictures(pipeline) else pipeline.modality.name


def generate_pictures(
    pipeline: Pipeline, asked: Sequence[dict[str, str]], *, model: str, num_samples: int,
    wanted: Wanted, resize: bool, options: CallOptions,
) -> None:  # fmt: skip
    """Generate samples of each request; a file that cannot be read is reported at the end."""
    from mdiff.modalities import TextConditional
    from mdiff.modalities.image import image_modality

    modality = image_modality(pipeline.modality)
    refuse_unknown(modality, asked)
    requests, problems = with_pictures(modality, asked, resize=resize)
    given = [request.given for request in requests]
    canvases = pipeline.canvases(given, length=modality.length, num_samples=num_samples)
    if not any(modality.space.mask_id in canvas for canvas in canvases):
        raise ConfigError(
            f"nothing is left to generate: this model makes {', '.join(modality.part_names)}; "
            "a picture is changed by mdiff edit"
        )
    guides = options.get("guidance_scale") not in (None, 1) and not options.get("negative_prompt")
    said = not isinstance(modality, TextConditional) or any("caption" in each for each in given)
    if guides and not said:
        raise ConfigError("guidance_scale without a condition has no effect: give --prompt")
    conditions = pipeline.conditions(given, num_samples=num_samples)
    runs = pipeline.runs(canvases, conditions=conditions, **options)

    def labelled(run: Generation) -> Finish:
        def finish(row: int, picture: Image) -> Image:
            known = given[(run.first + row) // num_samples].get("label")
            if modality.classes and modality.labels and isinstance(known, str):
                picture.info["label"] = modality.labels[modality.label_id(known)]
            return picture

        return finish

    wanted = wanted.of(len(requests), num_samples)
    samples = fill_in(modality, ((run, labelled(run)) for run in runs), wanted)
    if not all("image" in known for known in given):
        wanted = wanted.with_target(model.rpartition(":")[2])
    report(modality, samples, [each for each in requests for _ in range(num_samples)], wanted)
    refuse_problems(problems, len(requests))


def fill_in(
    modality: ImageModality, runs: Iterable[tuple[Generation, Finish]], wanted: Wanted
) -> list[Generated]:
    """Every run to its end, each picture finished by the function beside it; the trace written."""
    if wanted.trace is None:
        return followed(modality, runs, recording=False)[0]
    if is_film(wanted.trace):
        film = Film(modality)
        samples, _ = followed(modality, runs, film=film, recording=False)
        frames = film.frames(columns=wanted.columns)
        colours = (TAKEN_BACK,) if film.is_marked else ()
        write_gif(frames, wanted.trace, scale=wanted.scale, colours=colours)
        if film.is_marked:
            message("in the film: magenta is taken back and hidden again, tinted blue is rewritten")
    else:
        from mdiff.cli.views.trace import page

        samples, records = followed(modality, runs)
        wanted.trace.write_text(page(records, title=wanted.title), encoding="utf-8")
    message(f"wrote {wanted.trace}")
    return samples


def followed(
    modality: ImageModality, runs: Iterable[tuple[Generation, Finish]], *,
    film: Film | None = None, recording: bool = True,
) -> tuple[list[Generated], list[Record]]:  # fmt: skip
    """The finished samples of every run, with their records and frames where asked for."""
    from mdiff.cli.views.trace import Recorder

    samples: list[Generated] = []
    records: list[Record] = []
    reported = time.monotonic()
    for run, finish in runs:
        recorder = Recorder(run)
        reel = None if film is None else film.reel(run.canvas, finish)
        for state in run:
            if time.monotonic() - reported > REPORT_EVERY:
                reported = time.monotonic()
                hidden = (state.tokens == modality.space.mask_id).double().mean()
                share = round(100 * (1 - float(hidden)))
                message(f"{len(samples)} made, {len(state.tokens)} more {share} percent filled in")
            if recording:
                recorder.add(state)
            if reel is not None:
                reel.add(state.tokens)
        drawn = [(sample, sample.image) for sample in run.finished()]
        done = [
            replace(sample, output=finish(row, image))
            for row, (sample, image) in enumerate(drawn)
            if image is not None
        ]
        samples += done
        if recording:
            lines = [figures(sample) for sample in done]
            records += recorder.picture_records(modality, lines, pictures_of(done))
    return samples, records


def pictures_of(samples: Sequence[Generated]) -> list[Image]:
    """The pictures of samples."""
    return [image for sample in samples if (image := sample.image) is not None]


def report(
    modality: ImageModality, samples: Sequence[Generated], requests: Sequence[Request],
    wanted: Wanted,
) -> None:  # fmt: skip
    """Write the pictures; print their paths, and the generated words of those that were given."""
    pictures = pictures_of(samples)
    files: Sequence[Path | None] = [None] * len(samples)
    if wanted.out is not None:
        files = write_pictures(pictures, wanted.out, scale=wanted.scale, columns=wanted.columns)
    several = len({request.source for request in requests}) > 1
    for number, (sample, picture, request, file) in enumerate(
        zip(samples, pictures, requests, files)
    ):
        known = {name: picture.info.get(name) for name in ("label", "caption")}
        words = {name: str(text) for name, text in known.items() if text is not None}
        fresh = ": ".join(
            text
            for name, text in words.items()
            if name in modality.part_names and name not in request.given
        )
        if wanted.as_json:
            source = {} if request.source is None else {"picture": str(request.source)}
            where = {"text": fresh} if file is None else {"file": str(file)}
            result_json({**source, **where, **words, **entries(sample)})
        elif "image" in request.given:
            line = " ".join(fresh.split())
            result(f"{request.source}: {line}" if several else line)
        elif fresh:
            message(f"{number}: {printable(' '.join(fresh.split()))}")
    if wanted.out is not None and not wanted.as_json:
        result(str(wanted.out))
    message(summary(samples))
