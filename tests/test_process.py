"""Noise processes: their laws by algebra, and those of official codes."""

import re

import pytest
import torch
from folders import GOLDEN
from noisy_toys import MASK, PROCESSES, SPREAD, VOCAB, likelihoods
from safetensors.torch import load_file

from mdiff import ConfigError, TokenSpace
from mdiff.process import (
    Ids,
    Logistic,
    Masking,
    Mixed,
    Uniform,
    cost,
    marginal,
    named_process,
    transition,
)
from mdiff.schedule import Cosine, Linear

LEVELS = torch.linspace(0.01, 0.99, 23, dtype=torch.float64)
ALL = [*PROCESSES.values(), Logistic(shift=-2.0, scale=0.7), Mixed(p_uniform=0.9, gamma=0.5)]


def level(m):
    return torch.tensor(m, dtype=torch.float64)


@pytest.mark.parametrize("process", ALL, ids=str)
def test_shares_sum_to_one_keep_all_at_first_and_nothing_at_last(process):
    for m in (LEVELS, level(0.0), level(1.0)):
        assert torch.allclose(sum(process.noise(m)), torch.ones_like(m), rtol=0, atol=1e-12)
    assert float(process.noise(level(0.0)).keep) == 1
    assert float(process.noise(level(1.0)).keep) == 0


@pytest.mark.parametrize("process", ALL, ids=str)
def test_slopes_are_those_of_the_shares(process):
    h = 1e-6
    for up, down, slope in zip(
        process.noise(LEVELS + h), process.noise(LEVELS - h), process.slope(LEVELS)
    ):
        assert torch.allclose((up - down) / (2 * h), slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("process", ALL, ids=str)
def test_noise_only_grows(process):
    """No token that the noise wrote is ever taken back by it: every rate is at least 0."""
    m = torch.linspace(1e-4, 1 - 1e-4, 400, dtype=torch.float64)
    noise, slope = process.noise(m), process.slope(m)
    for share, rise in ((noise.mask, slope.mask), (noise.other, slope.other)):
        assert bool((rise - slope.keep / noise.keep * share >= -1e-9).all())


@pytest.mark.parametrize("name", PROCESSES)
def test_transitions_are_laws_and_those_of_a_known_token_compose(name):
    process = PROCESSES[name]
    for clean in range(VOCAB):
        known = torch.eye(VOCAB + 1, dtype=torch.float64)[clean].expand(VOCAB + 1, -1)
        spread = SPREAD.expand(VOCAB + 1, -1)
        every = torch.arange(VOCAB + 1)

        def step(t, s, known=known, spread=spread, every=every):
            found = transition(
                process.noise(level(t)), process.noise(level(s)), every, known, spread, mask_id=MASK
            )
            # A state that the process does not have leads nowhere.
            return found.nan_to_num(0.0)

        has = likelihoods(process, level(0.7))[clean] > 0
        whole = step(0.7, 0.4)
        assert torch.allclose(whole[has].sum(1), torch.ones(int(has.sum())).double(), atol=1e-12)
        assert torch.allclose((whole @ step(0.4, 0.15))[has], step(0.7, 0.15)[has], atol=1e-12)
        # The marginal of the clean token is kept.
        start = likelihoods(process, level(0.7))[clean]
        assert torch.allclose(start @ whole, likelihoods(process, level(0.4))[clean], atol=1e-12)
        assert torch.allclose(step(0.7, 0.0)[has][:, clean], torch.ones(int(has.sum())).double())


def test_marginals_are_of_the_prediction():
    prediction = torch.rand(5, VOCAB + 1, dtype=torch.float64)
    prediction[:, MASK] = 0
    prediction /= prediction.sum(1, keepdim=True)
    process = PROCESSES["gidd"]
    m = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    law = marginal(process.noise(m), prediction, SPREAD.expand(5, -1), mask_id=MASK)
    expected = (prediction[:, :VOCAB, None] * likelihoods(process, m)).sum(1)
    assert torch.allclose(law, expected, atol=1e-14)


def test_ids_are_those_of_each_part():
    space = TokenSpace(10, mask_id=4, never=(1,), parts=((2, 0, 5), (3, 5, 10)))
    ids = Ids.of(space, 5)
    assert ids.number.tolist() == [3, 3, 5, 5, 5]
    ends = torch.tensor([[2.0**-33] * 5, [1 - 2.0**-33] * 5], dtype=torch.float64)
    assert ids.chosen(ends).tolist() == [[0, 0, 5, 5, 5], [3, 3, 9, 9, 9]]


@pytest.mark.parametrize(("name", "options", "message"), [
    ("unifrom", {}, "uniform"), ("mixed", {"p": 0.1}, "does not take"),
    ("mixed", {"p_uniform": 1.0}, "p_uniform"), ("mixed", {"p_uniform": float("nan")}, "p_uniform"),
    ("mixed", {"gamma": 0.0}, "gamma"), ("mixed", {"gamma": 2.1}, "gamma"),
    ("logistic", {"scale": 1.1}, "scale"), ("logistic", {"scale": -1.0}, "scale"),
    ("logistic", {"shift": float("inf")}, "shift"),
    ("mixed", {"p_uniform": "a"}, "p_uniform=a: expected a number"),
    ("mixed", {"gamma": None}, "expected a number"), ("mixed", {"gamma": True}, "number"),
    ("mixed", {"gamma": [1.0]}, "expected a number"), ("logistic", {"shift": 10**400}, "number"),
    ("mixed", {"schedule": "cosine"}, "does not take"), ("uniform", {"name": 1}, "does not take"),
])  # fmt: skip
def test_what_is_no_process_is_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        named_process(name, Linear(), **options)


def test_processes_are_found_by_name():
    assert named_process("Mixed", Cosine(), p_uniform=0.3) == Mixed(Cosine(), p_uniform=0.3)
    assert named_process("masking", Linear()) == Masking(Linear())


@pytest.mark.parametrize("size", [2, 50_000])
@pytest.mark.parametrize("process", [Uniform(), Mixed(), Logistic()], ids=str)
def test_the_terms_in_float32_are_those_in_float64_at_every_level(process, size):
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(7, size, generator=generator, dtype=torch.float64).log_softmax(1)
    levels = [2.0**-64, 1e-9, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-6, 1 - 1e-9]
    m = torch.tensor(levels, dtype=torch.float64)
    x, count = torch.zeros(7, dtype=torch.int64), torch.full((7,), size)
    for z in (0, 1, size):
        found = [
            cost(
                log_p.to(dtype), x, x + z, (process.noise(m), process.slope(m)), count,
                mask_id=size,
            )
            for dtype in (torch.float32, torch.float64)
        ]  # fmt: skip
        low, high = (nats.double() * weight * m for weight, nats in found)
        assert torch.allclose(low, high, rtol=2e-3, atol=2e-3)


# official codes


def gidd(p_uniform):
    """Mixed, and what is needed to compare it on the golden canvas of GIDD."""
    expected = load_file(GOLDEN / "gidd" / "golden.safetensors")
    z = expected["z_t" if p_uniform else "z_t_masked_only"]
    logits = expected["logits"].double()
    logits[..., 39] = -torch.inf
    return Mixed(p_uniform=p_uniform), expected, z, logits


@pytest.mark.parametrize("p_uniform", [0.0, 0.1, 0.2])
def test_mixed_noise_is_that_of_gidd(p_uniform):
    process, expected, _, _ = gidd(p_uniform)
    noise = process.noise(expected["t"].double())
    for own, name in zip(noise, ("alpha", "beta_pi_mask", "beta_pi_other")):
        share = own / 39 if name == "beta_pi_other" else own
        official = expected[f"pu{p_uniform:g}.{name}"].double()
        assert torch.allclose(share, official, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_other_exponents_are_those_of_gidd(gamma):
    official = load_file(GOLDEN / "gidd" / "golden_posterior.safetensors")
    t = load_file(GOLDEN / "gidd" / "golden.safetensors")["t"].double()
    noise = Mixed(p_uniform=0.2, gamma=gamma).noise(t)
    for own, name in zip(noise, ("alpha", "beta_pi_mask", "beta_pi_other")):
        share = own / 39 if name == "beta_pi_other" else own
        assert torch.allclose(share, official[f"gamma{gamma}.{name}"].double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("p_uniform", [0.1, 0.2])
def test_the_bound_of_each_token_is_that_of_gidd(p_uniform):
    process, expected, z, logits = gidd(p_uniform)
    t = expected["t"].double()[:, None].expand_as(z).flatten()
    x, z = expected["x"].flatten(), z.flatten()
    weight, nats = cost(
        logits.log_softmax(-1).flatten(0, 1), x, z, (process.noise(t), process.slope(t)),
        torch.full_like(z, 39), mask_id=39,
    )  # fmt: skip
    name = f"pu{p_uniform:g}."
    official = expected[f"{name}elbo_weights"].flatten().double()
    assert torch.allclose(weight, official, rtol=1e-5, atol=0)
    official = expected[f"{name}elbo_per_token"].flatten().double()
    assert torch.allclose(weight * nats, official, rtol=2e-4, atol=1e-5)


def test_transitions_are_those_of_gidd():
    official = load_file(GOLDEN / "gidd" / "golden_posterior.safetensors")
    spread = (torch.arange(40) != 39).double() / 39
    compared = 0
    for name, law in official.items():
        if found := re.fullmatch(r"pu([\d.]+)\.t([\d.]+)\.s([\d.]+)\.q_st", name):
            p_uniform, t, s = map(float, found.groups())
            process, _, z, logits = gidd(p_uniform)
            mine = transition(
                process.noise(level(t)), process.noise(level(s)), z[:3, :8],
                logits[:3, :8].softmax(-1), spread.expand(3, 8, -1), mask_id=39,
            )  # fmt: skip
            law = law.double() / law.double().sum(-1, keepdim=True)
            assert torch.allclose(mine, law, rtol=1e-4, atol=1e-6), name
            compared += 1
    assert compared == 12


def test_logistic_noise_and_its_bound_are_those_of_scaled_gidd():
    official = load_file(GOLDEN / "gidd_hf" / "laws.safetensors")
    process = Logistic(shift=2.0)
    for name in ("-3.0", "0.5", "4.0"):
        keep, mask, other = process.noise(torch.sigmoid(-level(float(name))))
        law = (other / 95 / (1 - keep)).expand(96).clone()
        law[3] = mask / (1 - keep)
        assert torch.allclose(law, official[f"law.pi.lambda{name}"].double(), atol=1e-6)
    spread = (torch.arange(96) != 3).double() / 95
    for t, s in (("-3.0", "0.5"), ("0.5", "4.0")):
        mine = transition(
            process.noise(torch.sigmoid(-level(float(t)))),
            process.noise(torch.sigmoid(-level(float(s)))), official["law.z"],
            official["law.x_hat"].double(), spread.expand(2, 10, -1), mask_id=3,
        )  # fmt: skip
        law = official[f"law.ancestral.t{t}.s{s}"].double()
        assert torch.allclose(mine, law / law.sum(-1, keepdim=True), atol=1e-6)
    # Its levels are log-SNRs: the weight there is of the same integral over m.
    m = torch.sigmoid(-official["loss.log_snr"].double()).flatten()
    logits = official["loss.logits"].double()
    logits[..., 3] = -torch.inf
    weight, nats = cost(
        logits.log_softmax(-1).flatten(0, 1), official["loss.labels"].flatten(),
        official["loss.z"].flatten(), (process.noise(m), process.slope(m)),
        torch.full((len(m),), 95), mask_id=3,
    )  # fmt: skip
    expected = official["loss.elbo_weight"].double().flatten()
    assert torch.allclose(weight, expected, rtol=2e-4, atol=1e-5)
    expected = official["loss.elbo_per_token"].double().flatten()
    assert torch.allclose(weight * nats, expected, rtol=2e-4, atol=1e-5)


def test_uniform_transitions_and_bound_are_those_of_duo():
    official = load_file(GOLDEN / "remasking" / "golden.safetensors")
    z, p = official["uniform.x"], official["uniform.log_p_x0"].double().exp()
    spread = torch.full_like(p, 1 / 9)
    process, compared = Uniform(), 0
    alphas = {
        "loglinear": lambda t: 1 - (1 - 1e-3) * t,
        "cosine": lambda t: 1 - torch.cos(torch.pi / 2 * (1 - (1 - 1e-3) * t)),
    }

    # Column 9 is a mask that this noise never writes.
    def padded(law):
        return torch.cat([law, torch.zeros_like(law[..., :1])], -1)

    for name, law in official.items():
        found = re.fullmatch(r"uniform\.(\w+)\.psi\.t([\d.]+)\.s([\d.]+)\.kappa([\d.]+)", name)
        if found:
            alpha, kappa = alphas[found[1]], float(found[4])
            m_t, m_s = (1 - alpha(level(float(found[n]))) for n in (2, 3))
            steps = [
                transition(
                    process.noise(m_t), process.noise(m), z, padded(p), padded(spread), mask_id=9
                )
                for m in (m_s, level(0.0))
            ]  # fmt: skip
            fresh = marginal(process.noise(m_s), steps[1], padded(spread), mask_id=9)
            mine = kappa * steps[0] + (1 - kappa) * fresh
            assert torch.allclose(mine[..., :9], law.double(), rtol=1e-5, atol=1e-6), name
            compared += 1
    assert compared == 18
    x, z = official["nll.x0"].flatten(), official["nll.xt"].flatten()
    length = official["nll.x0"].shape[1]
    m = (1 - official["nll.alpha_t"].double()).reshape(-1, 1).expand(-1, length).flatten()
    rise = (-official["nll.dalpha_t"].double()).reshape(-1, 1).expand(-1, length).flatten()
    weight, nats = cost(
        official["nll.log_p_x0"].double().flatten(0, 1), x, z,
        (process.noise(m), process.slope(m)), torch.full_like(x, 9), mask_id=9,
    )  # fmt: skip
    expected = official["nll.per_token"].double().flatten()
    assert torch.allclose(rise * weight * nats, expected, rtol=1e-5, atol=1e-6)
