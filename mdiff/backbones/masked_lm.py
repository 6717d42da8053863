"""Hugging Face masked language models as Denoisers.

The positions that a masked language model predicts are hidden tokens, so its logits are
already those of the clean token. What differs between the families is where positions
start and what padding does to them; here each document gets a row of its own with its
tokens at the front, so that every family counts as it was trained to.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mdiff.denoiser import Cache, Condition, flat_positions
from mdiff.errors import CheckpointError, ConfigError, DataError, MdiffError
from mdiff.files import CONFIG, TRANSFORMERS, ModelFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings that say how many layers there are, and the name of a tensor in one of several layers.
LAYERS = re.compile(r"(^|_)n?_?(layers?|depth|blocks?)$")
IN_A_LAYER = re.compile(r"\.\d+\.")
# A model has up to twice the weights of its files, where tied ones are saved once.
MOST_OVER_FILES, SPARE = 4, 2**20


class MaskedLM(nn.Module):
    """A Denoiser over `model`; see `masked_lm`."""

    uses_time = False

    def __init__(self, model: PreTrainedModel, *, mask_id: int) -> None:
        super().__init__()
        self.model = model
        self.mask_id = mask_id
        self.vocab_size = int(model.config.vocab_size)
        tables = [
            module
            for name, module in model.named_modules()
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        ]
        # RoBERTa and its kin keep the positions up to the padding's id free.
        padding = tables[0].padding_idx if tables else None
        self.first_position = 0 if padding is None else padding + 1
        self.max_length = tables[0].num_embeddings - self.first_position if tables else None
        self.window = self.max_length
        accepted = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        # Classes of its layers, which are sharded one by one.
        self.no_split = tuple(model._no_split_modules or ())
        if "attention_mask" not in accepted:
            raise ConfigError(f"{type(model).__name__} takes no attention mask: padding would leak")

    def forward(
        self,
        tokens: Tensor,
        *,
        at: Tensor | None = None,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        t: Tensor | None = None,
        cond: Condition | None = None,
        cache: Cache | None = None,
        number: int | None = None,
    ) -> Tensor:
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
            row, position = torch.meshgrid(
                torch.arange(tokens.shape[0], device=tokens.device),
                torch.arange(tokens.shape[1], device=tokens.device),
                indexing="ij",
            )
        else:
            row, position = _own_rows(tokens, valid, documents)
            rows, mask = self._spread(tokens, valid, row, position)
        if self.max_length is not None and rows.shape[1] > self.max_length:
            raise DataError(f"{rows.shape[1]} tokens: this model takes at most {self.max_length}")
        options: dict[str, Tensor] = {}
        if self.takes_positions:
            positions = torch.arange(rows.shape[1], device=tokens.device) + self.first_position
            options["position_ids"] = positions.expand(rows.shape)
        if at is None:
            whole: Tensor = self.model(input_ids=rows, attention_mask=mask, **options).logits
            return whole if mask is None else whole[row, position]
        # The model's own forward goes on from its trunk to its head, with these rows alone.
        flat = flat_positions(at, number)
        chosen = (row.take(flat), position.take(flat))
        handle = self.model.base_model.register_forward_hook(
            lambda _module, _given, output: _only(output, chosen)
        )
        try:
            logits: Tensor = self.model(input_ids=rows, attention_mask=mask, **options).logits[0]
        finally:
            handle.remove()
        return logits

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        state_dict: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Write the model as transformers does, to be read by `masked_lm` or transformers.

        `state_dict` are weights to write instead of its own, by the names of this module.
        """
        from transformers import logging

        logging.disable_progress_bar()
        if state_dict is not None:
            options["state_dict"] = {
                name.removeprefix("model."): tensor for name, tensor in state_dict.items()
            }
        self.model.save_pretrained(directory, **options)

    def _spread(
        self, tokens: Tensor, valid: Tensor | None, row: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The documents as rows (R, M), and where they have tokens, (R, M) int64 0 or 1."""
        keep = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        shape = (int(row.max()) + 1, int(position.max()) + 1)
        pad = self.model.config.pad_token_id
        rows = tokens.new_full(shape, 0 if pad is None else pad)
        mask = tokens.new_zeros(shape)
        rows[row[keep], position[keep]] = tokens[keep]
        mask[row[keep], position[keep]] = 1
        return rows, mask


def masked_lm(
    model: PreTrainedModel | str | Path,
    *,
    mask_id: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> MaskedLM:
    """A Denoiser over a masked language model of transformers, or over a directory of one.

    `mask_id` is by default the one of the configuration, else of the tokenizer in the
    directory. `dtype` None keeps the stored type. Weights are read from safetensors only.

    Raises ConfigError where no mask id is known or the model is no masked language model,
    CheckpointError where the directory cannot be read or lacks weights.
    """
    source = None
    if isinstance(model, str | Path):
        source, model = str(model), _from_pretrained(str(model), dtype)
    elif dtype is not None:
        model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    if model.config.is_encoder_decoder or model.base_model is model:
        raise ConfigError(
            f"{type(model).__name__}: expected an encoder with a head, as BertForMaskedLM is"
        )
    if mask_id is None:
        mask_id = getattr(model.config, "mask_token_id", None)
    if mask_id is None and source is not None:
        mask_id = _tokenizers_mask(source)
    if mask_id is None:
        raise ConfigError("neither the configuration nor a tokenizer has a mask id: give mask_id=")
    rows = model.get_input_embeddings().num_embeddings
    if not 0 <= mask_id < rows:
        raise ConfigError(f"mask_id={mask_id}: this model embeds ids from 0 to {rows - 1}")
    return MaskedLM(model, mask_id=mask_id)


def load_masked_lm(files: ModelFiles, dtype: torch.dtype | None, *, mask_id: int) -> MaskedLM:
    """The model of transformers in a folder; every one of its tensors is in the files.

    Raises CheckpointError where transformers cannot load it, or its files lack something.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM, logging

    check_settings(files)
    with TRANSFORMERS:
        logging.disable_progress_bar()
        with _as_checkpoint_errors(str(files.folder)):
            config = AutoConfig.from_pretrained(str(files.folder), local_files_only=True)
            with torch.device("meta"):
                skeleton = AutoModelForMaskedLM.from_config(config)
        held = sum(math.prod(entry["shape"]) for entry in files.entries.values())
        described = sum(parameter.numel() for parameter in skeleton.parameters())
        # transformers makes all of them before it finds that they are of other shapes.
        if described > MOST_OVER_FILES * held + SPARE:
            raise CheckpointError(
                f"{files.folder / CONFIG} describes {described:,} weights, the files hold {held:,}"
            )
        model = _from_pretrained(str(files.folder), dtype, local_files_only=True)
    return masked_lm(model, mask_id=mask_id)


def check_settings(files: ModelFiles) -> None:
    """Raise CheckpointError for settings that cost far more to read than the files are worth.

    Each layer has a tensor of its own at least; and code of the Hub is not run here.
    """
    origin, tensors = files.folder / CONFIG, len(files.entries)
    for name, value in files.config.items():
        if LAYERS.search(name) and type(value) is int and not 0 <= value <= tensors:
            raise CheckpointError(f"{origin}: {name}={value}: the files hold {tensors} tensors")
        if name.endswith("_implementation") and "/" in str(value):
            raise CheckpointError(f"{origin}: {name}={value!r} is code of the Hub: refused")


def _from_pretrained(
    source: str, dtype: torch.dtype | str | None, **options: bool
) -> PreTrainedModel:
    from transformers import AutoModelForMaskedLM

    with TRANSFORMERS, _as_checkpoint_errors(source):
        model, report = AutoModelForMaskedLM.from_pretrained(
            source, dtype="auto" if dtype is None else dtype, use_safetensors=True,
            output_loading_info=True, **options,
        )  # fmt: skip
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            absent = sorted(map(str, report[problem]))
            raise CheckpointError(f"{source}: {problem.replace('_', ' ')}: {', '.join(absent[:4])}")
    left_out = sorted(name for name in report["unexpected_keys"] if IN_A_LAYER.search(name))
    if left_out:
        raise CheckpointError(
            f"{source}: {CONFIG} leaves out layers that the files hold: {', '.join(left_out[:4])}"
        )
    return model


@contextmanager
def _as_checkpoint_errors(source: str) -> Iterator[None]:
    """Whatever transformers raises on a file, as a CheckpointError of one line."""
    try:
        yield
    except (MdiffError, MemoryError):
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CheckpointError(f"{source} cannot be loaded: {first}") from error


def _tokenizers_mask(source: str) -> int | None:
    from transformers import AutoTokenizer

    try:
        mask_id: int | None = AutoTokenizer.from_pretrained(source).mask_token_id
    except (OSError, ValueError):
        return None
    return mask_id


def _own_rows(
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


def _only(output: Any, chosen: tuple[Tensor, Tensor]) -> Any:
    """The trunk's output with one row (1, N, D) of the hidden states at the requested positions."""
    if isinstance(output, tuple):
        return (output[0][chosen][None], *output[1:])
    output[next(iter(output))] = output[0][chosen][None]
    return output
