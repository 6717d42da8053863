"""The convolutional encoder and decoder of diffusers' autoencoders, named as in their files.

The networks of Esser et al. 2021 (VQGAN); all of it (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.kernels.dense import attend

EPSILON = 1e-6


class ResidualBlock(nn.Module):
    """Two convolutions, each behind a norm and a silu, added to what came in."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, EPSILON)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, EPSILON)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """The sum (B, outputs, H, W)."""
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        sum_: Tensor = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return sum_


class PlaceAttention(nn.Module):
    """Attention of one head among all places, added to what came in."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, EPSILON)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """The sum, of the shape of `x`."""
        places = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]
        mixed = attend(self.to_q(places), self.to_k(places), self.to_v(places), None, causal=False)
        sum_: Tensor = x + self.to_out[0](mixed[:, 0]).transpose(1, 2).view(x.shape)
        return sum_


class Halving(nn.Module):
    """A convolution of every second place; the picture goes on with zeros on the far sides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """`x` at half its sides."""
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


class Doubling(nn.Module):
    """Each place four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`x` at twice its sides."""
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled


class Level(nn.Module):
    """Residual blocks of one resolution, each with attention behind it if asked, then a change
    to the next; the files call the change by `downsamplers` or `upsamplers`.
    """

    def __init__(
        self, inputs: int, outputs: int, *, depth: int, groups: int, attends: bool,
        halves: bool = False, doubles: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(inputs if number == 0 else outputs, outputs, groups)
            for number in range(depth)
        )
        every = [PlaceAttention(outputs, groups) for _ in range(depth)] if attends else []
        self.attentions = nn.ModuleList(every)
        self.downsamplers = nn.ModuleList([Halving(outputs)] if halves else [])
        self.upsamplers = nn.ModuleList([Doubling(outputs)] if doubles else [])

    def forward(self, x: Tensor) -> Tensor:
        """The features (B, outputs, ., .)."""
        for number, block in enumerate(self.resnets):
            x = block(x)
            x = self.attentions[number](x) if len(self.attentions) else x
        for change in (*self.downsamplers, *self.upsamplers):
            x = change(x)
        return x


class Middle(nn.Module):
    """Two residual blocks, with attention between them if asked."""

    def __init__(self, width: int, *, groups: int, attends: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PlaceAttention(width, groups)] if attends else [])
        self.resnets = nn.ModuleList(ResidualBlock(width, width, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """The features, of the shape of `x`."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        result: Tensor = self.resnets[1](x)
        return result


class Encoder(nn.Module):
    """From `inputs` channels to `outputs`, halved between the levels of `widths`."""

    def __init__(
        self, inputs: int, outputs: int, widths: Sequence[int], *, depth: int, groups: int,
        attends: Sequence[bool], middle_attends: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        before = [widths[0], *widths[:-1]]
        self.down_blocks = nn.ModuleList(
            Level(
                before[level], widths[level], depth=depth, groups=groups, attends=attends[level],
                halves=level < len(widths) - 1,
            )
            for level in range(len(widths))
        )  # fmt: skip
        self.mid_block = Middle(widths[-1], groups=groups, attends=middle_attends)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The features of pictures (B, inputs, H, W)."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        features: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return features


class Decoder(nn.Module):
    """From `inputs` channels to `outputs`, doubled between the levels of `widths`, last first.

    `attends` is in the order of the levels as they come.
    """

    def __init__(
        self, inputs: int, outputs: int, widths: Sequence[int], *, depth: int, groups: int,
        attends: Sequence[bool], middle_attends: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        falling = list(reversed(widths))
        self.conv_in = nn.Conv2d(inputs, falling[0], 3, padding=1)
        before = [falling[0], *falling[:-1]]
        self.up_blocks = nn.ModuleList(
            Level(
                before[level], falling[level], depth=depth + 1, groups=groups,
                attends=attends[level], doubles=level < len(widths) - 1,
            )
            for level in range(len(widths))
        )  # fmt: skip
        self.mid_block = Middle(falling[0], groups=groups, attends=middle_attends)
        self.conv_norm_out = nn.GroupNorm(groups, falling[-1], EPSILON)
        self.conv_out = nn.Conv2d(falling[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The pictures of features (B, inputs, h, w)."""
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        pictures: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return pictures
