"""The draw: backends against the reference, its law, its figures and its corners."""

from __future__ import annotations

import math

import pytest
import torch
from exactness import TOTAL_VARIATION, counters, distributions, figures_agree, total_variation
from scipy import stats

from mdiff.errors import BackendError, ConfigError
from mdiff.kernels import draw_torch, philox
from mdiff.kernels.reference import TILE, Draw, draw_reference, kept_columns
from mdiff.ops import BACKENDS, backend_name, bind_draw, draw

FALSE_ALARM = 1e-6 / 32
OPTIONS = [
    {}, {"temperature": 0.7}, {"temperature": 2.5}, {"temperature": 0.0}, {"top_k": 1},
    {"top_k": 5}, {"top_p": 0.8}, {"top_p": 0.3, "temperature": 1.3}, {"min_p": 0.05},
    {"top_k": 9, "top_p": 0.7, "min_p": 0.01, "temperature": 0.9}, {"never": (0, 7, 2999)},
    {"span": (100, 900)}, {"span": (1024, 2048)}, {"measure": "drawn", "temperature": 0.5},
    {"measure": "drawn", "temperature": 0.0, "top_k": 3}, {"min_p": 1.0}, {"min_p": 1e-60},
    {"measure": "drawn", "temperature": 0.8, "min_p": 0.02}, {"temperature": 0.0, "min_p": 0.5},
    {"measure": "drawn", "temperature": 0.0, "min_p": 0.01}, {"temperature": 1e-300},
    {"span": (7, 2990), "never": (7, 8, 1500, 2989), "temperature": 1.7, "min_p": 1e-3},
]  # fmt: skip
faster = pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"reference"}))


def logits_like(kind, rows=24, vocab=3000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, vocab, generator=generator)
    if kind == "zipf":
        return -torch.arange(1, vocab + 1).log().expand(rows, vocab)
    if kind == "flat":
        return torch.zeros(rows, vocab)
    if kind == "peaked":
        return noise + 12 * (torch.arange(vocab) == 17)
    return 3 * noise


def differs_only_at_near_ties(logits, one, two, **counter):
    """Where ids differ, some uniform lies within float32 rounding of an edge of the CDF."""
    for row in (one.tokens != two.tokens).nonzero()[:, 0].tolist():
        nudged = {
            int(draw_reference(logits[row : row + 1].double() * (1 + sign * 1e-6),
                               **{k: v[row : row + 1] for k, v in counter.items()}).tokens)
            for sign in (-1, 0, 1)
        }  # fmt: skip
        if not {int(one.tokens[row]), int(two.tokens[row])} <= nudged:
            return False
    return True


@faster
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_backend_draws_what_the_reference_draws(backend, options):
    logits = logits_like("normal")
    fast = draw(logits, seed=5, backend=backend, **options)
    true = draw(logits, seed=5, backend="reference", **options)
    assert torch.equal(fast.tokens, true.tokens)
    assert torch.allclose(fast.log_prob.double(), true.log_prob, atol=1e-5)
    assert torch.allclose(fast.entropy.double(), true.entropy, atol=2e-5)
    assert torch.allclose(fast.margin.double(), true.margin, atol=1e-5)


@faster
@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("tile", [64, 1024])
def test_any_vocabulary_and_tile_agree_with_the_reference(backend, vocab, tile):
    logits = logits_like("normal", rows=9, vocab=vocab)
    counter = counters(9)
    fast = BACKENDS[backend](logits, tile=tile, **counter)
    true = draw_reference(logits, tile=tile, **counter)
    assert differs_only_at_near_ties(logits, fast, true, **counter)
    assert torch.equal(fast.tokens, true.tokens)


@faster
@pytest.mark.parametrize("name", distributions(2))
def test_the_figures_are_those_of_float64(backend, name):
    logits = distributions()[name].expand(8, -1)
    figures_agree(draw(logits, seed=2, backend=backend), logits)


@pytest.mark.parametrize("name", distributions(2))
def test_the_law_of_torch_is_that_of_float64(name):
    """By its own arithmetic: masses of tiles, and weights of ids in them."""
    logits = distributions()[name]
    padded = torch.full((1, -(-len(logits) // TILE) * TILE), -torch.inf)
    padded[0, : len(logits)] = logits - logits.max()
    weights = draw_torch._Weights(padded, TILE, into=torch.empty_like(padded))
    inside = weights.weight_NTK.double()
    share = weights.mass_NT / weights.total_N[:, None]
    p = share[:, :, None] * inside / inside.sum(2, keepdim=True)
    assert total_variation(p.flatten()[: len(logits)], logits) < TOTAL_VARIATION


@faster
@pytest.mark.parametrize("tile", [4, 1024])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 7}, {"forbidden": (3,)}, {"min_p": 0.005}],
    ids=str,
)
def test_the_law_is_softmax_by_chi_square(backend, tile, options):
    n = 200_000
    logits = logits_like("normal", rows=1, vocab=37, seed=6)
    counter = counters(n)
    tokens = BACKENDS[backend](logits.expand(n, 37), tile=tile, **options, **counter).tokens
    scaled = logits.double() / options.get("temperature", 1)
    scaled[~kept_columns(scaled, options.get("top_k"), None, options.get("min_p"))] = -torch.inf
    scaled[:, list(options.get("forbidden", ()))] = -torch.inf
    expected = n * scaled.softmax(1)[0]
    counts = torch.bincount(tokens, minlength=37).double()
    assert (counts[expected == 0] == 0).all()
    keep = expected > 5
    pooled = torch.cat([counts[keep], counts[~keep].sum()[None]])
    target = torch.cat([expected[keep], expected[~keep].sum()[None]])
    pooled, target = pooled[target > 0], target[target > 0]
    statistic = float(((pooled - target) ** 2 / target).sum())
    assert stats.chi2.sf(statistic, len(target) - 1) > FALSE_ALARM


@faster
def test_float32_draws_have_the_entropy_of_float64_on_a_zipf_row(backend):
    """A 50,257-way Zipf row: the mean surprise of the draws within 3 standard errors."""
    vocab, n = 50_257, 4096
    log_p = logits_like("zipf", rows=1, vocab=vocab).double().log_softmax(1)[0]
    entropy = float(-(log_p.exp() * log_p).sum())
    tokens = draw(log_p.float().expand(n, vocab), seed=3, backend=backend).tokens
    surprise = -log_p[tokens]
    assert abs(float(surprise.mean()) - entropy) < 3 * float(surprise.std()) / math.sqrt(n)


def test_the_naive_joint_categorical_in_float32_has_the_known_bias():
    """The race over the vocabulary and the mask in one: truncated noise, too few reveals.

    At 1,024 steps, t = 1/2 and a uniform row, token classes carry p / 512 each. The law of a
    float32 uniform (steps of 2^-24) is enumerated instead of sampled: the smallest race time
    is 2^-24, and only tokens with p dt above it can fire, so reveals come 0.42 as often.
    """
    vocab, eps = 50_257, 2.0**-24
    chance = 1 / 1024 / 0.5
    rate = chance / (1 - chance) / vocab
    k = torch.arange(1, 2**24, 97, dtype=torch.float64)
    fired = torch.floor(k * eps * rate / eps)
    hazard = 1.0
    survival = torch.exp(-k * eps * hazard - fired * vocab * eps)
    revealed = float((survival * eps * torch.minimum(fired, torch.ones(())) * vocab * rate).sum())
    assert fired.max() <= 1
    assert revealed < 0.5 * chance
    exact = draw(torch.zeros(2000, vocab), seed=1)
    assert torch.allclose(exact.entropy, torch.tensor(math.log(vocab)), atol=1e-3)


@faster
def test_a_light_tail_keeps_its_mass(backend):
    """Half the mass in one tile, half in 8 million-to-one ids: none is deleted by rounding."""
    vocab, n = 20_480, 20_000
    logits = torch.full((vocab,), math.log(6e-8))
    logits[0] = math.log(1 - 6e-8 * (vocab - 1))
    scale = 400.0
    logits[0] -= math.log(scale)
    p = logits.double().softmax(0)
    tokens = BACKENDS[backend](logits.expand(n, vocab), **counters(n)).tokens
    tail = int((tokens > 0).sum())
    expected = n * float(1 - p[0])
    assert stats.binomtest(tail, n, float(1 - p[0])).pvalue > FALSE_ALARM
    assert expected > 5


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_rows_without_a_law_draw_the_lowest_permitted_id_with_nan(backend):
    logits = torch.zeros(5, 6)
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    logits[3, 1:] = -torch.inf
    out = draw(logits, seed=0, never=(0, 1), backend=backend)
    assert out.tokens[:4].tolist() == [2, 2, 2, 2]
    assert out.log_prob[:4].isnan().all()
    assert out.entropy[:4].isnan().all()
    assert not out.log_prob[4].isnan()


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_one_hot_rows_single_columns_and_ties(backend):
    one_hot = torch.full((1, 2500), -torch.inf)
    one_hot[0, 2049] = 1.0
    out = draw(one_hot, seed=4, backend=backend)
    assert [float(x) for x in out] == [2049, 0, 0, 1]
    assert [float(x[0]) for x in draw(torch.zeros(1, 1), seed=4, backend=backend)] == [0, 0, 0, 1]
    tie = torch.zeros(1, 2000)
    tie[0, [700, 1500]] = 5.0
    greedy = draw(tie, seed=4, temperature=0, backend=backend)
    assert int(greedy.tokens) == 700
    assert float(greedy.margin) == pytest.approx(0, abs=1e-7)
    assert int(draw(tie, seed=4, top_k=1, backend=backend).tokens) == 700
    assert draw(torch.zeros(0, 7), seed=0, backend=backend).tokens.shape == (0,)


@faster
def test_a_row_is_the_same_in_every_batch(backend):
    logits = logits_like("normal", rows=200, vocab=4100)
    whole = draw(logits, seed=8, position=torch.arange(200), backend=backend)
    for rows in ([3], [199, 0, 7], list(range(50, 120))):
        part = draw(logits[rows], seed=8, position=torch.tensor(rows), backend=backend)
        for a, b in zip(part, Draw(*(x[rows] for x in whole))):
            assert torch.equal(a, b)


@faster
def test_spans_differ_from_row_to_row(backend):
    logits = logits_like("normal", rows=3, vocab=50)
    span = torch.tensor([[0, 5], [10, 11], [40, 50]])
    tokens = torch.stack(
        [draw(logits, seed=s, span=span, backend=backend).tokens for s in range(40)]
    )
    assert ((tokens >= span[:, 0]) & (tokens < span[:, 1])).all()


def test_filters_keep_what_they_say():
    p = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]]).log()
    assert kept_columns(p, 2, None, None)[0].tolist() == [True, True, False, False, False]
    assert kept_columns(p, None, 0.69, None)[0].tolist() == [True, True, False, False, False]
    assert kept_columns(p, None, 0.71, None)[0].tolist() == [True, True, True, False, False]
    assert kept_columns(p, None, None, 0.3)[0].tolist() == [True, True, True, False, False]
    assert kept_columns(p, 3, 0.8, None)[0].tolist() == [True, True, False, False, False]
    assert kept_columns(torch.zeros(1, 4), 2, None, None)[0].tolist() == [True, True, False, False]


def test_bfloat16_and_float64_logits_are_taken():
    logits = logits_like("normal")
    assert draw(logits.bfloat16(), seed=1).log_prob.dtype == torch.float32
    assert draw(logits.double(), seed=1).log_prob.dtype == torch.float64


@pytest.mark.parametrize("options", [
    {"temperature": -0.1}, {"temperature": float("inf")}, {"top_k": 0}, {"top_p": 1.1},
    {"top_p": 0.0}, {"min_p": -0.1}, {"measure": "model_"},
])  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError):
        draw(torch.zeros(1, 3), seed=0, **options)


def test_a_filter_of_an_unknown_name_is_a_type_error():
    with pytest.raises(TypeError, match="topk"):
        draw(torch.zeros(1, 3), seed=0, topk=3)
    with pytest.raises(TypeError, match="topk"):
        bind_draw(3, topk=3)


def test_a_backend_that_is_not_here_is_an_error_and_never_another_one(monkeypatch):
    with pytest.raises(BackendError, match="torch"):
        draw(torch.zeros(1, 3), seed=0, backend="torhc")
    monkeypatch.setenv("MDIFF_BACKEND", "reference")
    assert backend_name() == "reference"
    assert draw(torch.zeros(1, 3), seed=0).log_prob.dtype == torch.float64


def test_philox_gives_the_published_vectors():
    """Known answers of Random123 (Salmon et al. 2011)."""
    top = 2**32 - 1
    cases = {
        (0, 0, 0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (2**64 - 1, top, top, top, top): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (0x299F31D0A4093822, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344):
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }  # fmt: skip
    for counter, expected in cases.items():
        assert tuple(int(w) for w in philox.words(*counter)) == expected


def test_uniforms_never_reach_their_ends():
    assert float(philox.to_uniform(torch.tensor(0))) > 0
    assert float(philox.to_uniform(torch.tensor(2**32 - 1))) < 1


@pytest.mark.parametrize("never", [(7,), (-1,), (0, 1, 2)])
def test_never_ids_outside_the_vocabulary_or_all_of_it_are_refused(never):
    with pytest.raises(ConfigError, match="never"):
        draw(torch.zeros(1, 3), seed=0, never=never)


def test_a_row_without_a_law_heeds_never_ids_in_any_order():
    for backend in sorted(BACKENDS):
        out = draw(torch.full((1, 4), torch.nan), seed=0, never=(1, 0), backend=backend)
        assert int(out.tokens) == 2


@faster
def test_a_high_temperature_does_not_bring_back_excluded_ids(backend):
    logits = torch.zeros(4000, 3)
    logits[:, 2] = -torch.inf
    for kind in (torch.float32, torch.float64):
        out = draw(logits.to(kind), seed=1, temperature=1e6, never=(0,), backend=backend)
        assert (out.tokens == 1).all()


GUIDED = [
    {}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.8, "min_p": 0.01}, {"never": (3, 2999)},
    {"span": (900, 2100), "measure": "drawn", "temperature": 1.5},
]  # fmt: skip


@faster
@pytest.mark.parametrize("options", GUIDED, ids=str)
def test_guidance_in_the_pass_draws_from_the_mixed_logits(backend, options):
    conditional, unconditional = logits_like("normal"), logits_like("normal", seed=1)
    scale = torch.linspace(-0.5, 3, 24)
    mixed = unconditional + scale[:, None] * (conditional - unconditional)
    fast = draw(
        conditional, seed=5, backend=backend, unconditional=unconditional, guidance_scale=scale,
        **options,
    )  # fmt: skip
    true = draw(mixed.double(), seed=5, backend="reference", **options)
    assert torch.equal(fast.tokens, true.tokens)
    assert torch.allclose(fast.log_prob.double(), true.log_prob, atol=5e-5)
    assert torch.allclose(fast.entropy.double(), true.entropy, atol=5e-5)
    assert torch.allclose(fast.margin.double(), true.margin, atol=5e-5)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_row_of_scale_1_does_not_look_at_the_other_branch(backend, kind):
    conditional = logits_like("normal", rows=6, vocab=1500).to(kind)
    nothing = torch.full_like(conditional, torch.nan)
    alone = draw(conditional, seed=3, backend=backend)
    both = draw(
        conditional, seed=3, backend=backend, unconditional=nothing, guidance_scale=1.0
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(alone, both))


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_what_both_branches_exclude_is_excluded_and_what_one_alone_does_has_its_value(backend):
    conditional = torch.zeros(3, 4)
    unconditional = torch.zeros(3, 4)
    conditional[0, 1] = unconditional[0, 1] = -torch.inf
    conditional[1, 1] = -torch.inf
    unconditional[2, 1] = -torch.inf
    out = draw(
        conditional, seed=3, backend=backend, unconditional=unconditional, guidance_scale=2.0
    )  # fmt: skip
    assert out.entropy[:2].double().sub(math.log(3)).abs().max() < 1e-6
    assert out.entropy[2].isnan()
    assert out.tokens[2] == 0


def test_guidance_of_another_shape_or_type_is_refused():
    for other in (torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.float64)):
        with pytest.raises(ConfigError, match="unconditional"):
            draw(torch.zeros(2, 4), seed=0, unconditional=other, guidance_scale=2.0)


@pytest.mark.parametrize(
    "options",
    [
        {"span": (60, 90)}, {"span": (50, 51)}, {"span": (5, 3)}, {"span": torch.zeros(3, 3)},
        {"guidance_scale": 2.0}, {"unconditional": torch.zeros(2, 50), "guidance_scale": math.nan},
    ],
    ids=str,
)  # fmt: skip
def test_spans_outside_and_guidance_without_effect_are_refused(options):
    with pytest.raises(ConfigError, match=r"span|guidance_scale"):
        draw(torch.zeros(2, 50), seed=1, **options)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_logits_with_a_graph_are_drawn_from(backend):
    logits = logits_like("normal", rows=3, vocab=50)
    plain = draw(logits, seed=1, backend=backend)
    graph = draw(logits.clone().requires_grad_(), seed=1, backend=backend)
    assert torch.equal(plain.tokens, graph.tokens)
