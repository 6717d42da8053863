"""All samplers, a canvas of several rows, and a run to its end."""

from __future__ import annotations

import torch
from toys import HashDenoiser

from mdiff.find import find
from mdiff.tokens import TokenSpace

SPACE = TokenSpace(11, mask_id=5, never=(0, 9))


# Options that make another rule of a sampler.
VARIANTS = {
    "confidence, factor": {"factor": 4.0},
    "confidence, frechet": {"frechet": 1.0},
    "confidence, kl": {"threshold": 0.1, "kl": 2.0},
    "first_hitting, corrector": {"per_call": 3, "corrector": 2},
}


def finish(name, canvas, *, denoiser=None, space=SPACE, **options):
    """All states of a run, at least one where anything is hidden; `name` may be a variant."""
    denoiser = denoiser or HashDenoiser(space)
    options = VARIANTS.get(name, {}) | options
    return list(find("samplers", name.split(",")[0])(denoiser, canvas, space=space, **options))


def mixed_canvas(rows=6, length=12):
    """Rows with given tokens, `never` ids among them, and every share of hidden positions."""
    generator = torch.Generator().manual_seed(4)
    canvas = torch.randint(0, 11, (rows, length), generator=generator)
    canvas[canvas == SPACE.mask_id] = 0
    hide = torch.rand(rows, length, generator=generator) < torch.linspace(0.2, 1, rows)[:, None]
    return torch.where(hide, SPACE.mask_id, canvas)
