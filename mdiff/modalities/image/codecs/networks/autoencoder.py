"""The networks of learned codecs: a convolutional encoder and decoder without global operations.

The shape of a VQGAN (Esser et al. 2021, table 7) with norms over channels alone, so that what a
token reads of the picture is bounded and known: `Encoder.receptive_field_margin`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.errors import ConfigError
from mdiff.kernels.dense import rms_norm

# The widest level holds this many times the channels of the finest.
MOST_WIDENING = 4
# More than any codec has, and little enough that one is made at once.
MOST = {"codebook_size": 1 << 20, "width": 4096, "code_width": 4096, "blocks": 32}
MOST_OTHERS = 256


def levels_of(stride: int) -> int:
    """How many halvings make `stride`; ConfigError where it is not a power of two."""
    if stride < 1 or stride & (stride - 1):
        raise ConfigError(f"stride={stride}: expected a power of two, such as 4")
    return stride.bit_length() - 1


def check_counts(**counts: int) -> None:
    """Raise ConfigError for a count that is no whole number of at least 1, or an absurd one."""
    for name, value in counts.items():
        most = MOST.get(name, MOST_OTHERS)
        if type(value) is not int or not 1 <= value <= most:
            raise ConfigError(f"codec.{name}={value!r}: expected a whole number, 1 to {most}")


def width_at(level: int, width: int) -> int:
    """The channels at a resolution halved `level` times."""
    return width * min(1 << level, MOST_WIDENING)


class ChannelNorm(nn.Module):
    """RMSNorm over the channels of (B, C, H, W), each position by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised `x`."""
        return rms_norm(x.permute(0, 2, 3, 1), self.weight).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(norm x)))), of one width; kernel 1 reads its own position alone."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.first = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.second = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The sum, of the shape of `x`."""
        sum_: Tensor = x + self.second(F.silu(self.first(F.silu(self.norm(x)))))
        return sum_


class Encoder(nn.Module):
    """Pictures (B, C, H, W) to features (B, out, H / stride, W / stride).

    `blocks` residual blocks at each resolution, of `kernel` 1 (a token reads its own patch
    alone, `receptive_field_margin` 0) or 3.
    """

    def __init__(
        self, *, channels: int, width: int, stride: int, blocks: int, out: int, kernel: int
    ) -> None:
        super().__init__()
        halvings = levels_of(stride)
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width_at(0, width), kernel, padding=kernel // 2)
        ]
        # Pixels a cell; each kernel of 3 reads one cell more on each side.
        cell, self.receptive_field_margin = 1, kernel // 2
        for level in range(halvings):
            layers += [ResidualBlock(width_at(level, width), kernel) for _ in range(blocks)]
            self.receptive_field_margin += 2 * blocks * cell * (kernel // 2)
            layers.append(nn.Conv2d(width_at(level, width), width_at(level + 1, width), 2, 2))
            cell *= 2
        deepest = width_at(halvings, width)
        layers += [ResidualBlock(deepest, kernel) for _ in range(blocks)]
        self.receptive_field_margin += 2 * blocks * cell * (kernel // 2)
        layers += [ChannelNorm(deepest), nn.Conv2d(deepest, out, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """The features."""
        features: Tensor = self.layers(x)
        return features


class Decoder(nn.Module):
    """Features (B, inputs, h, w) to pictures (B, C, h stride, w stride), by kernels of 3."""

    def __init__(self, *, channels: int, width: int, stride: int, blocks: int, inputs: int) -> None:
        super().__init__()
        halvings = levels_of(stride)
        layers: list[nn.Module] = [nn.Conv2d(inputs, width_at(halvings, width), 3, padding=1)]
        for level in range(halvings, 0, -1):
            layers += [ResidualBlock(width_at(level, width), 3) for _ in range(blocks)]
            finer = width_at(level - 1, width)
            layers += [nn.Conv2d(width_at(level, width), 4 * finer, 1), nn.PixelShuffle(2)]
        layers += [ResidualBlock(width_at(0, width), 3) for _ in range(blocks)]
        layers += [ChannelNorm(width_at(0, width))]
        layers += [nn.Conv2d(width_at(0, width), channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """The pictures, in [-1, 1] where they fit well."""
        pictures: Tensor = self.layers(x)
        return pictures
