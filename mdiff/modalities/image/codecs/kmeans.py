"""Patch k-means: a token is the nearest of a few hundred patches of pixels."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from mdiff.errors import ConfigError, DataError
from mdiff.kernels import philox
from mdiff.modalities.image.codec import Report, check_ids, check_pictures, learnt_bytes

# Patches that are fitted, drawn by the seed where there are more; more change little.
FITTED = 200_000
BATCH = 4096
# Passes over the patches; a fixed number, as stopping early would hang on rounding.
PASSES = 20
# Rounds over all patches at the end, and more for as long as a centre is dead.
SETTLED = 10
REVIVALS = 50
# Pixels are centred for the distances, and float32 counts whole numbers up to 2^24: below so
# many numbers a patch twice a squared distance (at most 3 * 128^2 each) is exact.
MIDDLE = 128
EXACT_IN_FLOAT32 = 2**24 // (3 * MIDDLE**2)
# Distances held at once, patches times centres.
DISTANCES_AT_ONCE = 2**23


class KMeans:
    """The codec; see `kmeans`. `codebook` (K, C, stride, stride) uint8, None before `fit`."""

    name = "kmeans"
    codes_per_position = 1
    receptive_field_margin = 0
    lossless = False

    def __init__(self, *, channels: int, stride: int, codebook_size: int) -> None:
        self.channels, self.stride, self.codebook_size = channels, stride, codebook_size
        self.codebook: Tensor | None = None

    def encode(self, images: Tensor) -> Tensor:
        """Ids (B, H / stride, W / stride) int64: the nearest centre, of equals the lowest id."""
        check_pictures(images, channels=self.channels, stride=self.stride)
        cut = patches(images, self.stride)
        return nearest_centre(cut.flatten(0, 2), self._fitted().flatten(1))[0].view(cut.shape[:3])

    def decode(self, ids: Tensor) -> Tensor:
        """The pictures (B, C, H, W) uint8 of ids: their centres side by side."""
        check_ids(ids, codebook_size=self.codebook_size, codes_per_position=1)
        # (B, h, w, C, stride, stride), each row of patches to rows of pixels.
        cut = self._fitted().to(ids.device)[ids].permute(0, 3, 1, 4, 2, 5)
        return cut.flatten(4, 5).flatten(2, 3).contiguous()

    def fit(self, images: Tensor, *, seed: int = 0, report: Report | None = None) -> Self:
        """Learn the centres by mini-batch k-means (Sculley 2010) from k-means++ seeds.

        Centres are whole pixel values; those that no patch is nearest to are replaced
        (`settle`). DataError where the patches drawn hold fewer different ones than
        `codebook_size`.
        """
        from sklearn.cluster import MiniBatchKMeans

        check_pictures(images, channels=self.channels, stride=self.stride)
        cut = patches(images, self.stride).flatten(0, 2).cpu()
        if len(cut) > FITTED:
            drawn = philox.uniform(seed, torch.arange(FITTED), 0, 0, purpose=philox.SHUFFLE)
            cut = cut[(drawn.double() * len(cut)).long()]
        unlike, times = torch.unique(cut, dim=0, return_counts=True)
        if len(unlike) < self.codebook_size:
            raise DataError(
                f"{len(unlike)} different patches: codebook_size={self.codebook_size} needs as many"
            )
        if report is not None:
            report(f"{len(cut)} patches, {len(unlike)} of them different")
        made = MiniBatchKMeans(
            self.codebook_size, batch_size=BATCH, n_init=1, max_iter=PASSES, tol=0.0,
            max_no_improvement=None, random_state=seed % 2**32,
        ).fit(unlike.numpy().astype("float32"), sample_weight=times.numpy())  # fmt: skip
        centres = torch.from_numpy(made.cluster_centers_).round().clamp(0, 255).to(torch.uint8)
        centres, revived = settle(centres, unlike, times)
        if report is not None:
            report(f"{self.codebook_size} centres, {revived} replaced")
        self.codebook = centres.view(-1, self.channels, self.stride, self.stride)
        return self

    def config(self) -> dict[str, object]:
        """The options that `kmeans` takes back, with the name."""
        return {
            "name": self.name, "channels": self.channels, "stride": self.stride,
            "codebook_size": self.codebook_size,
        }  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """`codebook` (K, C, stride, stride) uint8; nothing before `fit`."""
        return {} if self.codebook is None else {"codebook": self.codebook}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back `state()`; CheckpointError where it is missing or of another shape."""
        shape = (self.codebook_size, self.channels, self.stride, self.stride)
        self.codebook = learnt_bytes(tensors, "codebook", shape)

    def _fitted(self) -> Tensor:
        if self.codebook is None:
            raise ConfigError("this kmeans codec has no centres yet: fit it or load it")
        return self.codebook


def patches(images: Tensor, stride: int) -> Tensor:
    """Pictures (B, C, H, W) as patches (B, H / stride, W / stride, C * stride * stride)."""
    batch, channels, height, width = images.shape
    parts = images.reshape(batch, channels, height // stride, stride, width // stride, stride)
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3)


def nearest_centre(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of `centres` (K, D) uint8 to each of `points` (N, D) uint8, and how far.

    Ids (N,) int64 and squared distances (N,). Whole numbers throughout, |c|^2 - 2 x.c for the
    order, so that neither the batch nor the device can change an id.
    """
    exact = torch.float32 if points.shape[1] <= EXACT_IN_FLOAT32 else torch.float64
    middle = centres.to(points.device, exact) - MIDDLE
    norms = middle.square().sum(1)
    ids, distances = [], []
    for some in torch.split(points, max(1, DISTANCES_AT_ONCE // len(centres))):
        x = some.to(exact) - MIDDLE
        least, chosen = (norms - 2 * (x @ middle.T)).min(1)
        ids.append(chosen)
        distances.append(least + x.square().sum(1))
    if not ids:
        return points.new_zeros(0, dtype=torch.int64), points.new_zeros(0, dtype=exact)
    return torch.cat(ids), torch.cat(distances)


def settle(centres: Tensor, points: Tensor, times: Tensor) -> tuple[Tensor, int]:
    """The centres after rounds of Lloyd's algorithm, none dead, and how many were replaced.

    `points` (N, D) uint8 are all different and occur `times` (N,) each. A round moves each
    centre to the rounded mean of its points, and each dead one, which no point is nearest to,
    on a point far from its own. The last rounds only revive.
    """
    centres, revived = centres.clone(), 0
    weighted = points.double() * times[:, None]
    for number in range(SETTLED + REVIVALS):
        ids, far = nearest_centre(points, centres)
        count = times.new_zeros(len(centres)).index_add_(0, ids, times)
        dead = (count == 0).nonzero()[:, 0]
        if number < SETTLED:
            sums = weighted.new_zeros(centres.shape).index_add_(0, ids, weighted)
            moved = (sums / count[:, None].clamp(min=1)).round().to(torch.uint8)
            centres = torch.where(count[:, None] > 0, moved, centres)
        elif not len(dead):
            break
        centres[dead] = points[far.argsort(descending=True, stable=True)[: len(dead)]]
        revived += len(dead)
    return centres, revived


def kmeans(*, channels: int = 3, stride: int = 4, codebook_size: int = 512) -> KMeans:
    """A codec of `codebook_size` patches of `stride` x `stride` pixels, to be fitted."""
    for name, value in (
        ("channels", channels), ("stride", stride), ("codebook_size", codebook_size),
    ):  # fmt: skip
        if type(value) is not int or value < 1:
            raise ConfigError(f"codec.{name}={value!r}: expected a whole number of at least 1")
    return KMeans(channels=channels, stride=stride, codebook_size=codebook_size)
