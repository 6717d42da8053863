"""`mdiff demo`: a page of text, a sentence filled in, and a page to watch it happen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mdiff.cli.console import message, result, writable

QUALITY_GATE = 7
MODEL = "builtin:shakespeare"
LEAST_WORDS = 60
# A page that has not reached the words by then never will.
MOST_PAGES = 8
SENTENCE = "What say you,[MASK:24] and so farewell.\n"
PAGE = Path("demo.html")


def demo(
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    out: Annotated[Path, typer.Option(help="The page to write.")] = PAGE,
    model: Annotated[str, typer.Option(help="Another model of text.")] = MODEL,
) -> None:
    """Generate a page of text and fill in a sentence; write a page to scrub through both."""
    from mdiff.cli.generate import figures
    from mdiff.kernels.philox import derive
    from mdiff.pipeline import load
    from mdiff.trace import Recorder, page

    writable(out)
    pipeline = load(model)
    records = []

    def filled(canvas: list[int], seed: int) -> str:
        (run,) = pipeline.runs([canvas], seed=seed)
        recorder = Recorder(run.canvas, run.valid, space=pipeline.space)
        for state in run:
            recorder.add(state)
        (sample,) = run.finished()
        records.extend(recorder.records(pipeline.modality, [figures(sample)]))
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
    out.write_text(page(records, title=f"mdiff · {model}"), encoding="utf-8")
    result(str(out.resolve()))
