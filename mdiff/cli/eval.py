"""`mdiff eval`: the bound in bits by each unit, figures of samples, probes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mdiff.cli.options as ask
from mdiff.cli.cut import cut_of
from mdiff.cli.images.eval import CHARACTERS, OF_TOKENS, TEXT_SAMPLES, Wanted, evaluate_pictures
from mdiff.cli.images.eval import table as picture_table
from mdiff.cli.images.generate import medium_of, shows_pictures
from mdiff.cli.order import ROW_LENGTH, TEXT_ROWS, of_orders, order_table
from mdiff.cli.rules import refuse
from mdiff.cli.views.console import message, result, result_json
from mdiff.errors import ConfigError

if TYPE_CHECKING:
    from mdiff.evaluation import Evaluation
    from mdiff.modalities.text import Source
    from mdiff.pipeline import Pipeline


def evaluate(
    context: typer.Context,
    model: ask.Model,
    *,
    data: Annotated[
        list[str], "Text (.txt, .jsonl, .parquet; .gz too), or pictures; may be repeated."
    ],
    wanted: Wanted,
    loading: ask.Loading,
    as_json: ask.OneObject = False,
) -> None:
    """Evaluate a model on data: an upper bound on its bits, with the standard error; and more."""
    wanted.check()
    pipeline = loading.load(model)
    default = "first_hitting" if pipeline.noise is None else "ancestral"
    wanted = replace(wanted, sampler=wanted.sampler or default)
    cut = cut_of(model, holdout=wanted.holdout, validation=wanted.validation)
    start = time.perf_counter()
    report: dict[str, object] = {"model": model, "data": data[0] if len(data) == 1 else data}
    source: dict[str, object] = {
        "source": data, "subset": wanted.subset, "hub_split": wanted.hub_split, **cut.shares,
    }  # fmt: skip
    refuse(context.obj, model, medium_of(pipeline))
    if shows_pictures(pipeline):
        from mdiff.modalities.image.data import PictureSource

        report["split"] = wanted.split or "holdout"
        pictures = PictureSource.of(source | {"captions": wanted.captions})
        report |= evaluate_pictures(pipeline, pictures, wanted, cut)
        report["seconds"] = time.perf_counter() - start
        result_json(report) if as_json else picture_table(report)
        return
    if not OF_TOKENS.issuperset(wanted.asked):
        raise ConfigError(f"--metrics {wanted.metrics}: of text there are order and bound alone")
    from mdiff.modalities.text import Source

    report["split"] = wanted.split or "all"
    text = Source.of(source | {"field": wanted.field, "separator": wanted.separator})
    found, more = _of_text(pipeline, text, wanted)
    report |= {} if found is None else found.as_dict()
    report |= {"seconds": time.perf_counter() - start} | more
    result_json(report) if as_json else _table(report, [] if found is None else list(found.units))


def _of_text(
    pipeline: Pipeline, source: Source, wanted: Wanted
) -> tuple[Evaluation | None, dict[str, object]]:
    """The bound of documents, {"order": figures} and {"of_samples": figures}, as asked for."""
    from mdiff.evaluation import evaluate as bound
    from mdiff.evaluation import sample_figures
    from mdiff.modalities import HasDocuments
    from mdiff.modalities.text import cut_documents
    from mdiff.pipeline import check_sampler, windows

    if not isinstance(pipeline.modality, HasDocuments):
        raise ConfigError(f"eval: a model of {pipeline.modality.name} has no documents to score")
    documents = pipeline.modality.documents(source)
    if wanted.split not in (None, "all"):
        documents = cut_documents(
            documents, wanted.split, holdout=source.holdout, validation=source.validation
        )
    if limit := CHARACTERS if wanted.limit is None else wanted.limit:
        documents = first_characters(documents, limit)
    sampling = wanted.sampling()
    samples = TEXT_SAMPLES if wanted.samples is None else wanted.samples
    if samples:
        # Invalid options are refused before the long computation.
        check_sampler(sampling)
    more: dict[str, object] = {}
    if "order" in wanted.asked:
        width = wanted.window or min(ROW_LENGTH, pipeline.window or ROW_LENGTH)
        more["order"] = of_orders(
            pipeline, windows(pipeline, documents, window=width, end=True), orders=wanted.orders,
            limit=TEXT_ROWS if wanted.order_rows is None else wanted.order_rows,
            seed=wanted.seed, batch_size=wanted.batch_size,
        )  # fmt: skip
    if "bound" not in wanted.asked:
        return None, more
    found = bound(
        pipeline, documents, draws=wanted.draws, estimator=wanted.estimator, seed=wanted.seed,
        window=wanted.window, batch_size=wanted.batch_size,
        progress=lambda done, of: message(f"{done} of {of} windows"),
    )  # fmt: skip
    if not samples:
        return found, more
    message(f"drawing {samples} samples")
    canvases = pipeline.canvases(num_samples=samples, length=wanted.window or pipeline.window)
    runs = pipeline.runs(canvases, **wanted.call())
    drawn = [sample for run in runs for sample in run.finished()]
    return found, more | {"of_samples": sample_figures(drawn) | {**sampling}}


def first_characters(documents: list[str], limit: int) -> list[str]:
    """The first `limit` characters, or ids, of the documents, as documents."""
    kept = []
    for text in documents:
        if limit <= 0:
            break
        kept.append(text[:limit])
        limit -= len(text)
    return kept


def _table(report: Mapping[str, Any], units: list[str]) -> None:
    """Print the report."""
    for unit in units:
        bits, stderr = report[f"bits_per_{unit}"], report[f"bits_per_{unit}_stderr"]
        result(f"bits per {unit:<6} {bits:8.4f} ± {1.96 * stderr:.4f} (95 %)")
    if units:
        counted = ", ".join(f"{report[f'{unit}s']:,} {unit}s" for unit in units)
        result(
            f"an upper bound by {report['estimator']}, {report['draws']} draws, "
            f"{report['windows']} windows, {counted}, {report['seconds']:.1f} s"
        )
    order_table(report)
    drawn = report.get("of_samples")
    if drawn is not None:
        variety = ", ".join(
            f"distinct-{n} {drawn[f'distinct_{n}']:.3f}"
            for n in (1, 2, 3)
            if drawn[f"distinct_{n}"] is not None
        )
        result(
            f"{drawn['samples']} samples by {drawn['sampler']}: {drawn['calls']:.1f} calls, "
            f"draws {drawn['draw_entropy_nats']:.3f} nats, tokens "
            f"{drawn['unigram_entropy_bits']:.3f} bits, {variety}"
        )
