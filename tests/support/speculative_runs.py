"""Runs of `speculative` beside those of `any_order`, and the canvases that both get."""

from __future__ import annotations

import torch
from toys import HashDenoiser

from mdiff.sampling import sample


class Timed(HashDenoiser):
    """A toy whose logits depend on the time of each row too."""

    uses_time = True

    def __call__(self, tokens, *, at=None, t=None, **rest):
        logits = super().__call__(tokens, **rest)
        logits = logits * (1 + (t * 8).round()[:, None, None])
        return logits if at is None else logits[at]


def ragged(space, rows, length, *, labels=True):
    """Canvases of all lengths and starts, tokens given among the masks, and a label a row."""
    generator = torch.Generator().manual_seed(rows + length)
    hide = torch.rand(rows, length, generator=generator) < torch.linspace(0.3, 1.2, rows)[:, None]
    canvas = torch.where(
        hide, space.mask_id, torch.randint(0, space.vocab_size, (rows, length), generator=generator)
    )
    first = torch.arange(rows) % 3
    valid = torch.arange(length) >= first[:, None]
    return canvas, {"valid": valid, "cond": {"label": torch.arange(rows)} if labels else None}


def both(denoiser, canvas, *, space, drafts, branches=1, **options):
    """The samples of `any_order` and of `speculative`, which must be the same but for calls."""
    expected = sample(denoiser, canvas, space=space, sampler="any_order", **options)
    found = sample(
        denoiser, canvas, space=space, sampler="speculative", accept="coupled", drafts=drafts,
        **options,
    )  # fmt: skip
    hidden = canvas == space.mask_id
    if options.get("valid") is not None:
        hidden &= options["valid"]
    assert torch.equal(found.tokens, expected.tokens)
    for name in ("log_prob", "entropy", "margin", "times"):
        assert torch.equal(getattr(found.writing, name), getattr(expected.writing, name)), name
    assert found.log_prob_is_exact == expected.log_prob_is_exact
    assert float(found.nats_spent.abs().sum()) == 0
    assert (found.rounds <= hidden.sum(1)).all()
    assert (found.calls >= found.rounds).all()
    assert (found.calls <= branches * found.rounds * (drafts + 1)).all()
    return expected, found
