"""`mdiff eval`: the bound in bits by token, character and byte, and figures of samples."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mdiff.cli.console import message, result, result_json
from mdiff.errors import ConfigError

CHARACTERS = 20_000


def evaluate(
    model: Annotated[str, typer.Argument(help="builtin:NAME, a directory or a Hub id.")],
    data: Annotated[Path, typer.Option(help="Text (.txt, .jsonl, .parquet; .gz too).")],
    split: Annotated[str, typer.Option(help="all, train, validation or holdout.")] = "all",
    holdout: Annotated[float, typer.Option(help="Share held out at the end.")] = 0.1,
    validation: Annotated[float, typer.Option(help="Share of the rest for validation.")] = 0.0,
    limit: Annotated[int, typer.Option(help="Characters to read; 0 reads all.")] = CHARACTERS,
    field: Annotated[str, typer.Option(help="Column of JSONL or Parquet.")] = "text",
    draws: Annotated[int, typer.Option(help="How often each window is hidden.")] = 64,
    estimator: Annotated[
        str | None, typer.Option(help="any_order, time, exact or left_to_right.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a window.")] = None,
    samples: Annotated[int, typer.Option(help="Samples to look at; 0 for none.")] = 4,
    sampler: Annotated[str, typer.Option(help="How the samples are drawn.")] = "first_hitting",
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Evaluate a model on data: an upper bound on its bits, with the standard error."""
    for name, value, least in (
        ("limit", limit, 0), ("samples", samples, 0), ("batch-size", batch_size, 1),
        ("draws", draws, 2), ("window", 1 if window is None else window, 1),
    ):  # fmt: skip
        if value < least:
            raise ConfigError(f"--{name} {value}: need at least {least}")
    from mdiff.evaluate import evaluate as bound
    from mdiff.evaluate import sample_figures
    from mdiff.pipeline import load
    from mdiff.sampling import resolve
    from mdiff.sources import Source, cut_documents

    source = Source(source=str(data), field=field, holdout=holdout, validation=validation)
    documents = source.documents()
    if split != "all":
        documents = cut_documents(documents, split, holdout=holdout, validation=validation)
    if limit:
        documents = first_characters(documents, limit)
    pipeline = load(model, device=device, dtype=dtype)
    if samples:
        # Before the long part: it may be refused.
        resolve(sampler, {})
    start = time.perf_counter()
    found = bound(
        pipeline, documents, estimator=estimator, draws=draws, seed=seed, window=window,
        batch_size=batch_size, progress=lambda done, all_: message(f"{done} of {all_} windows"),
    )  # fmt: skip
    report: dict[str, Any] = {"model": model, "data": str(data), "split": split}
    report |= found.as_dict() | {"seconds": time.perf_counter() - start}
    if samples:
        message(f"drawing {samples} samples")
        drawn = pipeline.generate(
            sampler=sampler, n=samples, seed=seed, batch_size=batch_size,
            length=pipeline.window or window,
        )  # fmt: skip
        report["of_samples"] = sample_figures(drawn) | {"sampler": sampler}
    if as_json:
        result_json(report)
    else:
        _table(report, list(found.units))


def first_characters(documents: list[str], limit: int) -> list[str]:
    """The first `limit` characters of the documents, as documents."""
    kept = []
    for text in documents:
        if limit <= 0:
            break
        kept.append(text[:limit])
        limit -= len(text)
    return kept


def _table(report: dict[str, Any], units: list[str]) -> None:
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
