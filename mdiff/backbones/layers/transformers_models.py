"""Masked language models of transformers by its own code: from their files, and when called."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mdiff.errors import CheckpointError, MdiffError, MdiffWarning
from mdiff.files import CONFIG, TRANSFORMERS, ModelFiles, one_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings that say how many layers there are, and the name of a tensor in one of several layers.
LAYERS = re.compile(r"(^|_)n?_?(layers?|depth|blocks?)$")
IN_A_LAYER = re.compile(r"\.\d+\.")
# A model has up to twice the weights of its files, where tied ones are saved once.
MOST_OVER_FILES, SPARE = 4, 2**20
# The tokens of a self-test: of so many ids, every so manyth.
MOST_IDS, STRIDE = 50_000, 7919
# Of the call that this thread is in: the row and the position of each hidden state that the head
# is to read. The trunk's hook, which all threads share, looks here.
CHOSEN: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("CHOSEN", default=None)


def checked_model(files: ModelFiles, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model in a folder; every one of its tensors is in the files.

    Raises CheckpointError where transformers cannot load it, or its files lack something.
    """
    check_settings(files)
    with TRANSFORMERS:
        from transformers import AutoConfig, AutoModelForMaskedLM

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
        if dtype is None and not {"dtype", "torch_dtype"} & files.config.keys():
            dtype = one_type(files.headers)
        return from_pretrained(str(files.folder), dtype, local_files_only=True)


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


def from_pretrained(
    source: str, dtype: torch.dtype | str | None, **options: bool
) -> PreTrainedModel:
    """The model of transformers at a path or Hub id, from safetensors alone.

    Raises CheckpointError where it cannot be loaded, or layers or weights are left out.
    """
    with TRANSFORMERS, _as_checkpoint_errors(source):
        from transformers import AutoModelForMaskedLM

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


def tokenizers_mask(source: str) -> int | None:
    """The mask id of the tokenizer at a path or Hub id; None where there is none."""
    with TRANSFORMERS:
        from transformers import AutoTokenizer

        try:
            mask_id: int | None = AutoTokenizer.from_pretrained(source).mask_token_id
        except (OSError, ValueError):
            return None
    return mask_id


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


def table_of(inner: PreTrainedModel) -> Tensor:
    """The token embeddings (ids, D)."""
    table = inner.get_input_embeddings()
    found: Tensor = table if isinstance(table, Tensor) else table.weight
    return found


def test_rows(inner: PreTrainedModel, mask_id: int, width: int) -> Tensor:
    """Two rows of tokens (2, M) int64, ordinary ones and some masks."""
    table, width = table_of(inner), max(1, width)
    named = {mask_id}
    for config in (inner.config, inner.config.get_text_config()):
        named |= {v for k, v in vars(config).items() if k.endswith("_id") and type(v) is int}
    ordinary = torch.tensor([i for i in range(min(len(table), MOST_IDS)) if i not in named] or [0])
    tokens = ordinary[torch.arange(2 * width) * STRIDE % len(ordinary)].view(2, width)
    tokens[:, 2::5] = mask_id
    return tokens.to(table.device)


def own_logits(inner: PreTrainedModel, model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The model's own logits (1, M, V) of tokens alone; see `MaskedLM._self_test`."""
    name, before = type(inner).__name__, torch.get_rng_state()
    other = tokens.clone()
    other[:, 0] = tokens[:, -1]
    try:
        own: Tensor = model(input_ids=tokens).logits
        again: Tensor = model(input_ids=other).logits
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CheckpointError(f"{name} cannot be called with tokens alone: {first}") from error
    if own.shape[:2] != tokens.shape or own.dim() != 3:
        raise CheckpointError(
            f"{name} gives {tuple(own.shape)} for tokens {tuple(tokens.shape)}: expected a row of "
            "logits for each token"
        )
    if not torch.equal(before, torch.get_rng_state()):
        raise CheckpointError(f"{name} draws random numbers: equal calls give other logits")
    if tokens.shape[1] > 1 and torch.equal(own[:, 1:], again[:, 1:]):
        warnings.warn(
            f"{name}: no token's logits depend on another token: is a kernel of its own missing?",
            MdiffWarning, stacklevel=2,
        )  # fmt: skip
    return own


def takes(model: PreTrainedModel, tokens: Tensor) -> bool:
    """Whether the model can be called on tokens (1, M), of which it may need more."""
    try:
        model(input_ids=tokens)
    except (RuntimeError, LookupError, ValueError):
        return False
    return True


@contextmanager
def as_when_used(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; each module's mode is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def only_rows(chosen: tuple[Tensor, Tensor] | None) -> Iterator[None]:
    """Within, a hooked model runs its head on these rows and positions, (N,) each: (1, N, V)."""
    token = CHOSEN.set(chosen)
    try:
        yield
    finally:
        CHOSEN.reset(token)


def hook(inner: PreTrainedModel) -> None:
    """What this module needs of the model beside its call, once however often it is wrapped."""
    trunk = inner.base_model
    if _only not in trunk._forward_hooks.values():
        trunk.register_forward_hook(_only)
    if vars(trunk).get("attention_type") == "block_sparse":
        # BigBird changes to this by itself, for good, at its first short row.
        trunk.set_attention_type("original_full")
    for module in inner.modules():
        if vars(module).get("token_dropout") and not module._forward_hooks:
            module.register_forward_hook(_nothing_given, with_kwargs=True)


def _only(_module: nn.Module, _given: object, output: Any) -> Any:
    """The trunk's output with one row (1, N, D) of the hidden states that are `CHOSEN`."""
    chosen = CHOSEN.get()
    if chosen is None:
        return output
    if isinstance(output, tuple):
        return (output[0][chosen][None], *output[1:])
    output[next(iter(output))] = output[0][chosen][None]
    return output


def _nothing_given(
    module: nn.Module, given: tuple[Tensor, ...], options: dict[str, Tensor], output: Tensor
) -> Tensor:
    """ESM's embeddings (B, L, D) where some rows hide every token.

    Hidden ones count as 0, given ones are divided by their share: 0 / 0 in such a row, whose
    limit is that all are 0.
    """
    arguments = inspect.signature(module.forward).bind(*given, **options).arguments
    tokens, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if tokens is None:
        return output
    is_given = (tokens != module.mask_token_id) & (True if mask is None else mask.bool())
    arguments |= {"input_ids": None, "inputs_embeds": torch.zeros_like(output)}
    return torch.where(is_given.any(1)[:, None, None], output, module.forward(**arguments))
