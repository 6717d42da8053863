"""Models of other projects: what their config.json says, checked, and what all of them share.

A backbone of another project has one file in backbones/. Its module's parameters and buffers
have the names of the published files, so that weights are streamed in as they lie there and
saved as they were. The file says which configs are its own by ARCHITECTURES or `recognises`,
and its function of the file's name makes the module of a config.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mdiff.backbones.layers.transformer import attention_layout
from mdiff.denoiser import Condition, flat_positions
from mdiff.errors import ConfigError
from mdiff.files import CONFIG


class KeyValues:
    """The keys and values of the places before a block, layer by layer, each (B, G, S, D).

    `joined` is called once a layer. While `growing`, what it is given is kept, without a graph.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.growing = False

    @property
    def length(self) -> int:
        """How many places are kept."""
        first = next(iter(self.layers.values()), None)
        return 0 if first is None else first[0].shape[2]

    def joined(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of a layer with `key` and `value` (B, G, L, D) behind it."""
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
        return some


def place_before(
    tokens: Tensor, *, valid: Tensor | None, documents: Tensor | None
) -> Tensor:  # fmt: skip
    """The valid place before each in its document, its own for the first: (B, L) int64.

    >>> place_before(torch.zeros(1, 3), valid=torch.tensor([[False, True, True]]), documents=None)
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


class Backbone(nn.Module):
    """A Denoiser of another project's layout: `hidden` and `head` are what a family writes.

    `described` is its config.json as it was; `vocab_size` the number of logit columns;
    `mask_id` what the config says, None where it does not; `window` the trained length. With
    `shifted` the raw output at a place predicts the next one: row i is then taken from the place
    before it in its document, and the first from its own, padding aside (Gong et al. 2025,
    DiffuLLaMA; Dream). `tied` are names
    that files may leave out, with the tensor that they share.
    `refused` says why a model whose logits are here neither generates nor is scored.
    """

    uses_time: bool = False
    shifted: bool = False
    refused: str | None = None
    # Where a call takes its tokens, of a model whose parts lie on several devices.
    main_device: torch.device | None = None
    tied: Mapping[str, str] = MappingProxyType({})
    # Modules that accelerate keeps on one device.
    no_split: ClassVar[tuple[str, ...]] = ()
    # What its weights are called, without .safetensors.
    weights_name: ClassVar[str] = "model"
    head: nn.Module

    def __init__(
        self, described: Mapping[str, Any], *, vocab_size: int, mask_id: int | None,
        window: int | None,
    ) -> None:  # fmt: skip
        # Not by super(): a class that is also one of transformers' has another one next.
        nn.Module.__init__(self)
        self.described: dict[str, object] = dict(described)
        self.vocab_size, self.mask_id, self.window = vocab_size, mask_id, window
        # The names of the files that it was loaded from; none where it was not.
        self.stored: frozenset[str] = frozenset()

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are, of a model on one device."""
        return next(self.parameters()).device

    def hidden(
        self, tokens: Tensor, *, valid: Tensor | None, documents: Tensor | None,
        t: Tensor | None, cond: Condition | None, cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """What `head` reads, at all positions: (B, L, D), unshifted."""
        raise NotImplementedError

    def features(
        self, tokens: Tensor, *, at: Tensor | None = None, valid: Tensor | None = None,
        documents: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
        cache: KeyValues | None = None, number: int | None = None,
    ) -> Tensor:  # fmt: skip
        """What `head` reads: (B, L, D), or the rows `at` (B, L) bool in row-major order (N, D)."""
        x = self.hidden(
            tokens, valid=valid, documents=documents, t=t, cond=cond, cache=cache
        )  # fmt: skip
        if self.shifted:
            before = place_before(tokens, valid=valid, documents=documents)
            x = x.gather(1, before[..., None].expand_as(x))
        # Of a model on several devices the last may be another than the tokens'.
        x = x.to(tokens.device)
        return x if at is None else x.flatten(0, 1).index_select(0, flat_positions(at, number))

    def forward(
        self, tokens: Tensor, *, at: Tensor | None = None, valid: Tensor | None = None,
        documents: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
        cache: Any = None, number: int | None = None,
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
        max_shard_size: int | str = "5GB", **_: Any,
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
    """A model of one line of tokens: `stream` is given positions and who sees whom.

    A block model has a `block_length`: a place sees its own block and those before it, in
    every call (Arriola et al. 2025). Called with a cache from `new_cache`, the tokens follow
    those that it keeps; the blocks given while it is growing must be whole.
    """

    block_length: int | None

    @abstractmethod
    def stream(
        self, tokens: Tensor, positions: Tensor, sees: Tensor | None, *, t: Tensor | None,
        cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """What `head` reads (B, L, D). `positions` (1 or B, L) int64; `sees` (B or 1, 1, L, S)
        bool or None, S the places of the cache and then these.
        """

    def new_cache(self) -> KeyValues:
        """An empty cache for one batch, see `KeyValues`."""
        return KeyValues()

    def hidden(
        self, tokens: Tensor, *, valid: Tensor | None, documents: Tensor | None,
        t: Tensor | None, cond: Condition | None, cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """`stream` with the layout of these tokens; ConfigError for a condition or a cache
        that this model does not take.
        """
        if cond:
            raise ConfigError(f"condition {sorted(cond)[0]!r}: this model takes no condition")
        block = getattr(self, "block_length", None)
        if cache is not None and (block is None or valid is not None or documents is not None):
            raise ConfigError(
                "a cache is for a block model and a batch without padding or packed documents"
            )
        if cache is not None and self.shifted:
            raise ConfigError("a cache: the first row of a shifted model's block lies before it")
        positions, sees = attention_layout(tokens, valid=valid, documents=documents, causal=False)
        before = 0 if cache is None else cache.length
        positions = positions + before
        if block is not None:
            sees = _blocks_before(positions, sees, block, kept=before)
        return self.stream(tokens, positions, sees, t=t, cache=cache)


def _blocks_before(
    positions: Tensor, sees: Tensor | None, block: int, *, kept: int
) -> Tensor | None:
    """`sees` cut to each place's own block and those before it; None where nothing is cut.

    `positions` (1 or B, L), of places behind `kept` others of a cache.
    """
    end = kept + positions.shape[1]
    if sees is None and kept // block == (end - 1) // block:
        return None
    own = positions // block
    every = own
    if kept:
        every = torch.arange(end, device=own.device)[None] // block
    before = (every[:, None, :] <= own[:, :, None])[:, None]
    return before if sees is None else sees & before
