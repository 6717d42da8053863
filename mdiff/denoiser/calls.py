"""How a denoiser is called: the rows it is asked for, the part that gives them, and the cost."""

import inspect
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn

from mdiff.denoiser.protocol import (
    AsksRows,
    BlockModel,
    Condition,
    Corrects,
    Denoiser,
    HasCost,
    HasHead,
    HasRowCost,
    Predicts,
    Rows,
    SeedsBlocks,
    ShadowPositions,
    Wrapper,
)
from mdiff.errors import ConfigError
from mdiff.kernels.loss_heads import hooked


def flat_positions(at: Tensor, number: int | None = None) -> Tensor:
    """The flat indices (N,) int64 of the positions `at` (B, L) bool among all B * L, ascending.

    `number` of them, where that is known on the host: then without a host-device
    synchronisation.

    >>> flat_positions(torch.tensor([[False, True]]), 1)
    tensor([1])
    """
    if number is None:
        return at.flatten().nonzero()[:, 0]
    return torch.nonzero_static(at.flatten(), size=number)[:, 0]


def row_request(denoiser: Denoiser) -> Callable[..., Rows]:
    """How to ask a denoiser for `Rows`, looked up once for many calls.

    The result is called as `AsksRows.requested_rows` is, with `cache=` too where the denoiser
    takes one. It runs without the head where the denoiser has one of its own, so that logits
    need not exist all at once.
    """
    if asks_rows(denoiser):
        return denoiser.requested_rows
    split = denoiser if has_own_head(denoiser) else None
    head = None if split is None else split.head
    call: Callable[..., Tensor] = denoiser if split is None else split.features
    counts = _takes_number(call)

    def ask(tokens: Tensor, *, number: int | None = None, **rest: object) -> Rows:
        rest = {**rest, "number": number} if counts else rest
        return Rows(call(tokens, **rest), head=head)

    return ask


def asks_rows(denoiser: object) -> TypeGuard[AsksRows]:
    """Whether the denoiser's own class has `requested_rows`: a wrapper's inner one is bypassed."""
    return issubclass(type(denoiser), AsksRows)


def has_own_head(denoiser: object) -> TypeGuard[HasHead]:
    """Whether a call of the denoiser is that of its `features` and then of its `head`.

    Only what its own class says counts: a wrapper (an adapter's, a compiled or distributed
    module, guidance) that passes `features` through changes what a call does, and so do hooks
    and a class that replaces the call of one that has `features`.
    """
    if not isinstance(denoiser, HasHead) or denoiser.head is None:
        return False
    if any(isinstance(m, nn.Module) and hooked(m) for m in (denoiser.head, denoiser)):
        return False
    called = "forward" if isinstance(denoiser, nn.Module) else "__call__"
    for kind in type(denoiser).__mro__:
        if "features" in vars(kind):
            return True
        if called in vars(kind):
            return False
    return False


def has_shadows(denoiser: object) -> TypeGuard[ShadowPositions]:
    """Whether the denoiser's own class gives rows by shadows, and a call is what that does."""
    return (
        isinstance(denoiser, ShadowPositions)
        and issubclass(type(denoiser), ShadowPositions)
        and denoiser.has_shadows()
        and (asks_rows(denoiser) or has_own_head(denoiser))
    )


def shadow_request(denoiser: Denoiser) -> Callable[..., Rows]:
    """The `shadow_rows` of a denoiser; ConfigError where it has none."""
    if not has_shadows(denoiser):
        raise ConfigError(f"{type(denoiser).__name__} has no rows of shadow positions")
    return denoiser.shadow_rows


def _takes_number(call: Callable[..., Tensor]) -> bool:
    """Whether a denoiser, or its `features`, has a keyword `number` of its own."""
    try:
        signature = inspect.signature(call.forward if isinstance(call, nn.Module) else call)
    except (TypeError, ValueError):
        return False
    return "number" in signature.parameters


def evaluations(
    denoiser: Denoiser, tokens: Tensor, *, valid: Tensor | None, cond: Condition | None
) -> int | Tensor:
    """The model evaluations that a call on these rows costs: one number, or (B,) int64."""
    if isinstance(denoiser, HasRowCost):
        return denoiser.row_evaluations(tokens, valid=valid, cond=cond)
    return fixed_evaluations(denoiser)


def fixed_evaluations(denoiser: Denoiser) -> int:
    """The model evaluations that a call costs each row, where that is the same for all."""
    return denoiser.evaluations if isinstance(denoiser, HasCost) else 1


def block_length_of(denoiser: Denoiser) -> int | None:
    """The length of a block model's blocks; None for another denoiser."""
    return denoiser.block_length if isinstance(denoiser, BlockModel) else None


def corrects(denoiser: Denoiser) -> bool:
    """Whether a model was trained to correct tokens that it is shown; see `Corrects`."""
    return isinstance(denoiser, Corrects) and denoiser.corrects


def seeds_blocks(denoiser: Denoiser) -> bool:
    """Whether a block's first token is taken from the block before; see `SeedsBlocks`."""
    return isinstance(denoiser, SeedsBlocks) and denoiser.block_seed


def prediction_of(denoiser: object) -> str:
    """What a denoiser, or the one that it wraps, predicts: "leave_one_out" or "posterior".

    Raises ConfigError where none says: noise that writes random tokens needs to know. Masks need
    no answer: at hidden positions both are the same.
    """
    if isinstance(denoiser, Predicts) and denoiser.predicts in PREDICTS:
        return denoiser.predicts
    if isinstance(denoiser, Wrapper):
        return prediction_of(denoiser.denoiser)
    raise ConfigError(
        "this denoiser does not say what it predicts: under noise that writes random tokens "
        "`predicts` must be 'leave_one_out' (trained by the bound) or 'posterior' (by "
        "cross-entropy at every position)"
    )


def check_rows(tokens: Tensor, rows: int) -> None:
    """ConfigError where a denoiser that is bound to so many rows is called on others."""
    if len(tokens) != rows:
        raise ConfigError(
            f"{len(tokens)} rows: this denoiser is bound to {rows}, take its for_rows(index)"
        )


# What a prediction of a clean token is given: all states but its own, or all.
PREDICTS = ("leave_one_out", "posterior")
# What torch.compile, DataParallel and the like call the one module in them.
WRAPPED = ("_orig_mod", "module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and their like, and inside peft's adapters."""
    children = list(model.named_children())
    if len(children) != 1 or next(model.parameters(recurse=False), None) is not None:
        return model
    name, child = children[0]
    return unwrapped(child) if name in WRAPPED or of_peft(model) else model


def of_peft(module: nn.Module) -> bool:
    """Whether its class is one of peft."""
    return type(module).__module__.partition(".")[0] == "peft"
