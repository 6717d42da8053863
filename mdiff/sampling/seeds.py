"""Seeds as they are given, and the random stream of each sample."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mdiff.errors import ConfigError
from mdiff.kernels import philox

# A number, one a row (B,) int64, or torch.Generators that yield one each.
Seed = int | Tensor | torch.Generator | Sequence[torch.Generator]

MAX_SEED = 2**63 - 1


def plain_seed(seed: Seed, rows: int) -> int | Tensor:
    """The seed as an int or (rows,) int64; a generator is asked for one number."""
    if isinstance(seed, torch.Generator):
        return _yielded(seed)
    if isinstance(seed, list | tuple):
        if len(seed) != rows or not all(isinstance(one, torch.Generator) for one in seed):
            raise ConfigError(f"seed: expected {rows} torch.Generators, one a row, got {len(seed)}")
        return torch.tensor([_yielded(one) for one in seed], dtype=torch.int64, device="cpu")
    if isinstance(seed, bool) or not isinstance(seed, int | Tensor):
        raise ConfigError(f"seed={seed!r}: expected an int, (B,) int64 or torch.Generators")
    return _checked(seed, rows) if isinstance(seed, Tensor) else seed


def streams(seed: int | Tensor, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The (seed, sample) of each row, both (rows,) int64.

    An int makes row b sample b of it; seeds (rows,) int64 make each row sample 0 of its own.
    """
    if isinstance(seed, Tensor):
        seed = _checked(seed, rows).to(device)
        return seed, torch.zeros_like(seed)
    sample = torch.arange(rows, device=device)
    return torch.full_like(sample, _signed(int(seed))), sample


def row_seeds(seed: Seed, rows: int) -> Tensor:
    """One seed a row, (rows,) int64: the seed itself, then seeds derived from it."""
    plain = plain_seed(seed, rows)
    if isinstance(plain, Tensor):
        return plain
    signed, number = _signed(plain), torch.arange(rows, device="cpu")
    first = torch.full((rows,), signed, dtype=torch.int64, device="cpu")
    return torch.where(number == 0, first, philox.derive(signed, number))


def _checked(seed: Tensor, rows: int) -> Tensor:
    if seed.shape != (rows,) or seed.dtype != torch.int64:
        raise ConfigError(f"seed {tuple(seed.shape)} {seed.dtype}: expected ({rows},) int64")
    return seed


def _signed(seed: int) -> int:
    """The seed modulo 2^64, as int64 holds it."""
    return (seed + 2**63) % 2**64 - 2**63


def _yielded(generator: torch.Generator) -> int:
    return int(torch.randint(MAX_SEED, (), generator=generator, device=generator.device))
