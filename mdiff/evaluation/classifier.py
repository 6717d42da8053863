"""A small convolutional classifier of images: the labels of samples, and a feature space."""

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mdiff.errors import CheckpointError, DataError
from mdiff.files import read_json, read_tensors

CARD = "card.json"
WEIGHTS = "model.safetensors"
FEATURES = 64
BATCH = 256


class Classifier(nn.Module):
    """Three convolutions, each followed by 2 x 2 pooling, and two linear layers.

    `size` (H, W) in pixels, `channels` of the images, a column of logits for each of `labels`.
    Its features are the 64 inputs of the last layer.
    """

    def __init__(self, *, size: tuple[int, int], channels: int, labels: list[str]) -> None:
        super().__init__()
        self.size, self.channels, self.labels = size, channels, labels
        self.name, self.width = "a small classifier", FEATURES
        widths = (channels, 32, 64, 64)
        self.convolutions = nn.Sequential(*[
            layer
            for i, o in pairwise(widths)
            for layer in (
                nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(),
                nn.MaxPool2d(2),
            )
        ])  # fmt: skip
        self.inner = nn.Linear(widths[-1] * (size[0] // 8) * (size[1] // 8), FEATURES)
        self.head = nn.Linear(FEATURES, len(labels))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (N, labels) of pictures (N, C, H, W) uint8."""
        logits: Tensor = self.head(self._inner(pictures))
        return logits

    def _inner(self, pictures: Tensor) -> Tensor:
        inner: Tensor = self.inner(self.convolutions(pictures.float() / 127.5 - 1).flatten(1))
        return inner.relu()

    def logits(self, pictures: Tensor) -> Tensor:
        """Logits (N, labels) float32 of pictures (N, C, H, W) uint8, without a gradient."""
        return self._in_batches(self, pictures)

    def features(self, pictures: Tensor) -> Tensor:
        """The features (N, 64) float32 of pictures (N, C, H, W) uint8, without a gradient."""
        return self._in_batches(self._inner, pictures)

    @torch.no_grad()
    def _in_batches(self, function: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
        expected = (self.channels, *self.size)
        if pictures.dtype != torch.uint8 or tuple(pictures.shape[1:]) != expected:
            raise DataError(
                f"pictures {tuple(pictures.shape)} {pictures.dtype}: this classifier takes "
                f"(N, {', '.join(map(str, expected))}) uint8"
            )
        self.eval()
        found = torch.cat([function(some) for some in torch.split(pictures, BATCH)])
        if not bool(found.isfinite().all()):
            raise CheckpointError("the classifier gave values that are not finite: damaged weights")
        return found

    def save(self, folder: Path | str, *, card: Mapping[str, object]) -> None:
        """Write the weights and the card, with what `load_classifier` needs, into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shape = {"size": list(self.size), "channels": self.channels, "labels": self.labels}
        (folder / CARD).write_text(json.dumps({**shape, **card}, indent=1) + "\n", encoding="utf-8")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS)


def load_classifier(folder: Path | str) -> Classifier:
    """The classifier that `Classifier.save` wrote; CheckpointError where its files do not fit."""
    path = Path(folder) / CARD
    card = read_json(path)
    try:
        height, width = (int(side) for side in card["size"])
        labels = [str(name) for name in card["labels"]]
        found = Classifier(size=(height, width), channels=int(card["channels"]), labels=labels)
        found.load_state_dict(read_tensors(Path(folder) / WEIGHTS))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is not the card of these weights: {first}") from error
    return found.eval()
