"""Requests for pictures: from options or a file, with the pictures that they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mdiff.cli.options import input_rows
from mdiff.cli.views.console import message
from mdiff.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

    from mdiff.modalities.image import ImageModality

# The option of each part that can be given.
OPTIONS = {"label": "--label", "caption": "--prompt", "image": "--image"}
# So many unreadable files are named; the rest are counted.
NAMED = 20


@dataclass(frozen=True)
class Request:
    """A prompt as for `Pipeline.generate`, and the file that its picture is from."""

    given: Mapping[str, object]
    source: Path | None = None


def combined(
    labels: list[str] | None, prompts: list[str] | None, images: list[Path] | None
) -> list[dict[str, str]]:
    """The prompts of options: one given once goes with all, those given more often go in pairs."""
    given = {"label": labels, "caption": prompts, "image": images}
    named = {name: list(map(str, values)) for name, values in given.items() if values}
    often = sorted({len(values) for values in named.values()} - {1})
    if len(often) > 1:
        counts = " and ".join(f"{OPTIONS[name]} {len(v)} times" for name, v in named.items())
        raise ConfigError(f"{counts}: give each once, or equally often")
    rows = often[0] if often else 1
    return [
        given_parts({name: values[row if len(values) > 1 else 0] for name, values in named.items()})
        for row in range(rows)
    ]


def given_parts(asked: Mapping[str, str]) -> dict[str, str]:
    """What a request gives: as with text, an empty prompt is none."""
    return {name: value for name, value in asked.items() if value or name != "caption"}


def requests_of(path: Path) -> list[dict[str, str]]:
    """The prompts of a JSONL file: a label, a prompt (the caption) and an image a line."""
    keys = {option.removeprefix("--"): name for name, option in OPTIONS.items()}
    found = []
    for where, row in input_rows(path, keys):
        for key, value in row.items():
            if not isinstance(value, str):
                raise DataError(f"{where}: {key}={value!r}: expected a string")
        found.append(given_parts({keys[key]: str(value) for key, value in row.items()}))
    return found


def refuse_unknown(modality: ImageModality, asked: Sequence[dict[str, str]]) -> None:
    """Raise ConfigError for an option that this model cannot take."""
    for name in {name for one in asked for name in one}:
        if name not in modality.takes:
            takes = ", ".join(OPTIONS[each] for each in modality.takes)
            raise ConfigError(f"{OPTIONS[name]}: this model knows no {name}; it takes {takes}")


def with_pictures(
    modality: ImageModality, asked: Sequence[dict[str, str]], *, resize: bool
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


def read_picture(path: Path, modality: ImageModality, *, resize: bool = False) -> np.ndarray:
    """The pixels (H, W, C) uint8 of a file, clear parts on white; DataError where it is unfit."""
    from mdiff.modalities.image.data import as_array, open_picture, sized

    height, width = modality.size
    opened = open_picture(path)
    if opened.size != (width, height) and not resize:
        raise DataError(
            f"{path} has {opened.height} x {opened.width} pixels, this model's have {height} x "
            f"{width}; --resize crops and scales it"
        )
    whole = as_array(opened, channels=modality.codec.channels, name=str(path))
    pixels: np.ndarray = sized(whole, modality.size, resize=resize, name=str(path))
    try:
        # A picture that the codec cannot take is refused before anything is generated.
        modality.codes(modality.picture(pixels)[None])
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return pixels


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
