"""What generate and edit do for models of pictures: read them, fill in, write, and say so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdiff.cli.console import message, printable, result, result_json, writable
from mdiff.cli.film import Film, Finish, write_gif
from mdiff.cli.grid import picture_target, write_pictures
from mdiff.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from mdiff.generation import Generated, Generation
    from mdiff.pipeline import Pipeline
    from mdiff.trace import Record

# What can be given, by the option that gives it.
OPTIONS = {"label": "--label", "caption": "--prompt", "image": "--image"}
# So many unreadable files are named; the rest are counted.
NAMED = 20


@dataclass(frozen=True)
class Wanted:
    """Where pictures go: `out` a grid or a folder, enlarged by `scale`, and how they came about."""

    out: Path | None
    scale: int | None
    trace: Path | None
    as_json: bool
    title: str

    def __post_init__(self) -> None:
        if self.scale is not None and self.scale < 1:
            raise ConfigError(f"--scale-up {self.scale}: need at least 1")
        if self.out is not None:
            picture_target(self.out)
        writable(self.trace)

    @property
    def is_film(self) -> bool:
        """Whether the trace is an animated GIF rather than a page."""
        return self.trace is not None and self.trace.suffix.lower() == ".gif"


@dataclass(frozen=True)
class Request:
    """What is given, by name as in `Pipeline.generate`, and the file that a picture is from."""

    given: dict[str, Any]
    source: Path | None = None


def shows_pictures(pipeline: Pipeline) -> bool:
    """Whether the model is one of pictures."""
    return hasattr(pipeline.modality, "shown")


def generate_pictures(
    pipeline: Pipeline, asked: Sequence[dict[str, str]], *, model: str, n: int, wanted: Wanted,
    resize: bool = False, **options: Any,
) -> None:  # fmt: skip
    """`n` samples for each of what is asked; a file that cannot be read is reported at the end."""
    modality = pipeline.modality
    refuse_unknown(modality, asked)
    requests, problems = with_pictures(modality, asked, resize=resize)
    given = [request.given for request in requests]
    canvases = pipeline.canvases(given, length=modality.length, n=n)
    if not any(modality.space.mask_id in canvas for canvas in canvases):
        raise ConfigError(
            f"nothing is left to make: this model makes {', '.join(modality.part_names)}; "
            "a picture is changed by mdiff edit"
        )
    runs = pipeline.runs(canvases, conditions=pipeline.conditions(given, n=n), **options)

    def told(run: Generation) -> Finish:
        def finish(row: int, picture: Image) -> Image:
            known = given[(run.first + row) // n]
            if modality.classes and "label" in known:
                picture.info["label"] = modality.labels[modality.label_id(known["label"])]
            return picture

        return finish

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
    from mdiff.trace import page

    if wanted.trace is None:
        return followed(modality, runs, recording=False)[0]
    if wanted.is_film:
        film = Film(modality)
        samples, _ = followed(modality, runs, film=film, recording=False)
        write_gif(film.frames(), wanted.trace, scale=wanted.scale)
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
    from mdiff.trace import Recorder

    samples, records = [], []
    for run, finish in runs:
        recorder = Recorder(run.canvas, run.valid, space=modality.space)
        reel = None if film is None else film.reel(run.canvas, finish)
        for state in run:
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
        files = write_pictures([s.output for s in samples], wanted.out, scale=wanted.scale)
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


def combined(
    labels: list[str] | None, prompts: list[str] | None, images: list[Path] | None
) -> list[dict[str, str]]:
    """What is asked for: options given once go with all, those given more often go in pairs."""
    given = {"label": labels, "caption": prompts, "image": images}
    told = {name: list(map(str, values)) for name, values in given.items() if values}
    often = sorted({len(values) for values in told.values()} - {1})
    if len(often) > 1:
        counts = " and ".join(f"{OPTIONS[name]} {len(v)} times" for name, v in told.items())
        raise ConfigError(f"{counts}: give each once, or equally often")
    rows = often[0] if often else 1
    return [
        {name: values[0 if len(values) == 1 else row] for name, values in told.items()}
        for row in range(rows)
    ]


def requests_of(path: Path) -> list[dict[str, str]]:
    """What a JSONL file asks for: a label, a prompt (the caption) and an image a line."""
    from mdiff.errors import nearest
    from mdiff.sources import json_lines, read_text

    keys = {option.removeprefix("--"): name for name, option in OPTIONS.items()}
    found = []
    for number, row in enumerate(json_lines(read_text(path), path), start=1):
        for key, value in row.items():
            if key not in keys:
                near = nearest(key, keys)
                raise DataError(f"{path}, object {number} has an unknown key {key!r}; {near}")
            if not isinstance(value, str):
                raise DataError(f"{path}, object {number}: {key}={value!r}: expected a string")
        found.append({keys[key]: value for key, value in row.items()})
    if not found:
        raise DataError(f"{path} holds no object")
    return found


def refuse_unknown(modality: Any, asked: Sequence[dict[str, str]]) -> None:
    """Raise ConfigError for an option that this model cannot take."""
    known = [*modality.part_names, *(["label"] if modality.classes else [])]
    for name in {name for one in asked for name in one}:
        if name not in known:
            takes = ", ".join(OPTIONS[each] for each in known)
            raise ConfigError(f"{OPTIONS[name]}: this model knows no {name}; it takes {takes}")


def with_pictures(
    modality: Any, asked: Sequence[dict[str, str]], *, resize: bool
) -> tuple[list[Request], list[str]]:
    """The requests with their pictures read, and a line for each that cannot be.

    Raises DataError where that leaves nothing.
    """
    requests, problems = [], []
    for given in asked:
        if "image" not in given:
            requests.append(Request(dict(given)))
            continue
        source = Path(given["image"])
        try:
            pixels = read_picture(source, modality, resize=resize)
            requests.append(Request({**given, "image": pixels}, source))
        except DataError as error:
            problems.append(str(error))
    if not requests:
        refuse_problems(problems, 0)
    return requests, problems


def read_picture(path: Path, modality: Any, *, resize: bool = False) -> Any:
    """The pixels (H, W, C) uint8 of a file, clear parts on white; DataError where it is unfit."""
    from mdiff.pictures import PictureSource, as_array, open_picture, read_pictures

    channels, (height, width) = modality.codec.channels, modality.size
    opened = open_picture(path)
    if opened.size == (width, height):
        pixels = as_array(opened, channels=channels, name=str(path))
    elif resize:
        source = PictureSource(source=str(path), resize=True)
        read = read_pictures(source, channels=channels, size=modality.size)
        pixels = read.pixels[0].permute(1, 2, 0).numpy()
    else:
        raise DataError(
            f"{path} has {opened.height} x {opened.width} pixels, this model's have {height} x "
            f"{width}; --resize crops and scales it"
        )
    try:
        # What a codec cannot take is to be known before anything is made.
        modality.codes(modality.picture(pixels)[None])
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return pixels


def placed(wanted: Wanted, name: str) -> Wanted:
    """With a place for the grid where none was given: a new .png of this name, here."""
    if wanted.out is not None:
        return wanted
    stem = Path(name).resolve().name or "pictures"
    numbered = (f"{stem}-{number}.png" if number > 1 else f"{stem}.png" for number in count(1))
    out = next(path for path in map(Path, numbered) if not path.exists())
    message(f"no --out: the grid goes to {out}")
    return replace(wanted, out=picture_target(out))


def refuse_problems(problems: Sequence[str], done: int) -> None:
    """Name the files that were left out, and raise DataError if there are any."""
    if not problems:
        return
    if not done and len(problems) == 1:
        raise DataError(problems[0])
    for problem in problems[:NAMED]:
        message(f"left out: {problem}")
    if len(problems) > NAMED:
        message(f"and {len(problems) - NAMED} more")
    raise DataError(
        f"{len(problems)} of {len(problems) + done} pictures were left out; "
        f"the first: {problems[0]}"
    )
