"""The base of all backbones: what a family writes, and what all of them share.

A backbone of another project has one file in backbones/published. Its module's parameters and
buffers have the names of the published files, so that weights are read into them as they are and
saved as they were. The file says which configs are its own by ARCHITECTURES or `recognises`, and
its class or function of the file's name makes the module of a config.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mdiff.backbones.layers.attention import (
    KeyValues,
    attention_layout,
    block_mask,
    position_before,
    with_shadows,
)
from mdiff.denoiser import Condition, Rows, block_length_of, flat_positions
from mdiff.errors import ConfigError
from mdiff.files import CONFIG, MOST_IDS
from mdiff.process import Process


class Call(NamedTuple):
    """The arguments of a Denoiser's call beside the tokens and the requested rows."""

    valid: Tensor | None = None
    documents: Tensor | None = None
    t: Tensor | None = None
    cond: Condition | None = None
    cache: KeyValues | None = None


class Layout(NamedTuple):
    """The call of a model of one line of tokens.

    `positions` (1 or B, L) int64; `mask` (B or 1, 1, L, S) bool or None, S the positions of the
    cache and then these.
    """

    positions: Tensor
    mask: Tensor | None
    t: Tensor | None = None
    cache: KeyValues | None = None


class Backbone(nn.Module):
    """A Denoiser: `hidden` and `head` are what a family writes.

    `described` is its config.json as it was; `vocab_size` the number of logit columns;
    `mask_id` what the config says, None where it does not; `window` the trained length. With
    `shifted` the raw output at a position predicts the next one: row i is then taken from the
    position before it in its document, and the first from its own, padding aside (Gong et al.
    2025, DiffuLLaMA; Dream). With `block_seed` a block's first token is to be written before
    the others of its block, and its row is the one before it even without `shifted`. `tied` are
    names that files may leave out, with the tensor that they share. `refused` says why a model
    whose logits are here neither generates nor is scored. `noise` is what hides tokens, `process`
    that noise where it also writes random tokens; `predicts` then says what the logits are of,
    see `denoiser.Predicts`.
    """

    uses_time: bool = False
    shifted: bool = False
    block_seed: bool = False
    refused: str | None = None
    noise: str = "mask"
    process: Process | None = None
    predicts: str | None = None
    # Where a call takes its tokens, of a model on several devices.
    main_device: torch.device | None = None
    tied: Mapping[str, str] = MappingProxyType({})
    # Classes of modules that accelerate keeps on one device.
    no_split: ClassVar[tuple[str, ...]] = ()
    # The name of the file of the weights, without .safetensors.
    weights_name: ClassVar[str] = "model"

    def __init__(
        self, described: Mapping[str, object], *, vocab_size: int, mask_id: int | None,
        window: int | None,
    ) -> None:  # fmt: skip
        # Not by super(): a class that is also one of transformers' has another one next.
        nn.Module.__init__(self)
        self.described = dict(described)
        self.vocab_size, self.mask_id, self.window = vocab_size, mask_id, window
        # The names of the files that it was loaded from; none where it was not.
        self.stored: frozenset[str] = frozenset()

    if TYPE_CHECKING:

        @property
        def head(self) -> nn.Module:
            """What makes logits (N, V) of features (N, D)."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are, of a model on one device."""
        return next(self.parameters()).device

    def hidden(self, tokens: Tensor, call: Call) -> Tensor:
        """What `head` reads, at all positions: (B, L, D), unshifted; of one without `features`."""
        raise ConfigError(f"{type(self).__name__} has neither `hidden` nor `features` of its own")

    def features(
        self, tokens: Tensor, *, at: Tensor | None = None, valid: Tensor | None = None,
        documents: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
        cache: KeyValues | None = None, number: int | None = None,
    ) -> Tensor:  # fmt: skip
        """What `head` reads: (B, L, D), or the rows `at` (B, L) bool in row-major order (N, D)."""
        start = 0 if cache is None else cache.length
        x = raw = self.hidden(tokens, Call(valid, documents, t, cond, cache))
        if self.shifted or self.block_seed:
            before = position_before(tokens, valid=valid, documents=documents)
            x = raw.gather(1, before[..., None].expand_as(raw))
            if cache is not None and cache.last is not None:
                x = torch.cat([cache.last, x[:, 1:]], 1)
            if not self.shifted:
                x = torch.where(self.seeds(tokens, valid, documents, start)[..., None], x, raw)
        if cache is not None and cache.growing:
            cache.last = raw[:, -1:].detach()
        # The last of several devices may be another than the tokens'.
        x = x.to(tokens.device)
        return x if at is None else x.flatten(0, 1).index_select(0, flat_positions(at, number))

    def seeds(
        self, tokens: Tensor, valid: Tensor | None, documents: Tensor | None, start: int
    ) -> Tensor:
        """Which positions (1 or B, L) bool, `start` before them, are the first of a later block."""
        positions, _ = attention_layout(tokens, valid=valid, documents=documents, causal=False)
        positions = positions + start
        return (positions > 0) & (positions % (block_length_of(self) or MOST_IDS) == 0)

    def forward(
        self, tokens: Tensor, *, at: Tensor | None = None, valid: Tensor | None = None,
        documents: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
        cache: KeyValues | None = None, number: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits as the Denoiser protocol says."""
        x = self.features(
            tokens, at=at, valid=valid, documents=documents, t=t, cond=cond, cache=cache,
            number=number,
        )  # fmt: skip
        logits: Tensor = self.head(x)
        return logits

    def saved_config(self) -> dict[str, object]:
        """What `save_pretrained` writes as config.json."""
        return self.described

    def save_pretrained(
        self, directory: str | Path, *, state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB", **_: object,
    ) -> None:  # fmt: skip
        """Write config.json and the weights in the layout and the types that they came in.

        In one file, or above `max_shard_size` in several with an index.
        """
        from huggingface_hub import save_torch_state_dict

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.saved_config(), indent=2) + "\n")
        tensors = self.state_dict() if state_dict is None else state_dict
        kept = {n: x for n, x in tensors.items() if n in self.stored or n not in self.tied}
        # A tied tensor that the files held is written again, as a tensor of its own.
        own = {n: x.clone() if n in self.tied else x.contiguous() for n, x in kept.items()}
        save_torch_state_dict(
            own, folder, filename_pattern=self.weights_name + "{suffix}.safetensors",
            max_shard_size=max_shard_size, metadata={"format": "pt"},
        )  # fmt: skip


class SequenceBackbone(Backbone):
    """A model of one line of tokens: `stream` is given positions and the attention mask.

    A block model has a `block_length`: a position attends to its own block and those before it,
    in every call (Arriola et al. 2025). Called with a cache from `new_cache`, the tokens follow
    those that it keeps; the blocks given while it is growing must be complete.
    """

    block_length: int | None
    # The name of the module that is the head.
    head_name: ClassVar[str] = "lm_head"

    @property
    def head(self) -> nn.Module:
        """What makes logits (N, V) of features (N, D)."""
        return self.get_submodule(self.head_name)

    @abstractmethod
    def stream(self, tokens: Tensor, layout: Layout) -> Tensor:
        """What `head` reads (B, L, D)."""

    def time_of(self, layout: Layout) -> Tensor:
        """The time t (B,) of a call; ConfigError without one."""
        if layout.t is None:
            raise ConfigError("this model uses the time: call it with t=")
        return layout.t

    def new_cache(self) -> KeyValues:
        """An empty cache for one batch, see `KeyValues`."""
        return KeyValues()

    def hidden(self, tokens: Tensor, call: Call) -> Tensor:
        """`stream` with the layout of these tokens; raises ConfigError as `layout` does."""
        return self.stream(tokens, self.layout(tokens, call))

    def has_shadows(self) -> bool:
        """Whether the row of a position is its own, and not that of the one before."""
        return not (self.shifted or self.block_seed)

    def shadow_rows(
        self, tokens: Tensor, *, at: Tensor, mask_id: int, number: int | None = None,
        valid: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
    ) -> Rows:  # fmt: skip
        """The rows at the positions `at` (B, L) bool, those of tokens by their shadows."""
        layout = self.layout(tokens, Call(valid, None, t, cond))
        more = with_shadows(
            tokens, layout.positions, layout.mask, at=at, mask_id=mask_id, number=number
        )
        x = self.stream(more.tokens, Layout(more.positions, more.mask, t)).to(tokens.device)
        return Rows(x.flatten(0, 1).index_select(0, more.rows), head=self.head)

    def layout(self, tokens: Tensor, call: Call) -> Layout:
        """The layout of these tokens; ConfigError for a condition or cache that it cannot take."""
        valid, documents, t, cond, cache = call
        if cond:
            raise ConfigError(f"condition {sorted(cond)[0]!r}: this model takes no condition")
        block = block_length_of(self)
        if cache is not None and (block is None or valid is not None or documents is not None):
            raise ConfigError(
                "a cache is for a block model and a batch without padding or packed documents"
            )
        positions, mask = attention_layout(tokens, valid=valid, documents=documents, causal=False)
        before = 0 if cache is None else cache.length
        positions = positions + before
        mask = self.limited(tokens, positions, mask, kept=before)
        return Layout(positions, mask, t, cache)

    def limited(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, *, kept: int
    ) -> Tensor | None:
        """`mask` cut to what a position attends to: its own block and those before it."""
        block = block_length_of(self)
        return mask if block is None else block_mask(positions, mask, block, kept=kept)
