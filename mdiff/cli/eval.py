"""`mdiff eval`: the bound in bits by each unit, figures of samples, probes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mdiff.cli.options as ask
from mdiff.cli.cut import cut_of
from mdiff.cli.images.eval import Wanted, evaluate_pictures
from mdiff.cli.images.eval import table as picture_table
from mdiff.cli.images.generate import medium_of, shows_pictures
from mdiff.cli.rules import refuse
from mdiff.cli.views.console import message, result, result_json
from mdiff.errors import ConfigError, nearest

if TYPE_CHECKING:
    from mdiff.evaluation import Evaluation
    from mdiff.pipeline import CallOptions, Pipeline

CHARACTERS = 20_000
PICTURES = 1_000
TEXT_SAMPLES, PICTURE_SAMPLES = 4, 100
METRICS = ("bound", "frechet", "classifier", "diversity", "nearest", "probe")


def evaluate(
    context: typer.Context,
    model: ask.Model,
    data: Annotated[
        list[str],
        typer.Option(help="Text (.txt, .jsonl, .parquet; .gz too), or pictures; may be repeated."),
    ],
    metrics: Annotated[
        str,
        typer.Option(help=f"Of {','.join(METRICS)}; bound alone for text."),
    ] = "bound",
    split: Annotated[
        str | None,
        typer.Option(
            help="all, train, validation or holdout.  [default: text all, pictures holdout]"
        ),
    ] = None,
    holdout: Annotated[
        float | None, typer.Option(help="Share held out.  [default: the run's own; 0.1]")
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(help="Share of the rest for validation.  [default: the run's own; 0]"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help=f"Characters or pictures to evaluate; 0 takes all.  [default: "
            f"{CHARACTERS:,}, {PICTURES:,}]"
        ),
    ] = None,
    field: Annotated[str, typer.Option(help="Column of JSONL or Parquet.")] = "text",
    separator: Annotated[str | None, typer.Option(help="Cuts a text file in documents.")] = None,
    subset: Annotated[str | None, typer.Option(help="Subset of a data set of the Hub.")] = None,
    hub_split: Annotated[str, typer.Option(help="Split of a data set of the Hub.")] = "train",
    captions: Annotated[
        str, typer.Option(help="Of pictures: none, data, or unicode (names of files).")
    ] = "none",
    draws: Annotated[int, typer.Option(help="Draws of the bound for each window.")] = 64,
    estimator: Annotated[
        str | None, typer.Option(help="any_order, time, exact or left_to_right.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a window.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help=f"Samples to evaluate; 0 for none.  [default: {TEXT_SAMPLES}, of "
            f"pictures {PICTURE_SAMPLES}]"
        ),
    ] = None,
    sampler: ask.SamplerName = "first_hitting",
    steps: ask.Steps = None,
    temperature: ask.Temperature = None,
    option: ask.Pairs = None,
    guidance_scale: ask.GuidanceScale = None,
    classifier: Annotated[
        Path | None, typer.Option(help="Folder of a classifier of pictures.")
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(help="Inception's weights: Frechet distances are then FIDs.")
    ] = None,
    mask_ratio: Annotated[float, typer.Option(help="Share of tokens hidden from a probe.")] = 0.0,
    layer: Annotated[int | None, typer.Option(help="Layer of the probe; else the last.")] = None,
    seed: ask.Seed = 0,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 32,
    device: ask.Device = None,
    dtype: ask.Dtype = None,
    mask_id: ask.MaskId = None,
    tokenizer: ask.TokenizerName = None,
    special_tokens: ask.SpecialTokens = "none",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Evaluate a model on data: an upper bound on its bits, with the standard error; and more."""
    _check_numbers(
        {"limit": (limit, 0), "samples": (samples, 0), "batch-size": (batch_size, 1),
         "draws": (draws, 2), "window": (window, 1)}
    )  # fmt: skip
    asked = _metrics(metrics)
    sampling = ask.sampling_options(
        option, steps=steps, temperature=temperature, guidance_scale=guidance_scale,
        sampler=sampler,
    )  # fmt: skip

    pipeline = ask.loaded(model, device, dtype, mask_id, tokenizer, special_tokens)
    cut, start = cut_of(model, holdout=holdout, validation=validation), time.perf_counter()
    report: dict[str, object] = {"model": model, "data": data[0] if len(data) == 1 else data}
    source: dict[str, object] = {
        "source": data, "subset": subset, "hub_split": hub_split, **cut.shares,
    }  # fmt: skip
    refuse(context.obj, model, medium_of(pipeline))
    if shows_pictures(pipeline):
        from mdiff.modalities.image.data import PictureSource

        wanted = Wanted(
            metrics=asked, split=split or "holdout", limit=PICTURES if limit is None else limit,
            draws=draws, estimator=estimator, seed=seed, batch_size=batch_size,
            samples=PICTURE_SAMPLES if samples is None else samples, sampling=sampling,
            classifier=None if classifier is None else str(classifier),
            inception=None if inception is None else str(inception),
            mask_ratio=mask_ratio, layer=layer,
        )  # fmt: skip
        pictures = PictureSource.of(source | {"captions": captions})
        report |= {"split": wanted.split} | evaluate_pictures(pipeline, pictures, wanted, cut)
        report["seconds"] = time.perf_counter() - start
        result_json(report) if as_json else picture_table(report)
        return
    if asked != ("bound",):
        raise ConfigError(f"--metrics {metrics}: of text there is bound alone")
    report["split"] = split or "all"
    found, drawn = _of_text(
        pipeline, source | {"field": field, "separator": separator}, split=split or "all",
        limit=CHARACTERS if limit is None else limit, draws=draws, estimator=estimator,
        window=window, seed=seed, batch_size=batch_size,
        samples=TEXT_SAMPLES if samples is None else samples, sampling=sampling,
    )  # fmt: skip
    report |= found.as_dict() | {"seconds": time.perf_counter() - start} | drawn
    result_json(report) if as_json else _table(report, list(found.units))


def _check_numbers(numbers: dict[str, tuple[int | None, int]]) -> None:
    """Raise ConfigError for the first number that is below its least value."""
    for name, (value, least) in numbers.items():
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: need at least {least}")


def _metrics(names: str) -> tuple[str, ...]:
    """The metrics of "bound,probe", each once; ConfigError for one that there is not."""
    found = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in found:
        if name not in METRICS:
            raise ConfigError(f"unknown metric {name!r}; {nearest(name, METRICS)}")
    return found


def _of_text(
    pipeline: Pipeline, data: Mapping[str, object], *, split: str, limit: int, draws: int,
    estimator: str | None, window: int | None, samples: int, seed: int, batch_size: int,
    sampling: CallOptions,
) -> tuple[Evaluation, dict[str, object]]:  # fmt: skip
    """The bound of documents, and {"of_samples": figures} where samples are asked for."""
    from mdiff.evaluation import evaluate as bound
    from mdiff.evaluation import sample_figures
    from mdiff.modalities import HasDocuments
    from mdiff.modalities.text import Source, cut_documents

    if not isinstance(pipeline.modality, HasDocuments):
        raise ConfigError(f"eval: a model of {pipeline.modality.name} has no documents to score")
    source = Source.of(data)
    documents = pipeline.modality.documents(source)
    if split != "all":
        documents = cut_documents(
            documents, split, holdout=source.holdout, validation=source.validation
        )
    if limit:
        documents = first_characters(documents, limit)
    if samples:
        # Invalid options are refused before the long computation.
        ask.check_sampler(sampling)
    found = bound(
        pipeline, documents, draws=draws, estimator=estimator, seed=seed, window=window,
        batch_size=batch_size, progress=lambda done, of: message(f"{done} of {of} windows"),
    )  # fmt: skip
    if not samples:
        return found, {}
    message(f"drawing {samples} samples")
    canvases = pipeline.canvases(num_samples=samples, length=window or pipeline.window)
    options: CallOptions = {**sampling, "seed": seed, "batch_size": batch_size}
    runs = pipeline.runs(canvases, **options)
    drawn = [sample for run in runs for sample in run.finished()]
    return found, {"of_samples": sample_figures(drawn) | {**sampling}}


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
    counted = ", ".join(f"{report[f'{unit}s']:,} {unit}s" for unit in units)
    result(
        f"an upper bound by {report['estimator']}, {report['draws']} draws, "
        f"{report['windows']} windows, {counted}, {report['seconds']:.1f} s"
    )
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
