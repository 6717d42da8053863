"""The loss and the cost of a token: values, invariances, and what costs nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from folders import GOLDEN
from scipy import stats
from toy_training import QUIET, recipe
from toys import HashDenoiser, uniform_denoiser

import mdiff
from mdiff.denoiser import from_logits, guided
from mdiff.errors import ConfigError
from mdiff.objective import corruption
from mdiff.objective.bound import nll_bound
from mdiff.objective.corruption import corrupt, stratified_times
from mdiff.objective.loss import masked_diffusion_loss
from mdiff.objective.nll import token_nll
from mdiff.schedule import MIN_TIME, SCHEDULES, Cosine, Linear, named_schedule
from mdiff.tokens import TokenSpace
from mdiff.training import train

SPACE = TokenSpace(7, mask_id=2, never=(5,))
every_schedule = pytest.mark.parametrize("name", sorted(SCHEDULES))


@every_schedule
def test_the_loss_of_a_uniform_denoiser_is_the_log_of_the_permitted_ids(name):
    tokens = torch.ones(20_000, 6, dtype=torch.int64)
    loss = masked_diffusion_loss(
        uniform_denoiser(SPACE), tokens, space=SPACE, schedule=named_schedule(name), seed=3
    )
    assert float(loss.value) == pytest.approx(math.log(5), rel=0.02)
    assert torch.allclose(loss.nll[loss.hidden], torch.tensor(math.log(5)).double())
    assert (loss.nll[~loss.hidden] == 0).all()


def test_mask_never_and_other_parts_have_probability_zero():
    space = TokenSpace(8, mask_id=1, never=(2,), parts=((2, 0, 4), (1, 5, 8)))
    tokens = torch.tensor([[0, 3, 7]])
    noisy = torch.full((1, 3), 1)
    logits = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0)).double()
    logits[:, :, [1, 2]] = 50.0
    nll = token_nll(logits, tokens, noisy, space=space)
    assert torch.allclose(nll[0, 0], -logits[0, 0, [0, 3]].log_softmax(0)[0])
    assert torch.allclose(nll[0, 2], -logits[0, 2, 5:].log_softmax(0)[2])


def test_positions_that_are_not_hidden_cost_nothing_whatever_the_logits():
    tokens = torch.tensor([[0, 1, 3]])
    noisy = torch.tensor([[0, 2, 3]])
    logits = torch.full((1, 3, 7), float("nan"))
    logits[0, 1] = 0
    assert token_nll(logits, tokens, noisy, space=SPACE)[0, [0, 2]].tolist() == [0, 0]


def test_given_positions_and_padding_are_not_hidden_scored_or_counted():
    tokens = torch.ones(400, 6, dtype=torch.int64)
    may_hide = torch.tensor([False, True, True, True, True, True]).expand(400, 6)
    valid = torch.tensor([True, True, True, True, False, False]).expand(400, 6)
    loss = masked_diffusion_loss(
        uniform_denoiser(SPACE),
        tokens,
        space=SPACE,
        schedule=Linear(),
        may_hide=may_hide,
        valid=valid,
        seed=1,
    )
    assert not loss.hidden[:, [0, 4, 5]].any()
    assert loss.hidden[:, 1:4].any()
    assert float(loss.value) == pytest.approx(math.log(5), rel=0.1)


def test_the_loss_does_not_depend_on_how_the_batch_is_split():
    tokens = torch.randint(6, 7, (8, 9))
    model = HashDenoiser(SPACE)
    whole = masked_diffusion_loss(model, tokens, space=SPACE, schedule=Linear(), seed=4)
    parts = [
        masked_diffusion_loss(model, tokens[rows], space=SPACE, schedule=Linear(), seed=4,
                              sample=rows, rows=8, total=72)
        for rows in (torch.tensor([5, 0, 7]), torch.tensor([1, 2]), torch.tensor([3, 4, 6]))
    ]  # fmt: skip
    assert float(sum(p.value for p in parts)) == pytest.approx(float(whole.value), rel=1e-6)


def test_times_cover_every_stratum_once_and_each_row_is_uniform():
    rows = 16
    times = torch.stack([stratified_times(torch.arange(rows), rows, seed=s) for s in range(800)])
    assert (times * rows).floor().long().sort(1).values.eq(torch.arange(rows)).all()
    for row in (0, 7, 15):
        assert stats.kstest(times[:, row].numpy(), "uniform").pvalue > 1e-7
    halves = [stratified_times(torch.arange(8) + 8 * i, rows, seed=3) for i in range(2)]
    assert torch.equal(torch.cat(halves), times[3])


def test_corruption_hides_at_the_given_rate_or_count():
    tokens = torch.zeros(4000, 10, dtype=torch.int64)
    noisy = corrupt(tokens, torch.full((4000,), 0.3), space=SPACE, schedule=Cosine(), seed=1)
    rate = float((noisy == 2).double().mean())
    assert abs(rate - math.sin(0.15 * math.pi)) < 4.9 * math.sqrt(0.25 / 40_000)
    count = torch.arange(4000) % 11
    noisy = corrupt(tokens, torch.zeros(4000), space=SPACE, schedule=Linear(), count=count, seed=1)
    assert ((noisy == 2).sum(1) == count).all()
    each = (noisy == 2).double().mean(0)
    assert (abs(each - 0.5) < 0.04).all()


def test_maskgits_loss_is_this_function_with_other_options():
    """Uniform weight, smoothing over the V ids, divided by the hidden tokens."""
    space = TokenSpace(6, mask_id=6)
    logits = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(2))
    tokens = torch.randint(0, 6, (3, 8), generator=torch.Generator().manual_seed(3))
    model = from_logits(lambda _: logits)
    first = masked_diffusion_loss(model, tokens, space=space, schedule=Cosine(), seed=1)
    hidden = first.hidden
    loss = masked_diffusion_loss(
        model,
        tokens,
        space=space,
        schedule=Cosine(),
        seed=1,
        weight="uniform",
        label_smoothing=0.1,
        total=hidden.sum(),
    )
    peer = F.cross_entropy(logits[hidden], tokens[hidden], label_smoothing=0.1)
    assert float(loss.value) == pytest.approx(float(peer), rel=1e-6)


def test_smoothing_spreads_over_permitted_ids_only():
    logits = torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(2)).double()
    logits[..., [2, 5]] = 1e4
    tokens = torch.tensor([[0, 1, 3, 4]])
    loss = masked_diffusion_loss(
        from_logits(lambda _: logits),
        tokens,
        space=SPACE,
        schedule=Linear(),
        t=torch.ones(1),
        weight="uniform",
        label_smoothing=0.2,
        seed=0,
    )
    allowed = [0, 1, 3, 4, 6]
    target = torch.tensor([allowed.index(i) for i in tokens[0].tolist()])
    peer = F.cross_entropy(logits[0][:, allowed], target, label_smoothing=0.2)
    assert float(loss.value) == pytest.approx(float(peer), rel=1e-9)


def test_a_function_of_the_time_is_a_weight():
    tokens = torch.ones(50, 6, dtype=torch.int64)
    options = {"space": SPACE, "schedule": Linear(), "seed": 2}
    bound = masked_diffusion_loss(uniform_denoiser(SPACE), tokens, **options)
    same = masked_diffusion_loss(uniform_denoiser(SPACE), tokens, weight=lambda t: 1 / t, **options)
    clipped = masked_diffusion_loss(
        uniform_denoiser(SPACE), tokens, weight=lambda t: (1 / t).clamp(max=3), **options
    )
    assert float(same.value) == pytest.approx(float(bound.value))
    assert float(clipped.value) < float(bound.value)


def test_nothing_hidden_gives_a_zero_with_a_gradient():
    weight = torch.zeros(7, requires_grad=True)
    model = from_logits(lambda tokens: weight.expand(*tokens.shape, 7))
    loss = masked_diffusion_loss(
        model,
        torch.ones(2, 3, dtype=torch.int64),
        space=SPACE,
        schedule=Linear(),
        t=torch.full((2,), 2.0**-32),
        seed=0,
    )
    loss.value.backward()
    assert loss.value.item() == 0
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("options", [{"weight": "elbo"}, {"label_smoothing": 1.0}])
def test_invalid_losses_are_refused(options):
    with pytest.raises(ConfigError):
        masked_diffusion_loss(
            uniform_denoiser(SPACE),
            torch.ones(1, 4, dtype=torch.int64),
            space=SPACE,
            schedule=Linear(),
            seed=0,
            **options,
        )


def test_logits_in_bfloat16_are_summed_in_float32():
    tokens = torch.ones(2, 3, dtype=torch.int64)
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    noisy = torch.full((2, 3), 2)
    nll = token_nll(logits, tokens, noisy, space=SPACE)
    assert nll.dtype == torch.float32
    assert torch.allclose(nll, token_nll(logits.float(), tokens, noisy, space=SPACE))


def test_never_ids_in_the_data_are_given_and_neither_hidden_nor_scored():
    tokens = torch.tensor([[0, 5, 1, 5, 6]]).expand(50, 5)
    loss = masked_diffusion_loss(uniform_denoiser(SPACE), tokens, space=SPACE, schedule=Linear(),
                                 seed=1)  # fmt: skip
    assert not loss.hidden[:, [1, 3]].any()
    assert torch.isfinite(loss.value)
    bound = nll_bound(uniform_denoiser(SPACE), tokens[:2], space=SPACE, schedule=Linear(),
                      estimator="exact", seed=1)  # fmt: skip
    assert torch.allclose(bound.nats, torch.tensor(3 * math.log(5)).double())


def test_an_option_of_an_unknown_name_is_a_type_error():
    tokens = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match="row"):
        masked_diffusion_loss(
            uniform_denoiser(SPACE), tokens, space=SPACE, schedule=Linear(), seed=0, row=2
        )


def test_a_block_model_is_refused_as_its_bound_is_another(tmp_path):
    model = mdiff.load(GOLDEN / "bd3lm", device="cpu").denoiser
    space, tokens = TokenSpace(model.vocab_size, mask_id=model.mask_id), torch.zeros(2, 8).long()
    for denoiser in (model, guided(model, guidance_scale=1.0, hide="given", space=space)):
        with pytest.raises(
            ConfigError, match=r"a block model \(block_length=4\) cannot be trained"
        ):
            masked_diffusion_loss(denoiser, tokens, space=space, schedule=Linear(), seed=0)
    described = json.loads((GOLDEN / "bd3lm" / "config.json").read_text())
    blocks = recipe(model={"name": "bd3lm", "described": described})
    with pytest.raises(ConfigError, match="a block model"):
        train(blocks, tmp_path / "run", **QUIET)
    assert not list(tmp_path.glob("run/step-*"))


def test_an_exact_count_hides_only_what_may_be_hidden():
    tokens, row = torch.zeros(64, 12, dtype=torch.int64), torch.arange(64)
    may_hide = (row[:, None] + torch.arange(12)) % 3 == 0
    count = row % 7
    noisy = corrupt(
        tokens, torch.ones(64), space=SPACE, schedule=Linear(), may_hide=may_hide, count=count,
        seed=2,
    )  # fmt: skip
    hidden = noisy == SPACE.mask_id
    assert not bool((hidden & ~may_hide).any())
    assert torch.equal(hidden.sum(1), count.minimum(may_hide.sum(1)))


def test_no_time_is_below_the_smallest(monkeypatch):
    """A schedule's weight is finite from MIN_TIME on."""
    least = torch.tensor([MIN_TIME], dtype=torch.float64)
    monkeypatch.setattr(corruption.philox, "uniform", lambda *_, **__: least.expand(4))
    assert float(stratified_times(torch.arange(4), 4, seed=1).min()) == MIN_TIME
