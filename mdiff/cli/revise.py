"""`mdiff revise`: a finished text, corrected by a sampler that takes tokens back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from mdiff.cli.options import AsJson, Drawing, Loading, Model, NumSamples, title_of
from mdiff.cli.text import filled
from mdiff.cli.views.console import message, result, result_json, writable
from mdiff.cli.views.samples import entries, figures
from mdiff.errors import ConfigError


def revise(
    model: Model,
    file: Path,
    *,
    keep: Annotated[list[str] | None, "FIRST:STOP: characters of the text that stay."] = None,
    strength: Annotated[
        float | None, "The share of tokens that is hidden at first; default: 0.3."
    ] = None,
    rounds: Annotated[int | None, "Calls of the model one after another; default: 20."] = None,
    num_samples: NumSamples = 1,
    out: Annotated[Path | None, "A file for the result, instead of stdout."] = None,
    drawing: Drawing,
    loading: Loading,
    stream: Annotated[bool, "Show the text as it changes."] = False,
    trace: Annotated[Path | None, "An HTML page that replays the changes."] = None,
    as_json: AsJson = False,
) -> None:
    """Revise a finished text: hide some of its tokens, and draw them again given the others."""
    from mdiff.files import replace_file
    from mdiff.modalities.text import read_text

    for path in (out, trace):
        writable(path)
    pipeline, text = loading.load(model), read_text(file)
    options = drawing.options() | {"num_samples": num_samples}
    runs = pipeline.revisions(
        text, keep=[_range(each) for each in keep or ()], strength=strength, rounds=rounds,
        **options,
    )  # fmt: skip
    title = title_of(model, drawing.sampler or "remdm")
    samples = filled(runs, live=stream, trace=trace, title=title)
    if not any(sample.calls for sample in samples):
        raise ConfigError(
            "no token was taken back: samplers remdm, psi, gibbs, edit, wino and path_planning do, "
            "of what --keep leaves"
        )
    for number, sample in enumerate(samples):
        if as_json:
            result_json({"text": sample.output, **entries(sample)})
            continue
        if out is None:
            if number:
                result("---")
            result(str(sample))
        message(figures(sample))
    if out is not None:
        replace_file(out, [str(samples[0]).encode()])
        message(f"wrote {out}")


def _range(words: str) -> tuple[int, int]:
    """FIRST:STOP as two numbers."""
    first, colon, stop = words.partition(":")
    if not colon or not first.strip().isdecimal() or not stop.strip().isdecimal():
        raise ConfigError(f"--keep {words[:40]!r}: expected FIRST:STOP, such as 0:40")
    return int(first), int(stop)
