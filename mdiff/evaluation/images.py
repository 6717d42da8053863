"""Evaluation metrics of image models: bounds by what is given, figures of samples, probes."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Unpack

import torch
from torch import Tensor

from mdiff.errors import ConfigError, DataError, nearest
from mdiff.evaluation.classifier import Classifier
from mdiff.evaluation.evaluate import Evaluation
from mdiff.evaluation.image_metrics import (
    classifier_agreement,
    diversity,
    frechet,
    inception_features,
    pixel_features,
)
from mdiff.evaluation.image_metrics import nearest as nearest_pictures
from mdiff.evaluation.probe import probe
from mdiff.modalities.image import ImageModality, image_modality
from mdiff.modalities.image.data import PictureRows, Pictures
from mdiff.objective import JOINED
from mdiff.pipeline import CallOptions, Pipeline, Progress, bound_of_rows, features

OF_SAMPLES = ("frechet", "classifier", "diversity", "nearest")


@dataclass(frozen=True)
class Drawn:
    """Samples: `pictures` (N, C, H, W) uint8, the requested `labels` (N,) int64, and their cost.

    `calls` is the mean number of denoiser calls a sample, `seconds` the time of all.
    """

    pictures: Tensor
    labels: Tensor
    calls: float
    seconds: float


def spread(pictures: Pictures, limit: int) -> Pictures:
    """At most `limit` of the pictures, evenly spaced so that sorted labels stay in proportion."""
    if not limit or len(pictures) <= limit:
        return pictures
    return pictures.at(torch.arange(limit) * len(pictures) // limit)


def conditional_bounds(
    pipeline: Pipeline, rows: PictureRows, *, estimator: str | None = None, draws: int = 64,
    seed: int = 0, batch_size: int = 32, progress: Progress | None = None,
) -> list[dict[str, object]]:  # fmt: skip
    """The bound of rows of canvases, for each set of parts given: "of" which, "given" which.

    In bits per picture and per token scored and, where the picture alone is scored, per
    dimension if pixel values are the tokens, else in bits of its code per pixel: what a lossy
    codec discards is in no bound. Each with its standard error over the draws.
    """
    modality, found = image_modality(pipeline.modality), []
    names = modality.part_names
    for count in range(len(names)):
        for given in combinations(names, count):
            bound = bound_of_rows(
                pipeline, rows, given=JOINED.join(given), estimator=estimator, draws=draws,
                seed=seed, batch_size=batch_size, progress=progress,
            )  # fmt: skip
            of = [name for name in names if name not in given]
            scored = sum(len(range(*modality.span(name).indices(rows.length))) for name in of)
            units = {"token": scored * len(rows), "picture": len(rows)}
            if of == ["image"]:
                # Pixel values where they are the tokens, else the pixels that codes stand for.
                pixels = len(rows) * modality.size[0] * modality.size[1]
                codec = modality.codec
                units |= (
                    {"dim": pixels * codec.channels} if codec.lossless else {"code_pixel": pixels}
                )
            figures = Evaluation.of(pipeline, bound, units, estimator=estimator, draws=draws)
            conditions = JOINED.join([*given, *rows.cond])
            found.append({"of": JOINED.join(of), "given": conditions} | figures.as_dict())
    return found


def draw_pictures(pipeline: Pipeline, count: int, **options: Unpack[CallOptions]) -> Drawn:
    """`count` samples, the model's labels requested in turn; without labels all have label 0.

    `options` are those of `Pipeline.generate`.
    """
    modality = image_modality(pipeline.modality)
    names = (modality.labels or []) if modality.label != "none" else []
    labels = torch.arange(count) % max(1, len(names))
    prompts = [{"label": names[i]} if names else "" for i in labels.tolist()]
    made = pipeline.generate(prompts, length=modality.length, **options)
    return Drawn(
        pictures=modality.shown(torch.tensor([sample.tokens for sample in made])),
        labels=labels,
        calls=sum(sample.calls for sample in made) / count,
        seconds=sum(sample.seconds for sample in made),
    )


def with_model_labels(pictures: Pictures, modality: ImageModality) -> Pictures:
    """The pictures with their labels by the model's numbers and names.

    Names are looked up among the model's; numbers are taken to be its own. For a model without
    labels nothing changes. Raises DataError for a label that the model does not have.
    """
    if pictures.labels is None or modality.label == "none" or not modality.labels:
        return pictures
    own = modality.own_labels(pictures.labels, pictures.label_names)
    return replace(pictures, labels=own, label_names=list(modality.labels))


def figures_of(
    drawn: Drawn, pipeline: Pipeline, *, train: Pictures, test: Pictures,
    metrics: Collection[str], classifier: Classifier | None = None, inception: str | None = None,
    limit: int = 0,
) -> dict[str, object]:  # fmt: skip
    """Metrics of samples against the test pictures, beside the values of real pictures.

    frechet: the squared distance to the test pictures in the named space, and that of as many
    training pictures. classifier: the share of samples, and of test pictures, to which the
    classifier gives their label. diversity: see `image_metrics.diversity`, relative to the test
    pictures. nearest: mean distances to the nearest training picture, of samples and of the test
    set. `limit` bounds the number of test pictures, evenly spaced (0: all). Labels are the
    model's: see `with_model_labels`.

    Raises ConfigError where the classifier's metric is requested without a classifier.
    """
    test, modality = spread(test, limit), image_modality(pipeline.modality)
    found: dict[str, object] = {"samples": len(drawn.pictures), "test_pictures": len(test)}
    found |= {"calls": drawn.calls, "seconds": drawn.seconds}
    if "frechet" in metrics:
        few = spread(train, len(drawn.pictures))
        found["frechet"] = _frechet_figures(drawn, few, test, classifier, inception)
    if "classifier" in metrics:
        found["classifier"] = _classifier_figures(drawn, test, modality, classifier)
    if "diversity" in metrics:
        labels = test.labels
        if modality.label == "none" or labels is None:
            labels = torch.zeros(len(test), dtype=torch.int64)
        found["diversity"] = diversity(
            test.pixels, drawn.pictures, real_labels=labels, fake_labels=drawn.labels
        )
    if "nearest" in metrics:
        apart = nearest_pictures(drawn.pictures, train=train.pixels, test=test.pixels)
        found["nearest"] = apart._asdict()
    return found


def _frechet_figures(
    drawn: Drawn, train: Pictures, test: Pictures, classifier: Classifier | None,
    inception: str | None,
) -> dict[str, object]:  # fmt: skip
    """The distance of samples and that of as many training pictures, and the space's name."""
    space: Callable[[Tensor], Tensor] = pixel_features
    name = "pixels averaged to 8 x 8"
    if inception is not None:
        space, name = partial(inception_features, weights=inception), "Inception"
    elif classifier is not None:
        space, name = classifier.features, f"{classifier.name}, {classifier.width} features"
    real = space(test.pixels)
    return {
        "fid" if inception is not None else "distance": frechet(real, space(drawn.pictures)),
        "of_training_pictures": frechet(real, space(train.pixels)),
        "space": name,
    }


def _classifier_figures(
    drawn: Drawn, test: Pictures, modality: ImageModality, classifier: Classifier | None
) -> dict[str, float]:
    """The classifier's agreement with the requested labels, and with those of test pictures."""
    if classifier is None:
        raise ConfigError("metric classifier needs a classifier: give the folder of one")
    if modality.label == "none":
        raise ConfigError("metric classifier: this model cannot be asked for a label")
    names = modality.labels or []
    for name in names:
        if name not in classifier.labels:
            raise DataError(f"the classifier knows no {name!r}; {nearest(name, classifier.labels)}")
    number = torch.tensor([classifier.labels.index(name) for name in names])
    logits = classifier.logits(drawn.pictures)
    found = {"agreement": classifier_agreement(logits, number[drawn.labels])}
    if test.labels is not None:
        logits = classifier.logits(test.pixels)
        found["of_test_pictures"] = classifier_agreement(logits, number[test.labels])
    return found


def probe_figures(
    pipeline: Pipeline, *, train: Pictures, test: Pictures, mask_ratio: float = 0.0,
    layer: int | None = None, seed: int = 0, batch_size: int = 32,
) -> dict[str, object]:  # fmt: skip
    """The accuracy of labels predicted from the denoiser's features of pictures; see `features`.

    Only the picture is given, whatever other parts there are. Raises DataError without labels.
    """
    found, labels = [], []
    for pictures in (train, test):
        if pictures.labels is None:
            raise DataError("metric probe: the pictures have no labels")
        labels.append(pictures.labels)
        canvases = picture_canvases(pipeline, pictures.pixels)
        found.append(features(
            pipeline, canvases, mask_ratio=mask_ratio, layer=layer, seed=seed,
            batch_size=batch_size,
        ))  # fmt: skip
    most = int(labels[0].bincount().argmax())
    return probe(found[0], labels[0], found[1], labels[1])._asdict() | {
        "commonest_label": float((labels[1] == most).double().mean()),
        "training_pictures": len(train),
        "test_pictures": len(test),
        "mask_ratio": mask_ratio,
        "layer": layer,
    }


def picture_canvases(pipeline: Pipeline, pictures: Tensor) -> Tensor:
    """Canvases (N, L) int64 that give the pictures (N, C, H, W) uint8 and nothing else."""
    modality = image_modality(pipeline.modality)
    canvases = torch.full((len(pictures), modality.length), pipeline.space.mask_id)
    canvases[:, modality.span("image")] = modality.codes(pictures)
    return canvases
