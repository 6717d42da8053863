"""Hugging Face masked language models as Denoisers.

The positions that a masked language model predicts are hidden tokens, so its logits are
already those of the clean token. What differs between the families is where positions
start and what padding does to them: each document gets a row of its own with its tokens at
the front, and a few small calls at the start are compared with the model's own on tokens
alone, which says the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mdiff.backbones.layers.attention import own_rows
from mdiff.backbones.layers.transformers_models import (
    as_when_used,
    checked_model,
    from_pretrained,
    hook,
    only_rows,
    own_logits,
    table_of,
    takes,
    test_rows,
    tokenizers_mask,
)
from mdiff.denoiser import Cache, Condition, flat_positions, unwrapped
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.files import TRANSFORMERS, ModelFiles
from mdiff.process_state import kept_generators

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of the two rows of the self-test, and how far logits may be apart: a share of the largest
# one, or so many steps of their type.
SHORT, LONG = 12, 17
CLOSE, STEPS = 5e-5, 8


class MaskedLM(nn.Module):
    """A Denoiser over `model`; see `masked_lm`.

    `first_position` is where the model's positions begin, None where it counts them itself. Where
    a row depends on the padding beside it (convolutions, landmarks, no attention mask), `pads` is
    False, and a call runs rows of one length at a time. `takes_rows` is False where its head
    cannot be run on some rows of its trunk's output alone.
    """

    uses_time = False

    def __init__(self, model: PreTrainedModel, *, mask_id: int) -> None:
        super().__init__()
        self.model = model
        self.mask_id = mask_id
        inner = self.inner
        accepted = inspect.signature(inner.forward).parameters
        self.takes_positions = "position_ids" in accepted
        # Classes of its layers, which are sharded one by one.
        self.no_split = tuple(inner._no_split_modules or ())
        self.pads = self.takes_mask = "attention_mask" in accepted
        self.takes_rows = True
        hook(inner)
        tables = [
            (len(weight), vars(module).get("padding_idx"))
            for name, module in inner.named_modules()
            for weight in module.parameters(recurse=False)
            if name.endswith(("position_embeddings", "embed_positions")) and weight.dim() == 2
        ]
        # RoBERTa and its kin keep the positions up to the padding's id free; others say in a
        # buffer where theirs begin.
        size, padding = tables[0] if tables else (None, None)
        buffers = [b for name, b in inner.named_buffers() if name.endswith("position_ids")]
        starts = [0 if padding is None else padding + 1]
        starts += [int(buffer.flatten()[0]) for buffer in buffers if buffer.numel()]
        width = LONG if size is None else min(LONG, size - max(starts))
        self.max_length: int | None = None
        self.min_length = 1
        self.vocab_size = self._self_test(test_rows(inner, mask_id, width), [*starts, None])
        if size is not None:
            self.max_length = size - (self.first_position or 0)
        self.window = self.max_length

    @property
    def inner(self) -> PreTrainedModel:
        """The model inside what may wrap it."""
        return cast("PreTrainedModel", unwrapped(self.model))

    def forward(
        self, tokens: Tensor, *, at: Tensor | None = None, valid: Tensor | None = None,
        documents: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
        cache: Cache | None = None, number: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits as the Denoiser protocol says; what stands at padding has no meaning.

        With `at`, the model's head runs on those rows alone. With `documents`, each gets a
        row of its own: exact for every family, at the price of the padding that fills the
        shorter ones up. `t` is not read. Raises ConfigError for conditions or a cache,
        DataError for a document longer than the model's table of positions.
        """
        if cond or cache is not None:
            raise ConfigError("a masked language model takes neither conditions nor a cache")
        if valid is None and documents is None:
            rows, mask = tokens, None
            row = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
            position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        else:
            row, position = own_rows(tokens, valid, documents)
            rows, mask = self._spread(tokens, valid, row, position)
        if self.max_length is not None and rows.shape[1] > self.max_length:
            raise DataError(f"{rows.shape[1]} tokens: this model takes at most {self.max_length}")
        if at is not None:
            flat = flat_positions(at, number)
            row, position = row.take(flat), position.take(flat)
        if mask is not None and not self.pads:
            return self._by_length(rows, mask, row, position)
        if at is not None:
            return self._call(rows, mask, (row, position))
        whole = self._call(rows, mask)
        return whole if mask is None else whole[row, position]

    def save_pretrained(
        self, directory: str | Path, *, state_dict: dict[str, Tensor] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """Write the model as transformers does, to be read by `masked_lm` or transformers.

        `state_dict` are weights to write instead of its own, by the names of this module.
        """
        if state_dict is not None:
            options["state_dict"] = {n.removeprefix("model."): x for n, x in state_dict.items()}
        with TRANSFORMERS:
            self.inner.save_pretrained(directory, **options)

    def _spread(
        self, tokens: Tensor, valid: Tensor | None, row: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The documents as rows (R, M), and where they have tokens, (R, M) int64 0 or 1."""
        keep = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        shape = (int(row.max()) + 1, int(position.max()) + 1)
        pad = self.inner.config.get_text_config().pad_token_id
        rows = tokens.new_full(shape, 0 if pad is None else pad)
        mask = tokens.new_zeros(shape)
        rows[row[keep], position[keep]] = tokens[keep]
        mask[row[keep], position[keep]] = 1
        return rows, mask

    def _call(
        self, rows: Tensor, mask: Tensor | None, chosen: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The model's logits (R, M, V) of rows, or (N, V) of the chosen rows and positions."""
        if rows.shape[1] < self.min_length:
            raise DataError(f"{rows.shape[1]} tokens: this model takes at least {self.min_length}")
        options: dict[str, Tensor | None] = {"attention_mask": mask} if self.takes_mask else {}
        if self.takes_positions and self.first_position is not None:
            positions = torch.arange(rows.shape[1], device=rows.device) + self.first_position
            options["position_ids"] = positions.expand(rows.shape)
        # The model's own forward goes on from its trunk to its head, with these rows alone.
        with only_rows(chosen if self.takes_rows else None):
            logits: Tensor = self.model(input_ids=rows, **options).logits
        if chosen is None:
            return logits
        return logits[0] if self.takes_rows else logits[chosen]

    def _by_length(self, rows: Tensor, mask: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """The logits (..., V) at `row` and `position` (...), rows of one length in each call."""
        lengths, row, shape = mask.sum(1), row.flatten(), row.shape
        position = position.flatten()
        parts, order = [], []
        for length in sorted(set(lengths.tolist())):
            members = (lengths == length).nonzero()[:, 0]
            wanted = torch.isin(row, members).nonzero()[:, 0]
            chosen = torch.searchsorted(members, row[wanted]), position[wanted]
            parts.append(self._call(rows[members, :length], None, chosen))
            order.append(wanted)
        rows_of_logits = torch.cat(parts)[torch.cat(order).argsort()]
        return rows_of_logits.view(*shape, rows_of_logits.shape[-1])

    def _self_test(self, tokens: Tensor, starts: list[int | None]) -> int:
        """How many columns the model's own logits have, once calls here give the same.

        `tokens` (2, M) int64. Sets `first_position` to the first of `starts` with which they do,
        then `takes_rows` and `pads`. Raises CheckpointError for a model of which none does, which
        takes more than tokens, gives something else than logits of each, or draws random numbers.
        """
        name, short = type(self.inner).__name__, min(SHORT, tokens.shape[1])
        alone, valid = tokens[:1, :short], torch.ones_like(tokens, dtype=torch.bool)
        valid[0, short:] = False
        at = valid[:1, :short] & (torch.arange(short, device=tokens.device) % 3 == 1)
        with as_when_used(self.model), kept_generators():
            own = own_logits(self.inner, self.model, alone)
            while not takes(self.model, alone[:, : self.min_length]):
                self.min_length += 1
            for self.first_position in dict.fromkeys(starts):
                if self._gives(own, alone):
                    break
            else:
                raise CheckpointError(f"{name}: position_ids are not those of its own calls")
            self.takes_rows = self._gives(own[at], alone, at=at)
            self.pads = self.takes_mask and self._gives(own[0], tokens, valid=valid)
        return own.shape[2]

    def _gives(self, own: Tensor, tokens: Tensor, **options: Tensor) -> bool:
        """Whether a call has these logits, of the first row where there are several."""
        # Not that of a subclass, which may cut the logits.
        call: Callable[..., Tensor] = MaskedLM.forward
        try:
            ours = call(self, tokens, **options)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError):
            return False
        ours = ours[0, : len(own)] if own.dim() < ours.dim() else ours
        largest = float(own.nan_to_num().abs().max())
        limit = max(CLOSE, STEPS * torch.finfo(own.dtype).eps) * largest
        return torch.allclose(ours, own, rtol=0, atol=limit, equal_nan=True)


def masked_lm(
    model: PreTrainedModel | str | Path, *, mask_id: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> MaskedLM:  # fmt: skip
    """A Denoiser over a masked language model of transformers, or over a directory of one.

    `model` may be wrapped by torch.compile or peft. `mask_id` is by default the one of the
    configuration, else of the tokenizer in the directory. `dtype` None keeps the stored type.
    Weights are read from safetensors only. A few small calls are compared with the model's own,
    and what they show is set: where positions begin, and whether rows of other lengths may be
    padded.

    Raises ConfigError where no mask id is known or the model is no masked language model,
    CheckpointError where the directory cannot be read, lacks weights, or holds a model that
    cannot be called on tokens alone.
    """
    source = None
    if isinstance(model, str | Path):
        source, model = str(model), from_pretrained(str(model), dtype)
    elif dtype is not None:
        model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    if isinstance(model, nn.DataParallel):
        # Its threads do not know which rows a call is for.
        model = cast("PreTrainedModel", model.module)
    inner = cast("PreTrainedModel", unwrapped(model))
    if inner.config.is_encoder_decoder or inner.base_model is inner:
        raise ConfigError(
            f"{type(inner).__name__}: expected an encoder with a head, as BertForMaskedLM is"
        )
    if mask_id is None:
        mask_id = getattr(inner.config, "mask_token_id", None)
    if mask_id is None and source is not None:
        mask_id = tokenizers_mask(source)
    if mask_id is None:
        raise ConfigError("neither the configuration nor a tokenizer has a mask id: give mask_id=")
    rows = len(table_of(inner))
    if not 0 <= mask_id < rows:
        raise ConfigError(f"mask_id={mask_id}: this model embeds ids from 0 to {rows - 1}")
    return MaskedLM(model, mask_id=mask_id)


def load_masked_lm(files: ModelFiles, dtype: torch.dtype | None, *, mask_id: int) -> MaskedLM:
    """The model of transformers in a folder; every one of its tensors is in the files.

    Raises CheckpointError as `masked_lm` does, or where the files lack something.
    """
    return masked_lm(checked_model(files, dtype), mask_id=mask_id)
