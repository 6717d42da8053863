"""`mdiff demo`: generated text and pictures, and a page that replays how both were filled in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdiff.cli.threads import fit_threads
from mdiff.cli.views.console import message, result, writable
from mdiff.cli.views.samples import figures, summary

if TYPE_CHECKING:
    from mdiff.cli.views.trace import Record
    from mdiff.pipeline import Pipeline, SamplingOptions

QUALITY_GATE = 7
MODEL = "builtin:shakespeare"
PICTURES = "builtin:emoji"
LEAST_WORDS = 60
# Pages after which a model without words is given up.
MOST_PAGES = 8
SENTENCE = "What say you,[MASK:24] and so farewell.\n"
PAGE = Path("demo.html")
# The number of pictures, and their sampler.
COUNT = 20
SAMPLER = "confidence"
OPTIONS: SamplingOptions = {"steps": 48, "noise": 10.0}
# The caption of the picture that is inpainted, where the model has captions; the share of its
# height, from below, that is regenerated; and how often.
SHOWN = "grinning face"
REGENERATED = 0.5
VARIANTS = 8
COLUMNS = 10
SCALE = 3


def demo(
    seed: Annotated[int, "Same seed, same text and pictures."] = 0,
    out: Annotated[Path, "The page to write; the grid is beside it."] = PAGE,
    model: Annotated[str, "Another model of text."] = MODEL,
    pictures: Annotated[str, "Another model of pictures."] = PICTURES,
) -> None:
    """Generate text and pictures, and fill in one of each; write a page that replays it."""
    from mdiff.cli.views.trace import page
    from mdiff.files import BUILTIN, builtin_models
    from mdiff.pipeline import load

    writable(out)
    beside = writable(out.with_suffix(".png"))
    titles = [model]
    pipeline = load(model)
    fit_threads(pipeline.denoiser)
    records = written(pipeline, model, seed)
    if pictures == PICTURES and PICTURES.removeprefix(BUILTIN) not in builtin_models():
        message(f"{PICTURES} is not in this installation: the demo shows no pictures")
        beside = None
    else:
        titles.append(pictures)
        records += drawn(load(pictures), pictures, seed, beside)
    out.write_text(page(records, title=f"mdiff · {' · '.join(titles)}"), encoding="utf-8")
    if beside is not None:
        result(str(beside.resolve()))
    result(str(out.resolve()))


def written(pipeline: Pipeline, model: str, seed: int) -> list[Record]:
    """Print a page of text and a sentence filled in; typer.Exit for a page of too few words."""
    from mdiff.cli.views.trace import Recorder
    from mdiff.kernels.philox import derive

    records = []

    def filled(canvas: list[int], seed: int) -> str:
        (run,) = pipeline.runs([canvas], seed=seed)
        recorder = Recorder(run)
        for state in run:
            recorder.add(state)
        (sample,) = run.finished()
        records.extend(recorder.records([figures(sample)]))
        result(str(sample.output).strip("\n"))
        result(f"[{figures(sample)}]\n")
        return str(sample.output)

    message(f"{model}: a page by first hitting, one call a token")
    words = pages = 0
    while words < LEAST_WORDS and pages < MOST_PAGES:
        own = seed if pages == 0 else int(derive(seed, pages))
        text = filled(pipeline.canvases(length=pipeline.window)[0], own)
        words, pages = words + len(text.split()), pages + 1
    if words < LEAST_WORDS:
        message(f"error: {words} words in {pages} pages, expected {LEAST_WORDS}: {model} is broken")
        raise typer.Exit(QUALITY_GATE)
    message(f"the same model fills in: {SENTENCE.strip()}")
    filled(pipeline.templates(SENTENCE)[0], seed)
    return records


def drawn(pipeline: Pipeline, model: str, seed: int, beside: Path | None) -> list[Record]:
    """Generate pictures, then regenerate a part of one; write all of them as one grid."""
    from mdiff.cli.images.generate import followed, pictures_of, shows_pictures
    from mdiff.cli.views.grid import enlarged, grid_of
    from mdiff.errors import ConfigError
    from mdiff.kernels.philox import derive
    from mdiff.modalities.image import image_modality

    if not shows_pictures(pipeline):
        name = pipeline.modality.name
        raise ConfigError(f"--pictures {model}: a model of {name}, not of pictures")
    modality = image_modality(pipeline.modality)
    message(f"{model}: {COUNT} new pictures")
    canvases = pipeline.canvases(num_samples=COUNT)
    new = pipeline.runs(canvases, seed=seed, sampler=SAMPLER, **OPTIONS)
    made, records = followed(modality, ((run, lambda row, each: each) for run in new))
    result(f"[{summary(made)}]")

    given = {"caption": SHOWN} if "caption" in modality.part_names else {}
    other = int(derive(seed, COUNT))
    (whole,) = pipeline.generate(given, seed=other, sampler=SAMPLER, **OPTIONS)
    height, width = modality.size
    top = height - max(1, round(height * REGENERATED))
    message(f"{model}: one more, its lower part regenerated {VARIANTS} times")
    edits, edited = pipeline.edit_runs(
        whole.output, f"{top}:{height},0:{width}", given=given, num_samples=VARIANTS, seed=seed,
        sampler=SAMPLER, **OPTIONS,
    )  # fmt: skip
    pasted = ((run, lambda row, each: edits.pasted(each)) for run in edited)
    again, more = followed(modality, pasted)
    result(f"[{summary(again)}]")
    if beside is not None:
        covered = edits.pasted(modality.decode(edits.canvases[0]))
        shown = [*pictures_of([*made, whole]), covered, *pictures_of(again)]
        enlarged(grid_of(shown, columns=COLUMNS), SCALE).save(beside)
    return records + more
