"""Pictures for `mdiff eval`: bounds, metrics of samples, probes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import mdiff.cli.options as ask
from mdiff.cli.order import ORDERS, PICTURE_ROWS, ROW_LENGTH, TEXT_ROWS, of_orders, order_table
from mdiff.cli.rules import OF_SAMPLES, flag
from mdiff.cli.views.console import message, result
from mdiff.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from mdiff.cli.cut import Cut
    from mdiff.evaluation import Classifier
    from mdiff.modalities.image import ImageModality
    from mdiff.modalities.image.data import PictureRows, Pictures, PictureSource
    from mdiff.pipeline import CallOptions, Pipeline

CONFIDENCE = 1.96


METRICS = ("bound", "order", "frechet", "classifier", "diversity", "nearest", "probe")
# Those that are of tokens, which a model of any medium has.
OF_TOKENS = {"bound", "order"}
CHARACTERS = 20_000
PICTURES = 1_000
TEXT_SAMPLES, PICTURE_SAMPLES = 4, 100


@dataclass(frozen=True)
class Wanted:
    """What to measure, on which data; what is None is by the kind of the model."""

    metrics: Annotated[str, f"Of {','.join(METRICS)}; bound and order for text."] = "bound"
    split: Annotated[
        str | None,
        "all, train, validation or holdout.  [default: text all, pictures holdout]",
    ] = None
    holdout: Annotated[float | None, "Share held out.  [default: the run's own; 0.1]"] = None
    validation: Annotated[
        float | None, "Share of the rest for validation.  [default: the run's own; 0]"
    ] = None
    limit: Annotated[
        int | None,
        "Characters or pictures to evaluate; 0 takes all.  "
        f"[default: {CHARACTERS:,}, {PICTURES:,}]",
    ] = None
    field: Annotated[str, "Column of JSONL or Parquet."] = "text"
    separator: Annotated[str | None, "Cuts a text file in documents."] = None
    subset: Annotated[str | None, "Subset of a data set of the Hub."] = None
    hub_split: Annotated[str, "Split of a data set of the Hub."] = "train"
    captions: Annotated[str, "Of pictures: none, data, or unicode (names of files)."] = "none"
    draws: Annotated[int, "Draws of the bound for each window."] = 64
    estimator: Annotated[str | None, "any_order, time, exact, left_to_right or random_order."] = (
        None
    )
    window: Annotated[int | None, f"Tokens of a window; of order {ROW_LENGTH} unless given."] = None
    orders: Annotated[int, "Random orders of metric order, each a call a token."] = ORDERS
    order_rows: Annotated[
        int | None,
        "Windows or pictures of metric order, evenly spaced; 0 takes all.  "
        f"[default: {TEXT_ROWS}, of pictures {PICTURE_ROWS}]",
    ] = None
    samples: Annotated[
        int | None,
        "Samples to evaluate; 0 for none.  "
        f"[default: {TEXT_SAMPLES}, of pictures {PICTURE_SAMPLES}]",
    ] = None
    sampler: Annotated[
        str | None,
        "A name from samplers/.  [default: first_hitting, or ancestral where the noise "
        "also writes random tokens]",
    ] = None
    steps: ask.Steps = None
    temperature: ask.Temperature = None
    option: ask.Pairs = None
    guidance_scale: ask.GuidanceScale = None
    classifier: Annotated[Path | None, "Folder of a classifier of pictures."] = None
    inception: Annotated[Path | None, "Inception's weights: Frechet distances are then FIDs."] = (
        None
    )
    mask_ratio: Annotated[float, "Share of tokens hidden from a probe."] = 0.0
    layer: Annotated[int | None, "Layer of the probe; else the last."] = None
    seed: ask.Seed = 0
    batch_size: Annotated[int, "Windows at a time."] = 32

    def check(self) -> None:
        """Raise ConfigError for a number below its least, an unknown metric or sampler option."""
        least = {"limit": 0, "samples": 0, "batch_size": 1, "draws": 2, "window": 1}
        least |= {"orders": 2, "order_rows": 0}
        for name, most in least.items():
            value = vars(self)[name]
            if value is not None and value < most:
                raise ConfigError(f"{flag(name)} {value}: need at least {most}")
        for name in self.asked:
            if name not in METRICS:
                raise ConfigError(f"unknown metric {name!r}; {nearest(name, METRICS)}")
        self.sampling()

    @property
    def asked(self) -> tuple[str, ...]:
        """The metrics, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.metrics.split(",")))

    @property
    def of_samples(self) -> list[str]:
        """The metrics of samples."""
        return [name for name in self.asked if name in OF_SAMPLES]

    @property
    def of_pictures(self) -> int:
        """The number of samples of pictures."""
        return PICTURE_SAMPLES if self.samples is None else self.samples

    def sampling(self) -> CallOptions:
        """Options of `Pipeline.generate` for the samples."""
        return ask.sampling_options(
            self.option, steps=self.steps, temperature=self.temperature,
            guidance_scale=self.guidance_scale, sampler=self.sampler,
        )  # fmt: skip

    def call(self) -> CallOptions:
        """The same, with the seed and the size of a batch."""
        return {**self.sampling(), "seed": self.seed, "batch_size": self.batch_size}


def evaluate_pictures(
    pipeline: Pipeline, source: PictureSource, wanted: Wanted, cut: Cut
) -> dict[str, object]:
    """The report of every metric that is asked for; a line where `cut` is not the run's."""
    import mdiff.evaluation as by
    from mdiff.modalities.image import image_modality
    from mdiff.modalities.image.data import digest_of, holds_shards, read_pictures

    modality = image_modality(pipeline.modality)
    classifier, split = _checked(wanted), wanted.split or "holdout"
    limit = PICTURES if wanted.limit is None else wanted.limit
    if any(holds_shards(path) for path in source.paths):
        if not OF_TOKENS.issuperset(wanted.asked):
            raise DataError(
                "tokens have no pixels: only metric bound can be had of them, and order"
            )
        return _of_tokens(pipeline, modality.examples(source, split=split), wanted)
    read = read_pictures(source, channels=modality.codec.channels, size=modality.size)
    of_tokens = [name for name in wanted.asked if name in OF_TOKENS]
    if read.labels is None and modality.label != "none" and of_tokens:
        raise DataError(
            f"metric {of_tokens[0]}: the pictures have no labels, which this model is given: name "
            "them by folders, metadata.jsonl or y, or ask for --metrics nearest"
        )
    if cut.digest is not None and split != "all":
        cut.compare(digest_of(read.split("train", **cut.shares)))
    everything = by.with_model_labels(read, modality)
    test = everything.split(split, **cut.shares)
    few = by.spread(test, limit)
    report: dict[str, object] = {"pictures": len(few)}
    if of_tokens:
        report |= _of_tokens(pipeline, modality.examples(few, split="all"), wanted)
    if "bound" in wanted.asked:
        report |= _codec_figures(modality, few)
    if OF_TOKENS.issuperset(wanted.asked):
        return report
    # Metrics of samples and probes compare with the training split.
    train = everything.split("train", **cut.shares)
    if "probe" in wanted.asked:
        message("reading features")
        report["probe"] = by.probe_figures(
            pipeline, train=by.spread(train, limit), test=few, mask_ratio=wanted.mask_ratio,
            layer=wanted.layer, seed=wanted.seed, batch_size=wanted.batch_size,
        )  # fmt: skip
    if wanted.of_samples:
        message(f"drawing {wanted.of_pictures} samples")
        drawn = by.draw_pictures(pipeline, wanted.of_pictures, **wanted.call())
        report["of_samples"] = {**wanted.sampling()} | by.figures_of(
            drawn, pipeline, train=train, test=test, metrics=wanted.of_samples,
            classifier=classifier, limit=limit,
            inception=None if wanted.inception is None else str(wanted.inception),
        )  # fmt: skip
    return report


def _checked(wanted: Wanted) -> Classifier | None:
    """The classifier; ConfigError for options that would be refused after a long computation."""
    from mdiff.evaluation import load_classifier, require_inception
    from mdiff.pipeline import check_sampler

    classifier = None if wanted.classifier is None else load_classifier(str(wanted.classifier))
    check_sampler(wanted.sampling())
    of_samples, count = wanted.of_samples, wanted.of_pictures
    if of_samples and count < 2:
        raise ConfigError(f"--samples {count}: metric {of_samples[0]} needs at least 2")
    if "classifier" in wanted.asked and classifier is None:
        raise ConfigError("metric classifier needs --classifier FOLDER")
    if wanted.inception is not None:
        require_inception()
    return classifier


def _of_tokens(pipeline: Pipeline, rows: PictureRows, wanted: Wanted) -> dict[str, object]:
    """The metrics of rows of tokens that are asked for."""
    from mdiff.evaluation import conditional_bounds

    found: dict[str, object] = {}
    if "bound" in wanted.asked:
        found["bounds"] = conditional_bounds(
            pipeline, rows, estimator=wanted.estimator, draws=wanted.draws, seed=wanted.seed,
            batch_size=wanted.batch_size,
            progress=lambda done, of: message(f"{done} of {of} pictures"),
        )  # fmt: skip
    if "order" in wanted.asked:
        found["order"] = of_orders(
            pipeline, rows, orders=wanted.orders, seed=wanted.seed, batch_size=wanted.batch_size,
            limit=PICTURE_ROWS if wanted.order_rows is None else wanted.order_rows,
        )  # fmt: skip
    return found


def _codec_figures(modality: ImageModality, pictures: Pictures) -> dict[str, object]:
    """What the codec loses of the pictures, which no bound counts; nothing where lossless."""
    from mdiff.modalities.image import fidelity

    if modality.codec.lossless:
        return {}
    found = fidelity(modality.codec, pictures.pixels)
    return {"codec": {"psnr": found.psnr, "ssim": found.ssim}}


def table(report: dict[str, Any]) -> None:
    """The report for people, to stdout."""
    for bound in report.get("bounds", ()):
        given = f" given {bound['given']}" if bound["given"] else ""
        shown = ", ".join(
            f"{bound[f'bits_per_{unit}']:.4f} ± "
            f"{CONFIDENCE * bound[f'bits_per_{unit}_stderr']:.4f} bits per {words}"
            for unit, words in (
                ("token", "token"), ("dim", "dim"), ("code_pixel", "pixel (of the code)"),
                ("picture", "picture"),
            )
            if f"bits_per_{unit}" in bound
        )  # fmt: skip
        result(f"{bound['of']}{given}: {shown}")
    if report.get("bounds"):
        bound = report["bounds"][0]
        result(
            f"upper bounds (95 %) by {bound['estimator']}, {bound['draws']} draws, "
            f"{bound['pictures']} pictures"
        )
    order_table(report)
    if "codec" in report:
        result(f"the codec's PSNR: {report['codec']['psnr']:.2f} dB")
    if "probe" in report:
        found = report["probe"]
        result(
            f"probe: linear {found['linear']:.3f}, {found['neighbours']:.3f} by nearest "
            f"neighbours, {found['commonest_label']:.3f} by the commonest label; "
            f"{found['training_pictures']} pictures to learn from, {found['test_pictures']} to test"
        )
    if "of_samples" in report:
        _samples_table(report["of_samples"])


def _samples_table(found: dict[str, Any]) -> None:
    result(f"{found['samples']} samples of {found['calls']:.1f} calls, {found['seconds']:.1f} s")
    if "frechet" in found:
        each = found["frechet"]
        name, value = next((key, each[key]) for key in ("fid", "distance") if key in each)
        result(
            f"Frechet {name} {value:.4f} (training pictures {each['of_training_pictures']:.4f}), "
            f"space: {each['space']}"
        )
    if "classifier" in found:
        each = found["classifier"]
        real = each.get("of_test_pictures")
        beside = "" if real is None else f" (of test pictures {real:.3f})"
        result(f"classifier: asked label given to {each['agreement']:.3f}{beside}")
    if "diversity" in found:
        result(f"diversity within a label: {found['diversity']:.3f} of the test pictures'")
    if "nearest" in found:
        each = found["nearest"]
        result(
            f"nearest training picture: {each['samples']:.3f} from samples, {each['test']:.3f} "
            "from test pictures"
        )
