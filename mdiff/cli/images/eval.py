"""Pictures for `mdiff eval`: bounds, metrics of samples, probes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mdiff.cli.options import check_sampler
from mdiff.cli.views.console import message, result
from mdiff.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mdiff.cli.cut import Cut
    from mdiff.evaluation import Classifier
    from mdiff.modalities.image import ImageModality
    from mdiff.modalities.image.data import PictureRows, Pictures, PictureSource
    from mdiff.pipeline import CallOptions, Pipeline

CONFIDENCE = 1.96


@dataclass(frozen=True)
class Wanted:
    """What to measure: `metrics` by name, on `split`, at most `limit` pictures of it (0: all).

    `sampling` are options of `Pipeline.generate` for the `samples`; `classifier` a folder,
    `inception` a file of weights; `mask_ratio` and `layer` those of the probe's features.
    """

    metrics: tuple[str, ...]
    split: str
    limit: int
    draws: int
    estimator: str | None
    samples: int
    seed: int
    batch_size: int
    sampling: CallOptions
    classifier: str | None = None
    inception: str | None = None
    mask_ratio: float = 0.0
    layer: int | None = None

    @property
    def of_samples(self) -> list[str]:
        """The metrics of samples."""
        from mdiff.evaluation import OF_SAMPLES

        return [name for name in self.metrics if name in OF_SAMPLES]


def evaluate_pictures(
    pipeline: Pipeline, source: PictureSource, wanted: Wanted, cut: Cut
) -> dict[str, object]:
    """The report of every metric that is asked for; a line where `cut` is not the run's."""
    from mdiff.evaluation import probe_figures, spread, with_model_labels
    from mdiff.modalities.image import image_modality
    from mdiff.modalities.image.data import digest_of, holds_shards, read_pictures

    modality = image_modality(pipeline.modality)
    classifier = _checked(pipeline, wanted)
    if any(holds_shards(path) for path in source.paths):
        if wanted.metrics != ("bound",):
            raise DataError("tokens have no pixels: only metric bound can be had of them")
        rows = modality.examples(source, split=wanted.split)
        return {"bounds": _bounds(pipeline, rows, wanted)}
    read = read_pictures(source, channels=modality.codec.channels, size=modality.size)
    if read.labels is None and modality.label != "none" and "bound" in wanted.metrics:
        raise DataError(
            "metric bound: the pictures have no labels, which this model is given: name them by "
            "folders, metadata.jsonl or y, or ask for --metrics nearest"
        )
    if cut.digest is not None and wanted.split != "all":
        cut.compare(digest_of(read.split("train", **cut.shares)))
    everything = with_model_labels(read, modality)
    test = everything.split(wanted.split, **cut.shares)
    few = spread(test, wanted.limit)
    report: dict[str, object] = {"pictures": len(few)}
    if "bound" in wanted.metrics:
        report["bounds"] = _bounds(pipeline, modality.examples(few, split="all"), wanted)
        report |= _codec_figures(modality, few)
    if wanted.metrics == ("bound",):
        return report
    # Metrics of samples and probes compare with the training split.
    train = everything.split("train", **cut.shares)
    if "probe" in wanted.metrics:
        message("reading features")
        report["probe"] = probe_figures(
            pipeline, train=spread(train, wanted.limit), test=few, mask_ratio=wanted.mask_ratio,
            layer=wanted.layer, seed=wanted.seed, batch_size=wanted.batch_size,
        )  # fmt: skip
    if wanted.of_samples:
        report["of_samples"] = _of_samples(pipeline, train, test, wanted, classifier)
    return report


def _checked(pipeline: Pipeline, wanted: Wanted) -> Classifier | None:
    """The classifier; ConfigError for options that would be refused after a long computation."""
    from mdiff.evaluation import load_classifier, require_inception

    classifier = None if wanted.classifier is None else load_classifier(wanted.classifier)
    check_sampler(wanted.sampling)
    of_samples = wanted.of_samples
    if of_samples and wanted.samples < 2:
        raise ConfigError(f"--samples {wanted.samples}: metric {of_samples[0]} needs at least 2")
    if "classifier" in wanted.metrics and classifier is None:
        raise ConfigError("metric classifier needs --classifier FOLDER")
    if wanted.inception is not None:
        require_inception()
    return classifier


def _of_samples(
    pipeline: Pipeline, train: Pictures, test: Pictures, wanted: Wanted,
    classifier: Classifier | None,
) -> dict[str, object]:  # fmt: skip
    """The metrics of samples, which are drawn here."""
    from mdiff.evaluation import draw_pictures, figures_of

    message(f"drawing {wanted.samples} samples")
    options: CallOptions = {
        **wanted.sampling, "seed": wanted.seed, "batch_size": wanted.batch_size
    }  # fmt: skip
    drawn = draw_pictures(pipeline, wanted.samples, **options)
    return {**wanted.sampling} | figures_of(
        drawn, pipeline, train=train, test=test, metrics=wanted.of_samples, classifier=classifier,
        inception=wanted.inception, limit=wanted.limit,
    )  # fmt: skip


def _bounds(pipeline: Pipeline, rows: PictureRows, wanted: Wanted) -> list[dict[str, object]]:
    from mdiff.evaluation import conditional_bounds

    return conditional_bounds(
        pipeline, rows, estimator=wanted.estimator, draws=wanted.draws, seed=wanted.seed,
        batch_size=wanted.batch_size,
        progress=lambda done, of: message(f"{done} of {of} pictures"),
    )  # fmt: skip


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
