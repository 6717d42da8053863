"""The objective of every noise process: its bound, its weights, masking as a case of it."""

import numpy as np
import pytest
import torch
from noisy_toys import (
    CLEAN,
    LENGTH,
    MASK,
    P_CLEAN,
    PROCESSES,
    STATES,
    TOY,
    VOCAB,
    IdealDenoiser,
    likelihoods,
    posterior_of,
)  # fmt: skip

from mdiff import ConfigError, TokenSpace, from_logits
from mdiff.objective import diffusion_loss, masked_diffusion_loss, nll_bound
from mdiff.process import Logistic, Masking, Mixed, Noise, Uniform, cost, leave_one_out
from mdiff.schedule import Exponential, Geometric, Linear, Polynomial

ENTROPY = float(-(P_CLEAN * P_CLEAN.log()).sum())
NOISY = [name for name in PROCESSES if name != "masking"]


def expected_bound(process, predicted, nodes=120):
    """E over clean x of the bound, by quadrature over m = (1 - cos) / 2 and all states.

    `predicted(m)` are log-probabilities (STATES, LENGTH, VOCAB).
    """
    x, w = np.polynomial.legendre.leggauss(nodes)
    total = 0.0
    for node, share in zip((x + 1) / 2, w / 2):
        # The level and its slope in the node: dense at both ends, where terms vary.
        ends = node**4 + (1 - node) ** 4
        m = torch.tensor(node**4 / ends, dtype=torch.float64)
        slope = 4 * (node * (1 - node)) ** 3 / ends**2
        q = likelihoods(process, m)
        noise, rise = process.noise(m), process.slope(m)
        log_p = predicted(m)
        chance = torch.stack([q[CLEAN[:, i]][:, STATES[:, i]] for i in range(LENGTH)]).prod(0)
        chance = chance * P_CLEAN[:, None]
        for i in range(LENGTH):
            n = len(CLEAN) * len(STATES)
            weight, nats = cost(
                log_p[None, :, i].expand(len(CLEAN), -1, -1).reshape(n, VOCAB),
                CLEAN[:, i].repeat_interleave(len(STATES)), STATES[:, i].repeat(len(CLEAN)),
                tuple(Noise(*(s.expand(n) for s in each)) for each in (noise, rise)),
                torch.full((n,), VOCAB), mask_id=MASK,
            )  # fmt: skip
            # What the process never has is not scored.
            terms = torch.where(chance.flatten() > 0, weight * nats, 0.0)
            total += share * slope * float((chance.flatten() * terms).sum())
    return total


@pytest.mark.parametrize("name", PROCESSES)
def test_the_bound_of_the_ideal_prediction_is_the_entropy_of_the_data(name):
    process = PROCESSES[name]
    found = expected_bound(process, lambda m: posterior_of(process, m, without=True).log())
    assert found == pytest.approx(ENTROPY, abs=1e-5)


@pytest.mark.parametrize("name", NOISY)
def test_a_posterior_is_converted(name):
    process = PROCESSES[name]
    for level in (0.1, 0.5, 0.9):
        m = torch.tensor(level, dtype=torch.float64)
        posterior = posterior_of(process, m, without=False).log().flatten(0, 1)
        ideal = posterior_of(process, m, without=True).flatten(0, 1)
        z = STATES.flatten()
        noise = Noise(*(s.expand(len(z)) for s in process.noise(m)))
        count = torch.full((len(z),), VOCAB)
        found = leave_one_out(posterior, z, noise, count, mask_id=MASK).exp()
        real = (ideal.sum(-1) > 0.5) & posterior.exp().sum(-1).gt(0.5)
        assert torch.allclose(found[real], ideal[real], atol=1e-12)


@pytest.mark.parametrize("name", NOISY)
def test_a_posterior_read_as_leave_one_out_is_no_bound_of_the_entropy(name):
    process = PROCESSES[name]
    found = expected_bound(
        process, lambda m: posterior_of(process, m, without=False).clamp(min=1e-12).log()
    )
    assert abs(found - ENTROPY) > 0.05


@pytest.mark.parametrize("predicts", ["leave_one_out", "posterior"])
@pytest.mark.parametrize("name", NOISY)
def test_the_estimated_bound_is_the_entropy(name, predicts):
    process = PROCESSES[name]
    model = IdealDenoiser(process, predicts)
    bound = nll_bound(
        model, CLEAN, space=TOY.space, schedule=Linear(), process=process,
        estimator="time", draws=100, seed=1,
    )  # fmt: skip
    mean, error = float(P_CLEAN @ bound.nats), float((P_CLEAN * bound.stderr).norm())
    assert abs(mean - ENTROPY) < 5 * error
    assert error < 0.3 * ENTROPY


@pytest.mark.parametrize("name", NOISY)
def test_bound_and_loss_of_a_posterior_are_those_of_the_prediction_it_is_made_into(name):
    """Of the same noise: one seed. A reading that leaves the posterior as it is misses them."""
    process = PROCESSES[name]
    given, read, misread = (
        IdealDenoiser(process, truth, says)
        for truth, says in (
            ("leave_one_out", ""), ("posterior", ""), ("posterior", "leave_one_out"),
        )
    )  # fmt: skip

    def bound(model):
        return nll_bound(
            model, CLEAN, space=TOY.space, schedule=Linear(), process=process, estimator="time",
            draws=8, seed=1,
        ).nats  # fmt: skip

    def loss(model):
        return diffusion_loss(model, CLEAN, space=TOY.space, process=process, seed=2).nll

    for figure in (bound, loss):
        assert torch.allclose(figure(read), figure(given), rtol=1e-3, atol=1e-5)
        assert not torch.allclose(figure(misread), figure(given), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", NOISY)
def test_the_mean_of_the_loss_is_the_bound(name):
    process, rows, steps = PROCESSES[name], 1024, 30
    generator = torch.Generator().manual_seed(0)
    tokens = CLEAN[torch.multinomial(P_CLEAN, rows, replacement=True, generator=generator)]
    model = IdealDenoiser(process, "leave_one_out")
    losses = []
    for step in range(steps):
        u = (step + 0.5) / steps
        t = torch.full((rows,), u**4, dtype=torch.float64)
        loss = diffusion_loss(model, tokens, space=TOY.space, process=process, t=t, seed=step)
        value = float(loss.value) * LENGTH
        bound = process.schedule.weight(t) * loss.nll.sum(1)
        assert float(bound.mean()) == pytest.approx(value, rel=1e-9)
        losses.append(value * 4 * u**3)
        assert bool(loss.hidden.all())
    assert np.mean(losses) == pytest.approx(ENTROPY, rel=0.05)


def test_masking_is_the_masked_loss_bit_for_bit():
    space = TokenSpace(7, mask_id=7)
    tokens = torch.randint(7, (5, 9), generator=torch.Generator().manual_seed(1))
    table = torch.randn(8, 7, generator=torch.Generator().manual_seed(2))
    model = from_logits(lambda canvas: table[canvas])
    for weight in ("bound", "uniform", lambda t: t + 1):
        one = diffusion_loss(
            model, tokens, space=space, process=Masking(Linear()), weight=weight, seed=3
        )
        other = masked_diffusion_loss(
            model, tokens, space=space, schedule=Linear(), weight=weight, seed=3
        )
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_no_random_tokens_are_masking_in_every_term():
    space = TokenSpace(7, mask_id=7)
    tokens = torch.randint(7, (5, 9), generator=torch.Generator().manual_seed(1))
    table = torch.randn(8, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model = from_logits(lambda canvas: table[canvas])
    model.predicts = "leave_one_out"
    one = diffusion_loss(model, tokens, space=space, process=Mixed(p_uniform=0.0), seed=3)
    other = masked_diffusion_loss(model, tokens, space=space, schedule=Linear(), seed=3)
    assert torch.allclose(one.value, other.value, rtol=1e-12)
    assert torch.allclose(one.nll, other.nll, rtol=1e-12)


def test_each_weight_is_what_it_says():
    space = TokenSpace(5, mask_id=5)
    tokens = torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(1))
    table = torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model = from_logits(lambda canvas: table[canvas])
    model.predicts = "leave_one_out"
    process = Mixed(p_uniform=0.3)
    t = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    rest = {"space": space, "process": process, "t": t, "seed": 1}
    plain = diffusion_loss(model, tokens, weight="uniform", **rest)
    assert float(plain.value) == pytest.approx(float(plain.nll.sum()) / 24)
    own = diffusion_loss(model, tokens, weight=lambda t: t**2, **rest)
    assert float(own.value) == pytest.approx(float((t[:, None] ** 2 * plain.nll).sum()) / 24)
    bound = diffusion_loss(model, tokens, **rest)
    clipped = diffusion_loss(model, tokens, max_weight=1.0, **rest)
    assert 0 < float(clipped.value) < float(bound.value)
    assert torch.equal(bound.value, diffusion_loss(model, tokens, max_weight=1e9, **rest).value)
    with pytest.raises(ConfigError, match="posterior"):
        diffusion_loss(model, tokens, weight="cross_entropy", **rest)
    model.predicts = "posterior"
    every = diffusion_loss(model, tokens, weight="cross_entropy", **rest)
    assert bool(every.hidden.all())
    assert float(every.value) > 0


def test_gradients_flow_and_match_finite_differences():
    space = TokenSpace(4, mask_id=4)
    tokens = torch.randint(4, (3, 5), generator=torch.Generator().manual_seed(1))
    table = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for process in (Uniform(), Mixed(p_uniform=0.3)):
        for predicts in ("leave_one_out", "posterior"):

            def loss(table, process=process, predicts=predicts):
                model = from_logits(lambda canvas: table[canvas])
                model.predicts = predicts
                return diffusion_loss(model, tokens, space=space, process=process, seed=1).value

            assert torch.autograd.gradcheck(loss, (table.clone().requires_grad_(),))


def test_a_denoiser_that_does_not_say_what_it_predicts_is_refused():
    space = TokenSpace(4, mask_id=4)
    model = from_logits(lambda canvas: torch.zeros(*canvas.shape, 4))
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    for wrong in (None, "noise"):
        if wrong:
            model.predicts = wrong
        with pytest.raises(ConfigError, match="leave_one_out"):
            diffusion_loss(model, tokens, space=space, process=Uniform(), seed=0)
    with pytest.raises(ConfigError, match="'time' alone"):
        nll_bound(model, tokens, space=space, schedule=Linear(), process=Uniform(), seed=0)


EXTREMES = [
    Uniform(), Uniform(Exponential(36.0)), Uniform(Polynomial(400.0)), Mixed(p_uniform=0.0),
    Mixed(p_uniform=1e-45), Mixed(p_uniform=1e-40, gamma=2.0), Mixed(p_uniform=1 - 2.0**-53),
    Mixed(Geometric()), Logistic(shift=-100.0), Logistic(shift=1e6), Logistic(shift=-1e6),
]  # fmt: skip


@pytest.mark.parametrize("predicts", ["leave_one_out", "posterior"])
@pytest.mark.parametrize("process", EXTREMES, ids=str)
def test_losses_and_gradients_are_finite_at_all_times_and_for_sure_models(process, predicts):
    space = TokenSpace(3, mask_id=3)
    tokens = torch.tensor([[0, 1, 2]] * 6)
    table = torch.tensor([[0.0, 200.0, -200.0]] * 4, requires_grad=True)
    model = from_logits(lambda canvas: table[canvas])
    model.predicts = predicts
    for dtype in (torch.float32, torch.float64):
        t = torch.tensor([2.0**-32, 1e-6, 0.5, 1 - 1e-6, 1 - 2.0**-40, 1.0], dtype=dtype)
        loss = diffusion_loss(model, tokens, space=space, process=process, t=t, seed=1)
        (gradient,) = torch.autograd.grad(loss.value, table)
        assert all(bool(each.isfinite().all()) for each in (loss.value, loss.nll, gradient))


def test_max_weight_clips_the_weight_of_cross_entropy_too():
    space = TokenSpace(4, mask_id=4)
    model = from_logits(lambda canvas: torch.zeros(*canvas.shape, 4))
    model.predicts = "posterior"
    rest = {"space": space, "process": Uniform(), "weight": "cross_entropy", "seed": 0}
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    whole = diffusion_loss(model, tokens, **rest).value
    assert torch.equal(diffusion_loss(model, tokens, max_weight=0.5, **rest).value, whole / 2)
    for most in (0.0, -1.0, float("nan")):
        for process in (Uniform(), Masking()):
            with pytest.raises(ConfigError, match="max_weight"):
                diffusion_loss(model, tokens, space=space, process=process, max_weight=most, seed=0)


def test_a_block_model_has_no_bound_under_such_noise():
    space = TokenSpace(4, mask_id=4)
    model = from_logits(lambda canvas: torch.zeros(*canvas.shape, 4))
    model.predicts, model.block_length = "posterior", 2
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    rest = {"space": space, "schedule": Linear(), "estimator": "time", "draws": 2, "seed": 0}
    with pytest.raises(ConfigError, match="block model"):
        nll_bound(model, tokens, process=Uniform(), **rest)
    assert bool(nll_bound(model, tokens, process=Masking(), **rest).nats.isfinite().all())
