"""What generate and edit do for models of pictures: fill in, write, and say so."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdiff.cli.images.requests import Request, refuse_problems, refuse_unknown, with_pictures
from mdiff.cli.views.console import message, printable, result, result_json, writable
from mdiff.cli.views.gif import Film, Finish, write_gif
from mdiff.cli.views.grid import picture_target, write_pictures
from mdiff.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from mdiff.cli.views.trace import Record
    from mdiff.pipeline import Generated, Generation, Pipeline

# Seconds between two messages about how far a long job is.
SAY_EVERY = 10.0


@dataclass(frozen=True)
class Wanted:
    """Where pictures go: `out` a grid or a folder, enlarged by `scale`, and how they came about.

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

    def of(self, requests: int, n: int) -> Wanted:
        """With a row of the grid for each request where several have several samples."""
        return replace(self, columns=n) if min(requests, n) > 1 else self

    @property
    def is_film(self) -> bool:
        """Whether the trace is an animated GIF rather than a page."""
        return self.trace is not None and self.trace.suffix.lower() == ".gif"


def shows_pictures(pipeline: Pipeline) -> bool:
    """Whether the model is one of pictures."""
    from mdiff.modalities import ShowsImages

    return isinstance(pipeline.modality, ShowsImages)


def generate_pictures(
    pipeline: Pipeline, asked: Sequence[dict[str, str]], *, model: str, n: int, wanted: Wanted,
    resize: bool = False, **options: Any,
) -> None:  # fmt: skip
    """`n` samples for each of what is asked; a file that cannot be read is reported at the end."""
    from mdiff.modalities.image import image_modality

    modality = image_modality(pipeline.modality)
    refuse_unknown(modality, asked)
    requests, problems = with_pictures(modality, asked, resize=resize)
    given = [request.given for request in requests]
    canvases = pipeline.canvases(given, length=modality.length, num_samples=n)
    if not any(modality.space.mask_id in canvas for canvas in canvases):
        raise ConfigError(
            f"nothing is left to make: this model makes {', '.join(modality.part_names)}; "
            "a picture is changed by mdiff edit"
        )
    runs = pipeline.runs(canvases, conditions=pipeline.conditions(given, num_samples=n), **options)

    def told(run: Generation) -> Finish:
        def finish(row: int, picture: Image) -> Image:
            known = given[(run.first + row) // n]
            if modality.classes and modality.labels and "label" in known:
                picture.info["label"] = modality.labels[modality.label_id(known["label"])]
            return picture

        return finish

    wanted = wanted.of(len(requests), n)
    samples = fill_in(modality, ((run, told(run)) for run in runs), wanted)
    whole = [request for request in requests for _ in range(n)]
    spoken = all("image" in known for known in given)
    if not spoken:
        wanted = placed(wanted, model.rpartition(":")[2])
    report(modality, samples, whole, wanted)
    refuse_problems(problems, len(requests))


def fill_in(
    modality: Any, runs: Iterable[tuple[Generation, Finish]], wanted: Wanted
) -> list[Generated]:
    """Every run to its end, each picture finished by the function beside it; the trace written."""
    from mdiff.cli.views.trace import page

    if wanted.trace is None:
        return followed(modality, runs, recording=False)[0]
    if wanted.is_film:
        film = Film(modality)
        samples, _ = followed(modality, runs, film=film, recording=False)
        write_gif(film.frames(columns=wanted.columns), wanted.trace, scale=wanted.scale)
    else:
        samples, records = followed(modality, runs)
        wanted.trace.write_text(page(records, title=wanted.title), encoding="utf-8")
    message(f"wrote {wanted.trace}")
    return samples


def followed(
    modality: Any, runs: Iterable[tuple[Generation, Finish]], *, film: Film | None = None,
    recording: bool = True,
) -> tuple[list[Generated], list[Record]]:  # fmt: skip
    """The finished samples of every run, with their records and frames where asked for."""
    from mdiff.cli.generate import figures
    from mdiff.cli.views.trace import Recorder

    samples: list[Generated] = []
    records: list[Record] = []
    said = time.monotonic()
    for run, finish in runs:
        recorder = Recorder(run.canvas, run.valid, space=modality.space)
        reel = None if film is None else film.reel(run.canvas, finish)
        for state in run:
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                hidden = (state.tokens == modality.space.mask_id).double().mean()
                share = round(100 * (1 - float(hidden)))
                message(f"{len(samples)} made, {len(state.tokens)} more {share} percent filled in")
            if recording:
                recorder.add(state)
            if reel is not None:
                reel.add(state.tokens)
        done = [
            replace(sample, output=finish(row, sample.output))
            for row, sample in enumerate(run.finished())
        ]
        samples += done
        if recording:
            records += recorder.records(
                modality, [figures(sample) for sample in done],
                pictures=[sample.output for sample in done],
            )  # fmt: skip
    return samples, records


def report(
    modality: Any, samples: Sequence[Generated], requests: Sequence[Request], wanted: Wanted
) -> None:
    """Write the pictures; print where they are, and what was said of those that were given."""
    files: Sequence[Path | None] = [None] * len(samples)
    if wanted.out is not None:
        made = [sample.output for sample in samples]
        files = write_pictures(made, wanted.out, scale=wanted.scale, columns=wanted.columns)
    several = len({request.source for request in requests}) > 1
    for number, (sample, request, file) in enumerate(zip(samples, requests, files)):
        said = {name: sample.output.info.get(name) for name in ("label", "caption")}
        said = {name: words for name, words in said.items() if words is not None}
        fresh = ": ".join(
            words for name, words in said.items()
            if name in modality.part_names and name not in request.given
        )  # fmt: skip
        if wanted.as_json:
            source = {} if request.source is None else {"picture": str(request.source)}
            where = {"text": fresh} if file is None else {"file": str(file)}
            result_json(source | where | said | _figures(sample))
        elif "image" in request.given:
            line = " ".join(fresh.split())
            result(f"{request.source}: {line}" if several else line)
        elif fresh:
            message(f"{number}: {printable(' '.join(fresh.split()))}")
    if wanted.out is not None and not wanted.as_json:
        result(str(wanted.out))
    message(summary(samples))


def _figures(sample: Generated) -> dict[str, Any]:
    return {
        "tokens": sample.tokens,
        "calls": sample.calls,
        "seconds": round(sample.seconds, 6),
        "log_prob": sample.log_prob,
        "entropy": sample.entropy,
        "seed": sample.seed,
    }


def summary(samples: Sequence[Generated]) -> str:
    """One line on how the samples came about."""
    calls = sorted({sample.calls for sample in samples})
    each = f"{calls[0]}" if len(calls) == 1 else f"{calls[0]} to {calls[-1]}"
    seconds = sum(sample.seconds for sample in samples)
    return f"{len(samples)} samples, {each} calls each, {seconds:.2f} s"


def placed(wanted: Wanted, name: str) -> Wanted:
    """With a place for the grid where none was given: a new .png of this name, here."""
    if wanted.out is not None:
        return wanted
    stem = Path(name).resolve().name or "pictures"
    numbered = (f"{stem}-{number}.png" if number > 1 else f"{stem}.png" for number in count(1))
    out = next(path for path in map(Path, numbered) if not path.exists())
    message(f"no --out: the grid goes to {out}")
    return replace(wanted, out=picture_target(out))
