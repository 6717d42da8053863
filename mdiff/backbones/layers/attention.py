"""Attention that all backbones share: positions and masks, rotary tables, caches of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.denoiser import flat_positions
from mdiff.kernels.dense import attend

# The cos and the signed sin of rotary angles, see `rotate`.
Tables = tuple[Tensor, Tensor]


class KeyValues:
    """The keys and values of the positions before a block, layer by layer, each (B, G, S, D).

    `joined` is called once a layer. While `growing`, its arguments are kept, without a graph.
    `last` (B, 1, D) is what a head reads at the last of these positions, where that is known.
    """

    last: Tensor | None = None

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.growing = False

    @property
    def length(self) -> int:
        """How many positions are kept."""
        first = next(iter(self.layers.values()), None)
        return 0 if first is None else first[0].shape[2]

    def joined(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The kept keys and values of a layer, followed by `key` and `value` (B, G, L, D)."""
        if layer in self.layers:
            before = self.layers[layer]
            key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        if self.growing:
            self.layers[layer] = (key.detach(), value.detach())
        return key, value

    def of_rows(self, rows: Tensor) -> KeyValues:
        """A copy for some rows of the batch, `rows` (N,) int64."""
        some = KeyValues()
        for layer, (key, value) in self.layers.items():
            some.layers[layer] = (key[rows], value[rows])
        some.last = None if self.last is None else self.last[rows]
        return some


class Context(NamedTuple):
    """What the layers of one call share.

    `tables` (1 or B, L, R) of rotary positions, None without; `mask` (B or 1, 1, L, S) bool,
    which positions each attends to, None for all; `cache` of the positions before these;
    `query_scale` (1 or B, L), what the queries are multiplied by, None for 1. A tuple, so that
    accelerate moves its tensors to the device of each layer.
    """

    tables: Tables | None = None
    mask: Tensor | None = None
    cache: KeyValues | None = None
    query_scale: Tensor | None = None


def attention(
    query: Tensor, key: Tensor, value: Tensor, context: Context, *, layer: int = 0,
    wide: bool = False, causal: bool = False,
) -> Tensor:  # fmt: skip
    """Attention (B, L, H D) of query (B, L, H, D) over key and value (B, L, G, D).

    The first R entries of a query's and a key's head are rotated by the tables (all of them, or
    the part of GPT-NeoX's partial rotation), in the type of the query or, `wide`, in float32 at
    least. Each key serves H / G heads in a row (Ainslie et al. 2023). What the cache holds of
    layer number `layer` precedes the keys. `causal` is for a context without a mask.
    """
    if context.tables is not None:
        kind = torch.promote_types(query.dtype, torch.float32) if wide else query.dtype
        cos, sin = (table[:, :, None].to(kind) for table in context.tables)
        query, key = (rotate(x.to(kind), cos, sin).to(x.dtype) for x in (query, key))
    if context.query_scale is not None:
        query = query * context.query_scale[:, :, None, None].to(query.dtype)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if context.cache is not None:
        key, value = context.cache.joined(layer, key, value)
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    return attend(query, key, value, context.mask, causal=causal).transpose(1, 2).flatten(2)


def attention_layout(
    tokens: Tensor, *, valid: Tensor | None, documents: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor | None]:
    """Each token's position, (1 or B, L) int64, and the attention mask (B, 1, L, L) bool.

    A position is the rank among the valid tokens of the same document, so that neither
    padding on either side nor what is packed beside it moves a document. A position attends to
    the valid ones of its own document (with `causal`, those up to itself), and always to itself,
    so that no row of padding is empty. None means that nothing is cut (but by causality).
    """
    length = tokens.shape[1]
    if valid is None and documents is None:
        return torch.arange(length, device=tokens.device)[None], None
    mask = torch.ones(1, 1, 1, dtype=torch.bool, device=tokens.device)
    if valid is not None:
        mask = valid[:, None, :]
    if documents is None:
        positions = (mask[:, 0].cumsum(1) - 1).clamp(min=0)
    else:
        mask = mask & (documents[:, :, None] == documents[:, None, :])
        positions = mask.tril(-1).sum(2)
    mask = mask | torch.eye(length, dtype=torch.bool, device=tokens.device)
    return positions, (mask.tril() if causal else mask)[:, None]


def block_mask(positions: Tensor, mask: Tensor | None, block: int, *, kept: int) -> Tensor | None:
    """`mask` cut to each position's own block and those before it; None where nothing is cut.

    `positions` (1 or B, L), which follow `kept` others in a cache.
    """
    end = kept + positions.shape[1]
    if mask is None and kept // block == (end - 1) // block:
        return None
    own = positions // block
    every = torch.arange(end, device=own.device)[None] // block if kept else own
    before = (every[:, None, :] <= own[:, :, None])[:, None]
    return before if mask is None else mask & before


class Shadows(NamedTuple):
    """A canvas with shadow masks behind it, see `with_shadows`.

    `tokens` and `positions` (B, L + S) int64, `mask` (B, 1, L + S, L + S) bool, and `rows` (N,)
    int64, the flat indices of what is asked for among the B * (L + S).
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    rows: Tensor


def with_shadows(
    tokens: Tensor, positions: Tensor, mask: Tensor | None, *, at: Tensor, mask_id: int,
    number: int | None,
) -> Shadows:  # fmt: skip
    """`tokens` (B, L) with a shadow for each that stands at one of the `number` positions `at`.

    A shadow is a mask of the same position that attends to what the position does by `mask`
    (B or 1, 1, L, L), but for that position, and to itself; nothing else attends to it.
    """
    length = tokens.shape[1]
    standing = at & (tokens != mask_id)
    # A row with fewer has some that nobody asks for behind its own.
    size = int(standing.sum(1).max())
    column = (~standing).long().argsort(dim=1, stable=True)[:, :size]
    attended = torch.ones_like(tokens, dtype=torch.bool)[:, None]
    attended = (attended if mask is None else mask[:, 0]).expand(len(tokens), length, length)
    by_shadows = attended.gather(1, column[..., None].expand(-1, -1, length))
    by_shadows = by_shadows.scatter(2, column[..., None], False)
    own = torch.eye(length + size, dtype=torch.bool, device=tokens.device)
    every = F.pad(torch.cat([attended, by_shadows], 1), (0, size)) | own
    index = torch.arange(length, device=tokens.device)
    index = torch.where(standing, length + standing.cumsum(1) - 1, index).flatten()
    flat = flat_positions(at, number)
    positions = positions.expand(tokens.shape)
    return Shadows(
        F.pad(tokens, (0, size), value=mask_id),
        torch.cat([positions, positions.gather(1, column)], 1), every[:, None],
        flat // length * (length + size) + index[flat],
    )  # fmt: skip


def position_before(
    tokens: Tensor, *, valid: Tensor | None, documents: Tensor | None
) -> Tensor:  # fmt: skip
    """The valid position before each in its document, its own for the first: (B, L) int64.

    >>> tokens, valid = torch.zeros(1, 3), torch.tensor([[False, True, True]])
    >>> position_before(tokens, valid=valid, documents=None)
    tensor([[0, 1, 1]])
    """
    kind = torch.zeros_like(tokens, dtype=torch.int64) if documents is None else documents
    if valid is not None:
        # Padding is a document of its own.
        kind = torch.where(valid, kind, kind.max() + 1)
    order = kind.argsort(dim=1, stable=True)
    sorted_kind = kind.gather(1, order)
    follows = sorted_kind[:, 1:] == sorted_kind[:, :-1]
    before = torch.cat([order[:, :1], torch.where(follows, order[:, :-1], order[:, 1:])], 1)
    return torch.empty_like(order).scatter(1, order, before)


def rotary_tables(
    positions: Tensor, size: int, *, grid: Sequence[int] | None = None,
    axes: Tensor | None = None, base: float,
) -> Tables:  # fmt: skip
    """The tables (..., size) float32 of positions (...), for `rotate`.

    Angles are position * base^(-k / K), k < K = size / 2 (Su et al. 2021, eq. 15). With
    `grid=(h, w)` a position is a row and a column of w, half of the frequencies each; with
    `axes` (positions, 2), from `layout_axes`, it is the row and column found there.
    """
    if axes is not None:
        on = list(axes.to(positions.device)[positions].unbind(-1))
    else:
        on = [positions] if grid is None else [positions // grid[1], positions % grid[1]]
    count = size // 2 // len(on)
    powers = torch.arange(count, dtype=torch.float32, device=positions.device) / count
    return tables_of(torch.cat([axis[..., None] * base**-powers for axis in on], -1))


def frequencies(size: int, base: float, device: torch.device | None = None) -> Tensor:
    """1 / base^(2 k / size) of k = 0, 1, ... below size / 2, float32, as most files mean them."""
    return 1 / base ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)


def tables_of(angles: Tensor) -> Tables:
    """The tables (..., size) of angles (..., size / 2)."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def layout_axes(layout: Sequence[Sequence[int]]) -> Tensor:
    """The row and column (positions, 2) int64 of each position of a canvas of several runs.

    A run (h, w, each) has h rows of w positions with `each` tokens side by side, which share row
    and column; it begins where neither a row nor a column of an earlier run is.
    """
    found, start = [], 0
    for h, w, each in layout:
        axes = torch.cartesian_prod(torch.arange(h, device="cpu"), torch.arange(w, device="cpu"))
        found.append((axes + start).repeat_interleave(each, 0))
        start += max(h, w)
    return torch.cat(found)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (x_k, x_{k + R/2}) of the first R of `x` (..., D) turned by their angles."""
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat([rotate(x[..., :size], cos, sin), x[..., size:]], -1)
    return torch.addcmul(x * cos, x.roll(size // 2, -1), sin)


def own_rows(
    tokens: Tensor, valid: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The row and the position, (B, L) int64 each, of every token once documents have own rows.

    Padding is sent to row 0, position 0, which is some token's: it is not written there.
    """
    keep = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    kind = torch.zeros_like(tokens) if documents is None else documents
    batch = torch.arange(tokens.shape[0], device=tokens.device)[:, None].expand_as(tokens)
    pairs = torch.stack([batch[keep], kind[keep]], 1)
    _, numbers = torch.unique(pairs, dim=0, return_inverse=True)
    row, position = torch.zeros_like(tokens), torch.zeros_like(tokens)
    row[keep] = numbers
    # A stable sort by row keeps the order of the tokens, so that ranks follow from starts.
    order = numbers.argsort(stable=True)
    counts = numbers.bincount()
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rank = torch.empty_like(numbers)
    rank[order] = torch.arange(numbers.numel(), device=tokens.device) - starts
    position[keep] = rank
    return row, position
