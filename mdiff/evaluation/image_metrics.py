"""Metrics of generated pictures against real ones: pure functions of tensors.

Pictures are (N, ...) uint8, scaled from 0 to 255 to 0 to 1; features are (N, D) floats. The
distance between two pictures is Euclidean over all their values.
"""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mdiff.errors import BackendError, CheckpointError, DataError
from mdiff.files import read_tensors

WHITE = 255.0
# Pictures whose distances to all others are computed at a time.
ROWS = 512
# Pictures in a batch of Inception.
INCEPTION = 32
INCEPTION_NEEDS = ("torchmetrics", "torch_fidelity", "torchvision")


def _expect(name: str, tensor: Tensor, expected: str, fits: bool) -> None:
    """Raise DataError with a tensor's shape and type, and what was expected, unless it fits."""
    if not fits:
        raise DataError(f"{name} {tuple(tensor.shape)} {tensor.dtype}: expected {expected}")


class Nearest(NamedTuple):
    """Mean distances to the nearest training picture: of samples, and of test pictures."""

    samples: float
    test: float


def frechet(real: Tensor, fake: Tensor) -> float:
    """The squared Frechet distance of Gaussians fitted to features (N, D) and (M, D).

    d^2 = |mu_r - mu_f|^2 + tr(S_r + S_f - 2 (S_r S_f)^(1/2)) (Heusel et al. 2017, eq. 6;
    Dowson & Landau 1982), in squared units of the features, by torchmetrics. It is the FID only
    where the features are Inception's. It falls with N and M: compare at equal numbers.

    Raises DataError for features of other shapes, fewer than two rows, or not finite;
    BackendError without torchmetrics.
    """
    for name, features in (("real", real), ("fake", fake)):
        fits = features.dim() == 2 and features.is_floating_point() and len(features) >= 2
        _expect(f"{name} features", features, "(N, D) floats, N at least 2", fits)
        if not bool(features.isfinite().all()):
            raise DataError(f"{name} features hold values that are not finite")
    if real.shape[1] != fake.shape[1]:
        raise DataError(f"{real.shape[1]} real and {fake.shape[1]} fake features: not one space")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError:
        raise BackendError(
            "torchmetrics is not installed: pip install 'mdiff-toolkit[eval]'"
        ) from None
    space = nn.Identity()
    vars(space).update(num_features=real.shape[1])
    metric = FrechetInceptionDistance(feature=space)
    # The distance is the same from any origin, and its sums of squares are exact near 0.
    origin = real.double().mean(0)
    metric.update(real.double() - origin, real=True)
    metric.update(fake.double() - origin, real=False)
    # Rounding can leave a value just below 0.
    return max(0.0, float(metric.compute()))


def classifier_agreement(logits: Tensor, labels: Tensor) -> float:
    """The share of samples whose largest logit, of (N, K), is at the requested `labels` (N,)."""
    if logits.dim() != 2 or labels.dtype != torch.int64 or labels.shape != logits.shape[:1]:
        raise DataError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} {labels.dtype}: "
            "expected (N, K) and (N,) int64"
        )
    if not len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise DataError(f"labels: expected at least one, each 0 to {logits.shape[1] - 1}")
    return float((logits.argmax(1) == labels).double().mean())


def diversity(real: Tensor, fake: Tensor, *, real_labels: Tensor, fake_labels: Tensor) -> float:
    """The mean distance within a class of `fake`, divided by that of `real`.

    The mean over pairs of different pictures of one class, then over the classes of `fake`.
    Raises DataError where such a class has fewer than two pictures on either side.
    """
    _check_alike(real=real, fake=fake)
    sides = (("real", real, real_labels), ("fake", fake, fake_labels))
    for _, pictures, labels in sides:
        fits = labels.dtype == torch.int64 and labels.shape == pictures.shape[:1]
        _expect("labels", labels, f"({len(pictures)},) int64", fits)
    classes, spread = sorted(set(fake_labels.tolist())), []
    for name, pictures, labels in sides:
        each = []
        for label in classes:
            members = _flat(pictures[labels == label])
            if len(members) < 2:
                raise DataError(f"{len(members)} {name} pictures of class {label}: need two")
            each.append(torch.pdist(members).mean())
        spread.append(torch.stack(each).mean())
    if float(spread[0]) == 0:
        raise DataError("the real pictures of each class are all the same")
    return float(spread[1] / spread[0])


def nearest(fake: Tensor, *, train: Tensor, test: Tensor) -> Nearest:
    """Mean distances to the nearest training picture, of samples (N, ...) and of test pictures.

    Copies of training pictures are nearer than the test set is; samples at the same distance as
    the test set show no memorisation (Meehan et al. 2020).
    """
    _check_alike(train=train, fake=fake)
    _check_alike(train=train, test=test)
    return Nearest(_to_nearest(fake, train), _to_nearest(test, train))


def pixel_features(pictures: Tensor, *, side: int = 8) -> Tensor:
    """Features without a network: pictures (N, C, H, W) uint8 averaged to side x side.

    (N, C * side * side) float32 in 0 to 1; sides below `side` are kept.
    """
    fits = pictures.dim() == 4 and pictures.dtype == torch.uint8 and 0 not in pictures.shape
    _expect("pictures", pictures, "(N, C, H, W) uint8", fits)
    size = (min(side, pictures.shape[2]), min(side, pictures.shape[3]))
    return nn.functional.adaptive_avg_pool2d(pictures.float() / WHITE, size).flatten(1)


def inception_features(pictures: Tensor, *, weights: str) -> Tensor:
    """The 2,048 features of the FID's Inception v3, (N, 2048) float32, by torch-fidelity.

    `pictures` (N, C, H, W) uint8, one channel or three; `weights` is the path of the network's
    tensors, by torch-fidelity's names, as safetensors. Raises BackendError where a package is
    not installed, CheckpointError for a file that does not hold the tensors.
    """
    fits = pictures.dim() == 4 and pictures.dtype == torch.uint8 and pictures.shape[1] in (1, 3)
    _expect("pictures", pictures, "(N, 1 or 3, H, W) uint8", fits)
    require_inception()
    network = _inception(read_tensors(Path(weights)), weights)
    with torch.no_grad():
        shown = [network(some.expand(-1, 3, -1, -1)) for some in torch.split(pictures, INCEPTION)]
    return torch.cat(shown)


def require_inception() -> None:
    """Raise BackendError with the packages that Inception needs and that are not installed."""
    missing = [name for name in INCEPTION_NEEDS if find_spec(name) is None]
    if missing:
        names = " ".join(missing).replace("_", "-")
        raise BackendError(f"Inception needs what is not installed: pip install {names}")


def _inception(tensors: dict[str, Tensor], origin: str) -> nn.Module:
    """The network with these weights; CheckpointError where they do not fit."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    # torch-fidelity unpickles its file, so it is given one that was written here.
    with TemporaryDirectory() as folder:
        path = Path(folder) / "inception.pth"
        torch.save(tensors, path)
        try:
            network: nn.Module = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise CheckpointError(f"{origin} does not hold Inception's weights: {first}") from error
    return network


def _to_nearest(pictures: Tensor, others: Tensor) -> float:
    """The mean distance of each picture to the nearest of the others."""
    flat, least = _flat(others), []
    for some in map(_flat, torch.split(pictures, ROWS)):
        # cdist expands the square: good enough to find the nearest, but not 0 for a copy.
        closest = flat[torch.cdist(some, flat).argmin(1)]
        least.append((some - closest).norm(dim=1))
    return float(torch.cat(least).double().mean())


def _flat(pictures: Tensor) -> Tensor:
    return pictures.flatten(1).float() / WHITE


def _check_alike(**named: Tensor) -> None:
    """Raise DataError where one is not (N, ...) uint8 or the shapes of a picture differ."""
    for name, pictures in named.items():
        fits = pictures.dtype == torch.uint8 and pictures.dim() >= 2 and 0 not in pictures.shape
        _expect(name, pictures, "(N, ...) uint8", fits)
    if len({pictures.shape[1:] for pictures in named.values()}) > 1:
        shown = ", ".join(f"{name} {tuple(p.shape[1:])}" for name, p in named.items())
        raise DataError(f"pictures of different shapes: {shown}")
