"""The bound of a block model is the sum over its blocks, against enumeration on toys."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from test_block_cache import GOLDEN, SPACE, Plain, golden_model, random_model
from toys import make_toy

import mdiff
import mdiff.objective.bound as bounds
from mdiff.errors import ConfigError
from mdiff.objective.bound import nll_bound
from mdiff.schedule import Linear

VOCAB, LENGTH, BLOCK = 3, 5, 2


class BlockToy:
    """The table of a toy, asked at each position with the blocks after its own hidden."""

    uses_time = False
    block_length = BLOCK

    def __init__(self, toy, table):
        self.toy, self.table, self.calls = toy, table, 0

    def __call__(
        self, tokens, *, at=None, valid=None, documents=None, t=None, cond=None, cache=None
    ):
        self.calls += 1
        position = torch.arange(LENGTH)
        logits = torch.empty(*tokens.shape, VOCAB, dtype=torch.float64)
        for stop in (BLOCK, 2 * BLOCK, LENGTH):
            cut = torch.where(position < stop, tokens, VOCAB)
            own = (position < stop) & (position // BLOCK == (stop - 1) // BLOCK)
            logits[:, own] = self.table[self.toy.number(cut)][:, own]
        return logits if at is None else logits[at]


TOY = make_toy(VOCAB, LENGTH)
EVERY = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)
IDEAL = BlockToy(TOY, TOY.table)
WRONG = BlockToy(
    TOY,
    torch.randn(
        TOY.table.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    ).log_softmax(2),
)


def bound(denoiser, tokens, **options):
    return nll_bound(
        denoiser, tokens, space=TOY.space, schedule=Linear(), seed=1, **options
    )  # fmt: skip


def enumerated(tokens, chosen):
    """The chain rule inside each block, averaged over its orders, block after block."""
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for start in range(0, LENGTH, BLOCK):
        positions = [p for p in range(start, min(start + BLOCK, LENGTH)) if p in chosen]
        for order in permutations(positions):
            canvas = torch.where(torch.arange(LENGTH) < start + BLOCK, tokens, VOCAB)
            canvas[:, positions] = VOCAB
            for position in order:
                logits = WRONG.table[TOY.number(canvas)][:, position]
                total -= logits.gather(1, tokens[:, position, None])[:, 0] / math.factorial(
                    len(positions)
                )
                canvas[:, position] = tokens[:, position]
    return total


def test_the_exact_bound_of_an_ideal_block_model_is_the_likelihood():
    for estimator in ("exact", "left_to_right"):
        nats = bound(IDEAL, EVERY, estimator=estimator).nats
        torch.testing.assert_close(nats, -TOY.joint[tuple(EVERY.T)].log())


@pytest.mark.parametrize("chosen", [range(LENGTH), (0, 3, 4), (2, 3)])
def test_the_exact_bound_of_any_block_model_is_the_enumerated_one(chosen):
    may_hide = torch.zeros(LENGTH, dtype=torch.bool)
    may_hide[list(chosen)] = True
    got = bound(WRONG, EVERY, estimator="exact", may_hide=may_hide.expand(EVERY.shape))
    torch.testing.assert_close(got.nats, enumerated(EVERY, chosen))


@pytest.mark.parametrize("estimator", ["any_order", "time"])
def test_the_drawn_bounds_agree_with_the_exact_one_within_their_errors(estimator):
    # 243 rows, normal to first order: beyond 6 errors about once in 2e6 runs.
    drawn = bound(WRONG, EVERY, estimator=estimator, draws=400)
    exact = bound(WRONG, EVERY, estimator="exact").nats
    assert bool((drawn.stderr > 0).all())
    assert float(((drawn.nats - exact) / drawn.stderr).abs().max()) < 6
    mean, error = (drawn.nats - exact).mean(), drawn.stderr.square().sum().sqrt() / len(EVERY)
    assert abs(mean / error) < 6


def test_rows_with_padding_have_the_bound_of_single_ones():
    model = golden_model()
    short, long = torch.randint(0, 60, (2, 11), generator=torch.Generator().manual_seed(4))
    short = short[:6]
    tokens = torch.stack([torch.cat([short, torch.full((5,), 60)]), long])
    valid = torch.arange(11) < torch.tensor([[6], [11]])
    options = {"space": SPACE, "schedule": Linear(), "seed": 3, "draws": 8}
    both = nll_bound(model, tokens, valid=valid, **options)
    first = nll_bound(model, short[None], sample=torch.tensor([0]), **options)
    second = nll_bound(model, long[None], sample=torch.tensor([1]), **options)
    expected = torch.cat([first.nats, second.nats])
    torch.testing.assert_close(both.nats, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [golden_model, random_model])
@pytest.mark.parametrize("estimator", ["any_order", "time", "exact", "left_to_right"])
def test_a_bound_over_kept_blocks_is_that_of_whole_rows(make, estimator):
    model = make()
    tokens = torch.randint(0, 60, (2, 14), generator=torch.Generator().manual_seed(4))
    may_hide = (torch.arange(14) > 5).expand(2, 14)
    options = {
        "space": SPACE, "schedule": Linear(), "seed": 3, "draws": 4, "estimator": estimator,
        "may_hide": may_hide,
    }  # fmt: skip
    sizes = []
    model.trunk()[0].register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[1]))
    kept = nll_bound(model, tokens, **options)
    assert sizes
    assert set(sizes) <= {model.block_length, 14 % model.block_length}
    whole = nll_bound(Plain(model), tokens, **options)
    torch.testing.assert_close(kept.nats, whole.nats, atol=1e-4, rtol=0)
    torch.testing.assert_close(kept.stderr, whole.stderr, atol=1e-4, rtol=0)


def test_later_blocks_do_not_change_the_bound_of_earlier_ones():
    model = golden_model()
    tokens = torch.randint(0, 60, (1, 12), generator=torch.Generator().manual_seed(4))
    other = tokens.clone()
    other[:, 8:] = 11
    options = {"space": SPACE, "schedule": Linear(), "seed": 3, "may_hide": torch.arange(12) < 8}
    first = nll_bound(Plain(model), tokens, **options)
    second = nll_bound(Plain(model), other, **options)
    torch.testing.assert_close(first.nats, second.nats, atol=1e-5, rtol=0)


def test_what_does_not_apply_is_refused_where_nothing_may_be_hidden():
    nothing = torch.zeros(1, LENGTH, dtype=torch.bool)
    with pytest.raises(ConfigError, match="draws=1"):
        bound(IDEAL, EVERY[:1], draws=1, may_hide=nothing)
    assert bound(IDEAL, EVERY[:1], may_hide=nothing).nats.tolist() == [0]


def test_a_pipeline_scores_a_block_model_by_its_blocks():
    pipeline = mdiff.load(str(GOLDEN), mask_id=62, block_length=4, device="cpu")
    ids = [5, 9, 31, 7, 2, 44]
    scored = pipeline.score([" ".join(map(str, ids))], draws=16, seed=2)
    plain = nll_bound(
        Plain(pipeline.denoiser), torch.tensor([ids]), space=pipeline.space, schedule=Linear(),
        draws=16, seed=2,
    )  # fmt: skip
    torch.testing.assert_close(scored.nats, plain.nats, atol=1e-4, rtol=0)


def test_each_block_and_each_draw_is_hidden_by_a_seed_of_its_own(monkeypatch):
    plain, seeds = bounds.corrupt, []

    def corrupt(*given, seed, **options):
        seeds.append(int(seed))
        return plain(*given, seed=seed, **options)

    monkeypatch.setattr(bounds, "corrupt", corrupt)
    bound(IDEAL, EVERY[:2], draws=4)
    assert len(seeds) == len(set(seeds)) == 3 * 4
