"""Our transformer without a table of embeddings: bits in, grouped logits out.

The generator of MaskBit (Weber et al. 2024, section 4): a token is read as its bits, -1 or +1,
so that tokens that differ in one bit are alike from the start. A place holds several groups of
bits, each a token of the canvas: hidden, scored and written on its own.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM
from transformers import initialization as init

from mdiff.backbones.layers.bits import bits_of
from mdiff.backbones.layers.transformer import Projection
from mdiff.backbones.transformer import (
    Head,
    TransformerConfig,
    TransformerForMaskedLM,
    check_memory,
    check_options,
    parameter_count,
)
from mdiff.denoiser import Condition
from mdiff.errors import ConfigError

# A group's head has a column for each of its ids.
MOST_BITS_A_GROUP = 16


class BitTransformerConfig(TransformerConfig):
    """The shape of a `BitTransformerForMaskedLM`: `TransformerConfig`'s, and that of a place.

    Each of the `grid` (h, w) places holds `groups` tokens, side by side, and `bits` bits in
    all: a canvas has h w groups tokens of vocab_size = 2^(bits / groups) ids, and the mask is
    the id after them. `layout` of one run (h, w, groups) says grid and groups, `vocab_size`
    says the bits. `embedding` "bits" reads a token as its bits, most significant first;
    "table" as a learned row for each id of each group, which is the bits at first. A hidden
    group is zeros; with `mask_vector` a learned vector of the group's own is added.

    Raises ConfigError for what cannot be meant or contradicts itself.
    """

    model_type = "mdiff-bit-transformer"

    vocab_size: int = None  # type: ignore[assignment]
    max_length: int = None  # type: ignore[assignment]
    bits: int = None  # type: ignore[assignment]
    groups: int = None  # type: ignore[assignment]
    embedding: str = "bits"
    mask_vector: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layout is not None:
            self._take_layout()
        each = self._settle_bits()
        self._agree("vocab_size", 2**each)
        self._agree("mask_id", 2**each)
        self._agree("max_length", self.places * self.groups)
        if self.embedding not in ("bits", "table"):
            raise ConfigError(f"embedding={self.embedding!r}: expected 'bits' or 'table'")
        if not isinstance(self.mask_vector, bool):
            raise ConfigError(f"mask_vector={self.mask_vector!r}: expected true or false")
        if self.causal or self.tie:
            raise ConfigError("causal and tie: a place's groups are written at once, by own heads")
        super().__post_init__(**kwargs)

    def _settle_bits(self) -> int:
        """Set bits and groups where they follow from the other options; the bits of a group."""
        # None is how a caller leaves these to follow from the others.
        groups: Any = self.groups
        bits: Any = self.bits
        groups = 1 if groups is None else groups
        sides = self.grid if isinstance(self.grid, list | tuple) else ()
        if len(sides) != 2 or not all(_is_whole(n) for n in (*sides, groups)):
            raise ConfigError(
                f"grid={self.grid!r}, groups={groups!r}: expected the places, two whole numbers "
                "h and w, and how many tokens each holds, all at least 1"
            )
        if bits is None and _is_whole(self.vocab_size):
            bits = groups * (self.vocab_size.bit_length() - 1)
            below = 2 ** (bits // groups)
            if below != self.vocab_size:
                raise ConfigError(
                    f"vocab_size={self.vocab_size}: bits make a power of two, {below} or "
                    f"{2 * below}"
                )
        each = bits // groups if _is_whole(bits) else 0
        if not 1 <= each <= MOST_BITS_A_GROUP or bits != groups * each:
            raise ConfigError(
                f"bits={bits!r}: expected a multiple of groups={groups}, with 1 to "
                f"{MOST_BITS_A_GROUP} bits each"
            )
        self.groups, self.bits = groups, bits
        return int(each)

    def _take_layout(self) -> None:
        """Read the one run of a layout as the grid and the groups."""
        runs = self.layout if isinstance(self.layout, list | tuple) else []
        if len(runs) != 1 or not isinstance(runs[0], list | tuple) or len(runs[0]) != 3:
            raise ConfigError(
                f"layout={self.layout!r}: bits take one run (h, w, tokens a place), no other part"
            )
        h, w, groups = runs[0]
        self._agree("grid", [h, w])
        self._agree("groups", groups)
        self.layout = None

    def _agree(self, name: str, value: Any) -> None:
        """Set an option to what the others make it; ConfigError where it says otherwise."""
        given = getattr(self, name)
        if given is not None and (list(given) if isinstance(given, tuple) else given) != value:
            raise ConfigError(f"{name}={given!r}: the other options make it {value!r}")
        setattr(self, name, value)

    @property
    def rows(self) -> int:
        """How many vectors of the width a place is summed from."""
        return self.bits + self.groups * self.mask_vector

    @property
    def places(self) -> int:
        """How many places have an embedding of their own: all of them."""
        h, w = self.grid or (0, 0)
        return h * w


def bit_parameter_count(config: BitTransformerConfig) -> int:
    """How many weights a model of this shape has, known before any is allocated."""
    more_heads = (config.groups - 1) * config.vocab_size * config.width
    table = config.vocab_size * config.bits * (config.embedding == "table")
    return parameter_count(config) + more_heads + table


def signs(ids: Tensor, count: int) -> Tensor:
    """The bits (..., count) of `ids` (...) as -1 and +1 int64, the most significant first.

    >>> signs(torch.tensor([1, 6]), 3).tolist()
    [[-1, -1, 1], [1, 1, -1]]
    """
    return 2 * bits_of(ids, count) - 1


class BitTable(nn.Embedding):
    """A row of `each` numbers for each of 2^each ids of each group; at first its bits."""

    def __init__(self, groups: int, each: int) -> None:
        self.groups, self.each = groups, each
        super().__init__(groups * 2**each, each)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make every row the bits of its id."""
        bits = signs(torch.arange(2**self.each, device=self.weight.device), self.each)
        init.copy_(self.weight, bits.repeat(self.groups, 1).to(self.weight.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """The rows (..., groups, each) of ids (..., groups)."""
        first = torch.arange(self.groups, device=ids.device) << self.each
        return super().forward(first + ids)


class BitEmbedding(nn.Module):
    """What a place is at first: its groups' bits side by side, projected to the width."""

    def __init__(self, config: BitTransformerConfig) -> None:
        super().__init__()
        self.each, self.mask_id = config.bits // config.groups, config.mask_id
        table = config.embedding == "table"
        self.table = BitTable(config.groups, self.each) if table else None
        self.project = Projection(config.bits, config.width, config.init_std)
        self.hidden = None
        if config.mask_vector:
            self.hidden = Projection(config.groups, config.width, config.init_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """The vectors (B, P, D) of places with the tokens (B, P, groups)."""
        hidden = tokens == self.mask_id
        kind = self.project.weight.dtype
        if self.table is None:
            code = signs(tokens, self.each).to(kind)
        else:
            code = self.table(tokens.masked_fill(hidden, 0))
        x: Tensor = self.project(code.masked_fill(hidden[..., None], 0).flatten(2))
        return x if self.hidden is None else x + self.hidden(hidden.to(kind))


class BitTransformerForMaskedLM(TransformerForMaskedLM):
    """`TransformerForMaskedLM` over the h w places of a canvas of h w groups tokens.

    A token's features lie in its group's columns among zeros, so that the head, one matrix,
    is a head of its own for each group.
    """

    config_class = BitTransformerConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: BitTransformerConfig) -> None:
        super().__init__(config)
        self.add_module("embedding", BitEmbedding(config))
        columns = config.vocab_size
        self.head = Head(config.groups * config.width, columns, columns, config.init_std)
        # Once more, for the two that stand in place of the parent's.
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the parent's, but a table starts as the bits that it stands for."""
        if isinstance(module, BitTable):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def features(
        self,
        tokens: Tensor,
        *,
        at: Tensor | None = None,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        t: Tensor | None = None,
        cond: Condition | None = None,
        number: int | None = None,
        layer: int | None = None,
    ) -> Tensor:
        """What `head` reads: (B, L, groups D), or the rows `at` (B, L) bool, (N, groups D).

        The last part of the network runs on the places that hold a row of `at`. With `layer`,
        the stream as it leaves that block at each token's place, (B, L, D) or (N, D). Raises
        ConfigError where L, the padding or a document's end cuts a place.
        """
        groups = self.config.groups
        own = torch.eye(groups, dtype=torch.bool, device=tokens.device)
        rows = None if at is None else self._of_places(at, "at")
        x = super().features(
            self._of_places(tokens, "tokens"),
            at=None if rows is None else rows.any(2),
            valid=None if valid is None else self._whole_places(valid, "valid"),
            documents=None if documents is None else self._whole_places(documents, "documents"),
            t=t, cond=cond, layer=layer,
        )  # fmt: skip
        if rows is None:
            x = x.repeat_interleave(groups, 1)
            group = torch.arange(x.shape[1], device=x.device) % groups
        else:
            place, group = rows[rows.any(2)].nonzero(as_tuple=True)
            x = x[place]
        if layer is not None:
            return x
        return (x[..., None, :] * own[group][..., None]).flatten(-2)

    def _of_places(self, per_token: Tensor, name: str) -> Tensor:
        """(B, L) as (B, P, groups)."""
        (batch, length), groups = per_token.shape, self.config.groups
        if length % groups:
            raise ConfigError(f"{name} of {length} tokens: a place holds {groups}, one is cut")
        return per_token.view(batch, length // groups, groups)

    def _whole_places(self, per_token: Tensor, name: str) -> Tensor:
        """What the tokens of each place say alike, (B, P)."""
        each = self._of_places(per_token, name)
        # A wait for the device, in padded or packed calls alone.
        if bool((each != each[..., :1]).any()):
            raise ConfigError(f"{name} cuts a place: its {each.shape[2]} tokens go together")
        return each[..., 0]


def bit_transformer(**options: Any) -> BitTransformerForMaskedLM:
    """A freshly initialised model; the options are those of `BitTransformerConfig`.

    The weights come from torch's global generator: seed it to get the same ones. Raises
    ConfigError for unknown or absurd options, and where the machine's memory is too small.

    >>> model = bit_transformer(grid=[2, 3], bits=6, groups=2, width=16, depth=1, heads=2)
    >>> model(torch.full((1, 12), 8)).shape
    torch.Size([1, 12, 8])
    """
    check_options(options, BitTransformerConfig, "the bit transformer")
    config = BitTransformerConfig(**options)
    check_memory(bit_parameter_count(config))
    return BitTransformerForMaskedLM(config)


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 1


AutoConfig.register(BitTransformerConfig.model_type, BitTransformerConfig, exist_ok=True)
AutoModelForMaskedLM.register(BitTransformerConfig, BitTransformerForMaskedLM, exist_ok=True)
