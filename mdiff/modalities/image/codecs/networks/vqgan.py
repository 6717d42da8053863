"""The convolutional encoder and decoder of a VQGAN (Esser et al. 2021, table 7).

One network for the published families: `Shape` says where their layers differ, `Names` how their
files name the layers.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.kernels.dense import attend
from mdiff.modalities.image.codec import finite

GROUPS = 32
EPSILON = 1e-6


@dataclass(frozen=True)
class Shape:
    """The sizes of both networks; `widths` are the channels of each level, fine levels first.

    `blocks` and `decoder_blocks` are the residual blocks of a level, `attends` and
    `decoder_attends` the levels with attention after each block, `middle` the blocks of the
    coarsest resolution between the levels and the latents, with attention after the first if
    `middle_attends`. Without `linear` the projections of attention are 1 x 1 convolutions.

    `bias` is that of the blocks' convolutions and of the encoder's first; with
    `shortcut_of_result` a block that changes the width adds a 1 x 1 of its result instead of its
    input; with `pools` the encoder halves by averages.
    """

    channels: int
    width: int
    widths: tuple[int, ...]
    latent: int
    blocks: int
    decoder_blocks: int
    attends: Sequence[bool]
    decoder_attends: Sequence[bool]
    middle: tuple[int, int] = (2, 2)
    middle_attends: bool = True
    groups: int = GROUPS
    linear: bool = False
    bias: bool = True
    shortcut_of_result: bool = False
    pools: bool = False
    last_kernel: int = 3

    def norm(self, width: int) -> nn.GroupNorm:
        """The norm of all layers; its groups divide the width."""
        return nn.GroupNorm(self.groups, width, eps=EPSILON)


@dataclass(frozen=True)
class Names:
    """A family's names of the layers: patterns and what replaces them, applied in order.

    `fine_first`: the decoder's levels are numbered from the finest, against their order of use.
    """

    replaced: tuple[tuple[str, str], ...]
    fine_first: bool = False

    def of(self, path: str, levels: int) -> str:
        """The family's name of a layer; `levels` is how many the decoder has."""
        if self.fine_first:
            turned = r"(?<=decoder\.up\.)\d+"
            path = re.sub(turned, lambda number: str(levels - 1 - int(number[0])), path)
        for pattern, replacement in self.replaced:
            path = re.sub(pattern, replacement, path)
        return path


_COMMON = ((r"(down|up)(\.\d+)\.resample", r"\1\2.\1sample"), ("shortcut", "nin_shortcut"))
TAMING = Names((
    *_COMMON, (r"mid\.block\.0", "mid.block_1"), (r"mid\.attn\.0", "mid.attn_1"),
    (r"mid\.block\.1", "mid.block_2"),
), fine_first=True)  # fmt: skip
LLAMAGEN = Names((
    *_COMMON, (r"mid\.block\.0", "mid.0"), (r"mid\.attn\.0", "mid.1"), (r"mid\.block\.1", "mid.2"),
    (r"\.block\.", ".res."), (r"\.(down|up)\.", ".conv_blocks."),
))  # fmt: skip
MASKBIT = Names((
    (r"down(\.\d+)\.resample\.", r"down\1.down_"), (r"up(\.\d+)\.resample\.", r"up\1.upsample_"),
    ("shortcut", "nin_shortcut"), (r"\.block\.", ".res_blocks."),
))  # fmt: skip
DIFFUSERS = Names((
    (r"(down|up)(\.\d+)\.resample", r"\1\2.\1samplers.0"), ("shortcut", "conv_shortcut"),
    (r"(attn\.\d+)\.norm", r"\1.group_norm"), (r"(attn\.\d+)\.([qkv])$", r"\1.to_\2"),
    ("proj_out", "to_out.0"), (r"\.block\.", ".resnets."), (r"\.attn\.", ".attentions."),
    (r"\.mid\.", ".mid_block."), (r"\.(down|up)\.", r".\1_blocks."), ("norm_out", "conv_norm_out"),
))  # fmt: skip


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x))))), x through a 1 x 1 where the width changes."""

    def __init__(self, inputs: int, outputs: int, shape: Shape) -> None:
        super().__init__()
        self.norm1 = shape.norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=shape.bias)
        self.norm2 = shape.norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=shape.bias)
        self.widens, self.of_result = inputs != outputs, shape.shortcut_of_result
        if self.widens:
            width = outputs if self.of_result else inputs
            self.shortcut = nn.Conv2d(width, outputs, 1, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.shortcut(h if self.of_result else x) if self.widens else x)


class Attention(nn.Module):
    """x + one head of attention over all positions."""

    def __init__(self, width: int, shape: Shape) -> None:
        super().__init__()
        self.linear = shape.linear
        self.norm = shape.norm(width)
        self.q, self.k, self.v, self.proj_out = (
            nn.Linear(width, width) if shape.linear else nn.Conv2d(width, width, 1)
            for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The sum, of the shape of `x` (B, C, H, W)."""
        h: Tensor = self.norm(x)
        if self.linear:
            rows = h.flatten(2).mT[:, None]
            query, key, value = (finite(each(rows)) for each in (self.q, self.k, self.v))
            mixed = attend(query, key, value, None, causal=False)
            change: Tensor = self.proj_out(mixed[:, 0])
            return x + change.mT.view(x.shape)
        # A softmax would take keys that are -inf for padding, and give finite values.
        query, key, value = (finite(each(h)).flatten(2).mT for each in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(query, key, value)
        change = self.proj_out(mixed.mT.reshape(x.shape))
        return x + change


def downsample(width: int) -> nn.Module:
    """Half the sides; the convolution is padded on the right and below alone."""
    pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=pad, conv=conv))


def upsample(width: int) -> nn.Module:
    """Twice the sides."""
    grow, conv = nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1)
    return nn.Sequential(OrderedDict(grow=grow, conv=conv))


class Level(nn.Module):
    """Residual blocks of one resolution, attention after the first `attends`, then a resampling."""

    def __init__(
        self, inputs: int, outputs: int, shape: Shape, *, blocks: int, attends: int,
        resample: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = [inputs] + [outputs] * (blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(width, outputs, shape) for width in widths)
        self.attn = nn.ModuleList(Attention(outputs, shape) for _ in range(attends))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        for number, block in enumerate(self.block):
            x = block(x)
            if number < len(self.attn):
                x = self.attn[number](x)
        return x if self.resample is None else self.resample(x)


class Encoder(nn.Module):
    """Pictures (B, C, H, W) float to (B, latent, h, w)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(shape.channels, shape.width, 3, padding=1, bias=shape.bias)
        self.down, inputs = nn.ModuleList(), shape.width
        for number, outputs in enumerate(shape.widths):
            half: nn.Module | None = None
            if number < len(shape.widths) - 1:
                half = nn.AvgPool2d(2) if shape.pools else downsample(outputs)
            self.down.append(Level(
                inputs, outputs, shape, blocks=shape.blocks, resample=half,
                attends=shape.blocks * shape.attends[number],
            ))  # fmt: skip
            inputs = outputs
        self.mid = Level(
            inputs, inputs, shape, blocks=shape.middle[0], attends=int(shape.middle_attends)
        )
        self.norm_out = shape.norm(inputs)
        kernel = shape.last_kernel
        self.conv_out = nn.Conv2d(inputs, shape.latent, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """The features."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        features: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return features


class Decoder(nn.Module):
    """(B, latent, h, w) to pictures (B, C, H, W) float; `up` has coarse levels first."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inputs = shape.widths[-1]
        self.conv_in = nn.Conv2d(shape.latent, inputs, 3, padding=1)
        self.mid = Level(
            inputs, inputs, shape, blocks=shape.middle[1], attends=int(shape.middle_attends)
        )
        self.up = nn.ModuleList()
        for number in reversed(range(len(shape.widths))):
            outputs = shape.widths[number]
            self.up.append(Level(
                inputs, outputs, shape, blocks=shape.decoder_blocks,
                attends=shape.decoder_blocks * shape.decoder_attends[number],
                resample=upsample(outputs) if number else None,
            ))  # fmt: skip
            inputs = outputs
        self.norm_out = shape.norm(inputs)
        self.conv_out = nn.Conv2d(inputs, shape.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The pictures."""
        x = self.mid(self.conv_in(x))
        for level in self.up:
            x = level(x)
        pictures: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return pictures


def published_tree(module: nn.Module, names: Names, levels: int) -> nn.Module:
    """The layers of `module` under a family's names: another tree that holds the same layers."""
    tree = nn.Module()
    for path, layer in module.named_modules():
        if any(True for _ in layer.parameters(recurse=False)):
            owner, _, last = names.of(path, levels).rpartition(".")
            submodule(tree, owner).add_module(last, layer)
    return tree


def submodule(tree: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path ("" is `tree`), made with its owners where it is not there."""
    for name in filter(None, path.split(".")):
        if name not in dict(tree.named_children()):
            tree.add_module(name, nn.Module())
        tree = tree.get_submodule(name)
    return tree
