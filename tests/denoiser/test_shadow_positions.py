"""Rows of shadow masks: exact with one layer, unseen by the others, independent of the batch."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from folders import GOLDEN

from mdiff import from_logits
from mdiff.backbones.bit_transformer import bit_transformer
from mdiff.backbones.published.llada import llada
from mdiff.backbones.transformer import transformer
from mdiff.denoiser import (
    BlockWindow,
    ShadowPositions,
    guided,
    has_own_head,
    has_shadows,
    negative_prompt,
    row_request,
)
from mdiff.schedule import Linear
from mdiff.tokens import TokenSpace

IDS, LENGTH = 29, 12
SPACE = TokenSpace(IDS, mask_id=IDS)


def ours(depth, **options):
    return transformer(vocab_size=IDS, width=16, depth=depth, heads=2, init_std=0.5, **options)


def published(depth):
    config = json.loads((GOLDEN / "llada" / "config.json").read_text())
    more = {"vocab_size": 30, "embedding_size": 30, "mask_token_id": IDS, "n_layers": depth}
    return llada(config | more)


MODELS = {
    "text": ours,
    "grid": partial(ours, grid=(3, 4)),
    "layout": partial(ours, layout=((1, 4, 1), (2, 2, 2))),
    "time and label": partial(ours, uses_time=True, classes=3),
    "causal": partial(ours, causal=True),
    "llada": published,
}


@pytest.fixture(params=MODELS)
def make(request):
    def made(depth):
        torch.manual_seed(2)
        model = MODELS[request.param](depth).eval()
        for name, each in model.named_parameters():
            if "modulation" in name:
                torch.nn.init.normal_(each, std=0.3)
        return model

    return made


def canvas_of(rows=4):
    """Canvases and valid positions; a third of the positions hold the mask."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, IDS, (rows, LENGTH), generator=generator)
    hidden = torch.rand(rows, LENGTH, generator=generator) < 0.4
    tokens = torch.where(hidden, IDS, tokens)
    lengths = torch.tensor([LENGTH, 5, 9, 7])[:rows, None]
    return tokens, torch.arange(LENGTH) >= LENGTH - lengths


def more_of(model, rows):
    more = {"t": torch.linspace(0.2, 0.9, rows)} if model.uses_time else {}
    return more | ({"cond": {"label": torch.arange(rows) % 4}} if model.uses_time else {})


def logits(rows):
    return rows.conditional if rows.head is None else rows.head(rows.conditional)


def close(found, expected, *, share=1e-5):
    """Whether they are equal but for rounding, as a share of the largest logit."""
    return float((found - expected).abs().max()) < share * float(expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_rows_of_masks_are_those_of_a_call_without_shadows(make, depth, padded):
    model, (tokens, valid) = make(depth), canvas_of()
    more = more_of(model, 4) | ({"valid": valid} if padded else {})
    at = valid if padded else torch.ones_like(valid)
    assert has_shadows(model)
    found = logits(model.shadow_rows(tokens, at=at, mask_id=IDS, **more))
    again = logits(model.shadow_rows(tokens, at=at, mask_id=IDS, number=int(at.sum()), **more))
    assert torch.equal(found, again)
    plain = model(tokens, at=at, **more)
    hidden = (tokens == IDS)[at]
    assert close(found[hidden], plain[hidden])
    assert not close(found[~hidden], plain[~hidden], share=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_with_one_layer_a_shadow_is_the_canvas_with_its_position_hidden(make, padded):
    model, (tokens, valid) = make(1), canvas_of()
    more = more_of(model, 4) | ({"valid": valid} if padded else {})
    at = (tokens != IDS) & (valid if padded else torch.ones_like(valid))
    found = logits(model.shadow_rows(tokens, at=at, mask_id=IDS, **more))
    for row, (b, i) in zip(found, at.nonzero().tolist(), strict=True):
        alone, changed = tokens.clone(), tokens.clone()
        alone[b, i], changed[b, i] = IDS, (tokens[b, i] + 1) % IDS
        assert close(row, model(alone, **more)[b, i])
        of_changed = logits(model.shadow_rows(changed, at=at, mask_id=IDS, **more))
        number = int(at.flatten()[: b * LENGTH + i].sum())
        assert torch.equal(of_changed[number], row)


@torch.no_grad()
def test_a_shadow_does_not_depend_on_the_batch_or_the_padding(make):
    model, (tokens, valid) = make(3), canvas_of()
    together = logits(
        model.shadow_rows(tokens, at=valid, mask_id=IDS, valid=valid, **more_of(model, 4))
    )
    first = 0
    for row in range(4):
        number = int(valid[row].sum())
        more = {
            name: {key: each[row : row + 1] for key, each in value.items()}
            if isinstance(value, dict) else value[row : row + 1]
            for name, value in more_of(model, 4).items()
        }  # fmt: skip
        own = tokens[row : row + 1, LENGTH - number :]
        alone = model.shadow_rows(own, at=torch.ones_like(own, dtype=torch.bool), mask_id=IDS,
                                  **more)  # fmt: skip
        assert close(logits(alone), together[first : first + number])
        first += number


@torch.no_grad()
def test_guidance_and_a_block_mix_the_rows_of_shadows_as_they_do_others():
    torch.manual_seed(2)
    model, (tokens, _) = ours(1, classes=3).eval(), canvas_of()
    mixed = guided(model, guidance_scale=2.5, without={"label": torch.tensor(3)}, space=SPACE,
                   guidance_schedule="linear")  # fmt: skip
    cond = {"label": torch.tensor([0, 1, 2, 0])}
    columns = torch.arange(4, 10).expand(4, 6)
    window = BlockWindow(
        model, tokens, columns, attended=torch.ones_like(tokens, dtype=torch.bool),
        writable=tokens == IDS, schedule=Linear(), mask_id=IDS,
    )  # fmt: skip
    at = torch.ones(4, 12, dtype=torch.bool)
    assert has_shadows(mixed)
    assert has_shadows(window)
    both = mixed.shadow_rows(tokens, at=at, mask_id=IDS, cond=cond)
    u, c = logits(both._replace(conditional=both.unconditional)), logits(both)
    for given, found in ((cond["label"], c), (torch.full((4,), 3), u)):
        own = model.shadow_rows(tokens, at=at, mask_id=IDS, cond={"label": given})
        assert close(found, logits(own))
    inside = window.shadow_rows(tokens[:, 4:10], at=at[:, 4:10], mask_id=IDS, cond=cond)
    whole = logits(model.shadow_rows(tokens, at=at, mask_id=IDS, cond=cond)).view(4, 12, IDS)
    assert close(logits(inside).view(4, 6, IDS), whole[:, 4:10])


def test_what_has_no_shadows_says_so():
    model = ours(1)
    assert isinstance(model, ShadowPositions)
    assert has_own_head(model)
    nested = guided(guided(model, guidance_scale=2.0, hide="x", space=SPACE), guidance_scale=2.0,
                    hide="y", space=SPACE)  # fmt: skip
    bits = bit_transformer(vocab_size=4, groups=2, width=16, depth=1, heads=2, grid=(2, 3))
    bound = negative_prompt(model, torch.tensor([1]), space=SPACE, guidance_scale=2.0)
    other = bound(torch.full((1, 4), IDS), None)
    for each in (from_logits(lambda tokens: tokens), nested, bits, other):
        assert not has_shadows(each)
    shifted = published(1)
    shifted.shifted = True
    assert not has_shadows(shifted)
    model.register_forward_hook(lambda *_: None)
    assert not has_shadows(model)
    assert row_request(model) is not None
