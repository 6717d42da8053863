"""Rows of training made of pictures: one canvas a picture, in variants that look alike."""

import hashlib
import re
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.errors import ConfigError, DataError
from mdiff.kernels import philox
from mdiff.modalities.image.codec import Codec
from mdiff.modalities.image.data.images import Pictures, read_pictures
from mdiff.modalities.image.data.source import PictureSource
from mdiff.modalities.image.data.token_shards import Shards, holds_shards, open_shards
from mdiff.tokens import Batch

# Words for a side; "bright" is none.
SIDED = re.compile(r"(left|right)(s|y|er|wards?|most|hand|handed|side)?|((anti|counter)?clockwise)")
# Words of letters alone, so that "turn_left" and "LeftArrow" are two.
WORD = re.compile(r"[^\W\d_]+")
INNER_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")


class PictureRows:
    """An `Examples` of canvases (N, variants, L) int64: each epoch picks a variant of each row.

    `cond` are tensors (N, ...). `unit` and `units` are as in `Examples`; `slice_sha256` is the
    digest of what was tokenised, for a model's card.
    """

    def __init__(
        self, tokens: Tensor, *, cond: dict[str, Tensor], unit: str, units: float,
        slice_sha256: str,
    ) -> None:  # fmt: skip
        if tokens.dim() != 3 or 0 in tokens.shape:
            raise ConfigError(f"canvases {tuple(tokens.shape)}: expected (N, variants, L)")
        self.tokens = tokens.to(torch.int32)
        self.cond, self.unit, self.units = cond, unit, units
        self.length = tokens.shape[2]
        self.slice_sha256 = slice_sha256
        digest = hashlib.sha256(f"canvases {tuple(tokens.shape)};".encode())
        digest.update(self.tokens.numpy().astype("<i4").tobytes())
        for name in sorted(cond):
            digest.update(name.encode() + cond[name].numpy().astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.tokens)

    def batch(self, rows: Tensor, epoch: Tensor) -> Batch:
        """Rows `rows` (B,) int64, in the variant that epoch `epoch` (B,) shows of each."""
        share = philox.uniform(0, rows, 0, epoch, purpose=philox.SHUFFLE)
        variant = (share * self.tokens.shape[1]).long()
        return Batch(
            tokens=self.tokens[rows, variant].to(torch.int64),
            cond={name: tensor[rows] for name, tensor in self.cond.items()},
        )


def open_items(source: PictureSource, *, codec: Codec, size: tuple[int, int]) -> Pictures | Shards:
    """The source's pictures, or the tokens that this very codec made of them before.

    Raises ConfigError for tokens beside other sources or with variants, DataError for tokens of
    pictures of another size.
    """
    if not any(holds_shards(path) for path in source.paths):
        return read_pictures(source, channels=codec.channels, size=size)
    if len(source.paths) > 1 or source.flip or source.shift:
        raise ConfigError("data.source of tokens is one folder, without flip and shift")
    stored = open_shards(source.paths[0], codec=codec)
    if stored.size != tuple(size):
        raise DataError(
            f"{source.source}: tokens of {stored.size[0]} x {stored.size[1]} pixels, this "
            f"model's have {size[0]} x {size[1]}"
        )
    return stored


def says_a_side(text: str) -> bool:
    """Whether a caption or a label says left, right, or a direction of turning.

    >>> says_a_side("LeftArrow"), says_a_side("a bright lamp")
    (True, False)
    """
    words = WORD.findall(INNER_CAPITAL.sub(" ", text))
    return any(SIDED.fullmatch(word.lower()) for word in words)


def variants(
    pictures: Pictures, source: PictureSource, names: Sequence[str] | None = None
) -> list[Tensor]:
    """The pictures (N, C, H, W), shifted by up to `shift` pixels each way and flipped.

    A shift repeats the border. What its caption, or its label of `names`, calls left or right is
    not flipped.
    """
    most = source.shift
    height, width = pictures.pixels.shape[2:]
    padded = F.pad(pictures.pixels.float(), (most,) * 4, mode="replicate").to(torch.uint8)
    # First the picture as it is.
    moves = sorted(product(range(2 * most + 1), repeat=2), key=lambda move: move != (most, most))
    shifted = [padded[:, :, d : d + height, r : r + width] for d, r in moves]
    if not source.flip:
        return shifted
    captions = pictures.captions or [""] * len(pictures)
    sided = torch.tensor([says_a_side(caption) for caption in captions], dtype=torch.bool)
    if names is not None and pictures.labels is not None:
        sided |= torch.tensor([says_a_side(name) for name in names])[pictures.labels]
    return shifted + [
        torch.where(sided[:, None, None, None], each, each.flip(3)) for each in shifted
    ]
