"""Our transformer without a table of embeddings: bits in, grouped logits out.

The generator of MaskBit (Weber et al. 2024, section 4): a token is read as its bits, -1 or +1,
so that tokens that differ in one bit are alike from the start. A position of the grid holds
several groups of bits, each a token of the canvas: hidden, scored and written on its own.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self, TypeGuard

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from mdiff.backbones.layers.bits import bits_of
from mdiff.backbones.layers.config import TransformerConfig, checked
from mdiff.backbones.layers.transformer import Projection
from mdiff.backbones.transformer import Head, Transformer
from mdiff.denoiser import Cache, Condition
from mdiff.errors import ConfigError
from mdiff.files import STRICT

# A group's head has a column for each of its ids.
MOST_BITS_PER_GROUP = 16


@dataclass(config=STRICT, frozen=True)
class BitTransformerConfig(TransformerConfig):
    """The shape of a `BitTransformer`: `TransformerConfig`'s, and that of a position.

    Each of the `grid` (h, w) positions holds `groups` tokens, side by side, and `bits` bits in
    all: a canvas has h w groups tokens of vocab_size = 2^(bits / groups) ids, and the mask is
    the id after them. `layout` of one run (h, w, groups) says grid and groups, `vocab_size`
    says the bits. `embedding` "bits" reads a token as its bits, most significant first;
    "table" as a learned row for each id of each group, which is the bits at first. A hidden
    group is zeros; with `mask_vector` a learned vector of the group's own is added.
    """

    bits: int = 1
    groups: int = 1
    embedding: Literal["bits", "table"] = "bits"
    mask_vector: bool = False

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Self:
        """See `TransformerConfig.of`."""
        given = dict(options)
        if given.get("layout") is not None:
            h, w, each = _one_run(given.pop("layout"))
            _agree(given, "grid", [h, w])
            _agree(given, "groups", each)
        sides, groups, bits = _groups_and_bits(given)
        _agree(given, "vocab_size", 2 ** (bits // groups))
        _agree(given, "mask_id", 2 ** (bits // groups))
        _agree(given, "max_length", sides[0] * sides[1] * groups)
        config = super().of({**given, "bits": bits, "groups": groups})
        if config.causal or config.tie:
            raise ConfigError(
                "causal and tie: a position's groups are written at once, by own heads"
            )
        return config

    @property
    def rows(self) -> int:
        """How many vectors of the width the embedding of a position is summed from."""
        return self.bits + self.groups * self.mask_vector

    @property
    def positions(self) -> int:
        """How many positions have an embedding of their own: all of them."""
        h, w = self.grid or (0, 0)
        return h * w

    @property
    def parameter_count(self) -> int:
        """How many weights a model of this shape has, known before any is allocated."""
        more_heads = (self.groups - 1) * self.vocab_size * self.width
        table = self.vocab_size * self.bits * (self.embedding == "table")
        return super().parameter_count + more_heads + table


def _one_run(layout: object) -> tuple[object, object, object]:
    """The one run (h, w, groups) of a layout."""
    runs = layout if isinstance(layout, list | tuple) else []
    if len(runs) != 1 or not isinstance(runs[0], list | tuple) or len(runs[0]) != 3:
        raise ConfigError(
            f"layout={layout!r}: bits take one run (h, w, tokens per position), no other part"
        )
    h, w, groups = runs[0]
    return h, w, groups


def _groups_and_bits(given: Mapping[str, object]) -> tuple[list[int], int, int]:
    """The sides of the grid, the groups and the bits, where they follow from other options."""
    grid, groups, bits = given.get("grid"), given.get("groups"), given.get("bits")
    groups = 1 if groups is None else groups
    given_sides = grid if isinstance(grid, list | tuple) else ()
    sides = [n for n in given_sides if _is_whole(n)]
    if len(given_sides) != 2 or len(sides) != 2 or not _is_whole(groups):
        raise ConfigError(
            f"grid={grid!r}, groups={groups!r}: expected the positions, two whole numbers h and "
            "w, and how many tokens each holds, all at least 1"
        )
    ids = given.get("vocab_size")
    if bits is None and _is_whole(ids):
        below = 1 << ids.bit_length() - 1
        if below != ids:
            raise ConfigError(f"vocab_size={ids}: bits make a power of two, {below} or {2 * below}")
        bits = groups * (ids.bit_length() - 1)
    each = bits // groups if _is_whole(bits) else 0
    if not 1 <= each <= MOST_BITS_PER_GROUP or bits != groups * each:
        raise ConfigError(
            f"bits={bits!r}: expected a multiple of groups={groups}, with 1 to "
            f"{MOST_BITS_PER_GROUP} bits each"
        )
    return sides, groups, groups * each


def _agree(given: dict[str, object], name: str, value: object) -> None:
    """Set an option to what the others make it; ConfigError where it says otherwise."""
    own = given.get(name)
    if own is not None and (list(own) if isinstance(own, tuple) else own) != value:
        raise ConfigError(f"{name}={own!r}: the other options make it {value!r}")
    given[name] = value


def _is_whole(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 1


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
        self.weight.copy_(self.first_rows())

    def first_rows(self) -> Tensor:
        """The bits of each id of each group."""
        bits = signs(torch.arange(2**self.each, device=self.weight.device), self.each)
        return bits.repeat(self.groups, 1).to(self.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows (..., groups, each) of ids (..., groups)."""
        first = torch.arange(self.groups, device=ids.device) << self.each
        return super().forward(first + ids)


class BitEmbedding(nn.Module):
    """The embedding of a position: its groups' bits side by side, projected to the width."""

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
        """The vectors (B, P, D) of positions with the tokens (B, P, groups)."""
        hidden = tokens == self.mask_id
        kind = self.project.weight.dtype
        if self.table is None:
            code = signs(tokens, self.each).to(kind)
        else:
            code = self.table(tokens.masked_fill(hidden, 0))
        x: Tensor = self.project(code.masked_fill(hidden[..., None], 0).flatten(2))
        return x if self.hidden is None else x + self.hidden(hidden.to(kind))


class BitTransformer(Transformer):
    """`Transformer` over the h w positions of a canvas of h w groups tokens.

    A token's features lie in its group's columns among zeros, so that the head, one matrix,
    is a head of its own for each group.
    """

    model_type: ClassVar[str] = "mdiff-bit-transformer"
    architecture: ClassVar[str] = "BitTransformerForMaskedLM"

    def __init__(self, config: BitTransformerConfig) -> None:
        # Not by super(): a class that is also one of transformers' has another one next.
        Transformer.__init__(self, config)
        self.groups, columns = config.groups, config.vocab_size
        self.embedding = BitEmbedding(config)
        self.head = Head(config.groups * config.width, columns, columns, config.init_std)
        self.embedding.apply(self.initialise)
        self.head.apply(self.initialise)

    @torch.no_grad()
    def initialise(self, module: nn.Module) -> None:
        """As the parent's, but a table starts as the bits that it stands for."""
        if isinstance(module, BitTable):
            module.reset_parameters()
        else:
            super().initialise(module)

    def features(
        self, tokens: Tensor, *, at: Tensor | None = None, valid: Tensor | None = None,
        documents: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
        cache: Cache | None = None, number: int | None = None, layer: int | None = None,
        shadow_id: int | None = None,
    ) -> Tensor:  # fmt: skip
        """What `head` reads: (B, L, groups D), or the rows `at` (B, L) bool, (N, groups D).

        The last part of the network runs on the positions that hold a row of `at`. With
        `layer`, the stream as it leaves that block at each token's position, (B, L, D) or
        (N, D). Raises ConfigError where L, the padding or a document's end cuts a position.
        """
        rows = None if at is None else self._grouped(at, "at")
        x = super().features(
            self._grouped(tokens, "tokens"),
            at=None if rows is None else rows.any(2),
            valid=None if valid is None else self._of_positions(valid, "valid"),
            documents=None if documents is None else self._of_positions(documents, "documents"),
            t=t, cond=cond, cache=cache, layer=layer,
        )  # fmt: skip
        if rows is None:
            x = x.repeat_interleave(self.groups, 1)
            group = torch.arange(x.shape[1], device=x.device) % self.groups
        else:
            position, group = rows[rows.any(2)].nonzero(as_tuple=True)
            x = x[position]
        if layer is not None:
            return x
        own = torch.eye(self.groups, dtype=torch.bool, device=tokens.device)
        return (x[..., None, :] * own[group][..., None]).flatten(-2)

    def has_shadows(self) -> bool:
        """No: a position holds several tokens."""
        return False

    def _grouped(self, per_token: Tensor, name: str) -> Tensor:
        """(B, L) as (B, P, groups)."""
        batch, length = per_token.shape
        if length % self.groups:
            raise ConfigError(
                f"{name} of {length} tokens: a position holds {self.groups}, one is cut"
            )
        return per_token.view(batch, length // self.groups, self.groups)

    def _of_positions(self, per_token: Tensor, name: str) -> Tensor:
        """The value (B, P) that the tokens of each position share."""
        each = self._grouped(per_token, name)
        # A host-device synchronisation, in padded or packed calls alone.
        if bool((each != each[..., :1]).any()):
            raise ConfigError(f"{name} cuts a position: its {each.shape[2]} tokens go together")
        return each[..., 0]


def bit_transformer(
    described: Mapping[str, object] | None = None, /, **options: object
) -> BitTransformer:
    """A freshly initialised model; the options are those of `BitTransformerConfig`.

    See `transformer`.

    >>> model = bit_transformer(grid=[2, 3], bits=6, groups=2, width=16, depth=1, heads=2)
    >>> model(torch.full((1, 12), 8)).shape
    torch.Size([1, 12, 8])
    """
    if described is not None:
        return BitTransformer(BitTransformerConfig.of(described))
    return BitTransformer(checked(BitTransformerConfig, options, "the bit transformer"))
