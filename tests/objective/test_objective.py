"""The objective: enumerated bounds, invariances, and what costs nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from toys import HashDenoiser, make_toy

from mdiff.backbones.bit_transformer import bit_transformer
from mdiff.backbones.transformer import TransformerForMaskedLM, transformer
from mdiff.denoiser import from_logits
from mdiff.errors import ConfigError
from mdiff.kernels.loss_heads import MatrixHead
from mdiff.objective.bound import nll_bound
from mdiff.objective.corruption import corrupt, stratified_times
from mdiff.objective.loss import masked_diffusion_loss
from mdiff.objective.nll import token_nll
from mdiff.schedule import SCHEDULES, Cosine, Linear, named_schedule
from mdiff.tokens import TokenSpace

TOY = make_toy(3, 4, seed=5)
SPACE = TokenSpace(7, mask_id=2, never=(5,))
every_schedule = pytest.mark.parametrize("name", sorted(SCHEDULES))


def uniform_denoiser(space):
    return from_logits(lambda tokens: torch.zeros(*tokens.shape, space.vocab_size).double())


def lopsided_denoiser(length=5, vocab=4, seed=1):
    """A denoiser that is no one's conditional: its bound differs from order to order."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn((vocab + 1) ** length, length, vocab, generator=generator).double()
    base = (vocab + 1) ** torch.arange(length)
    return from_logits(lambda tokens: table[(tokens * base).sum(1)]), TokenSpace(vocab, vocab)


def mean_over_orders(denoiser, space, tokens, maskable):
    """The chain rule averaged over all orders, one by one."""
    totals = []
    for order in itertools.permutations(maskable):
        noisy = tokens.clone()
        noisy[0, list(maskable)] = space.mask_id
        total = 0.0
        for place in order:
            log_p = denoiser(noisy)[0, place].log_softmax(0)
            total -= float(log_p[tokens[0, place]])
            noisy[0, place] = tokens[0, place]
        totals.append(total)
    return sum(totals) / len(totals)


@pytest.mark.parametrize("length", [1, 3, 5])
def test_the_exact_bound_is_the_mean_over_all_orders(length):
    denoiser, space = lopsided_denoiser()
    tokens = torch.tensor([[3, 0, 1, 2, 2]])
    may_hide = torch.arange(5)[None] < length
    bound = nll_bound(
        denoiser,
        tokens,
        space=space,
        schedule=Linear(),
        estimator="exact",
        seed=0,
        may_hide=may_hide,
    )
    expected = mean_over_orders(denoiser, space, tokens, range(length))
    assert float(bound.nats[0]) == pytest.approx(expected, abs=1e-10)


def test_the_expected_loss_at_uniform_ratio_is_the_mean_over_all_orders():
    """Enumerate every subset at every m and integrate: polynomials, so Gauss-Legendre is exact."""
    denoiser, space = lopsided_denoiser()
    tokens = torch.tensor([[3, 0, 1, 2, 2]])
    nodes, weights = torch.tensor(GAUSS, dtype=torch.float64).unbind(1)
    total = 0.0
    for node, quadrature in zip(nodes.tolist(), weights.tolist()):
        for hidden in itertools.product([False, True], repeat=5):
            hide = torch.tensor([hidden])
            if not any(hidden):
                continue
            chance = node ** sum(hidden) * (1 - node) ** (5 - sum(hidden))
            noisy = torch.where(hide, space.mask_id, tokens)
            nll = token_nll(denoiser(noisy), tokens, noisy, space=space)
            total += quadrature * chance * float(Linear().weight(node)) * float(nll.sum())
    expected = mean_over_orders(denoiser, space, tokens, range(5))
    assert total == pytest.approx(expected, abs=1e-10)


GAUSS = [(0.5 * (x + 1), 0.5 * w) for x, w in [
    (-0.9324695142031521, 0.1713244923791704), (-0.6612093864662645, 0.3607615730481386),
    (-0.2386191860831969, 0.4679139345726910), (0.2386191860831969, 0.4679139345726910),
    (0.6612093864662645, 0.3607615730481386), (0.9324695142031521, 0.1713244923791704),
]]  # fmt: skip


@pytest.mark.parametrize("estimator", ["any_order", "time"])
def test_estimators_are_unbiased_and_their_intervals_cover(estimator):
    """500 repeats; the 95 percent interval covers in 90 to 99 percent of them."""
    denoiser, space = lopsided_denoiser()
    tokens = torch.tensor([[3, 0, 1, 2, 2]])
    exact = float(
        nll_bound(denoiser, tokens, space=space, schedule=Linear(), estimator="exact", seed=0).nats
    )
    many = tokens.expand(500, 5)
    bound = nll_bound(
        denoiser, many, space=space, schedule=Cosine(), estimator=estimator, draws=64, seed=11
    )
    covered = ((bound.nats - exact).abs() < 1.96 * bound.stderr).double().mean()
    assert 0.90 <= float(covered) <= 0.99
    error = bound.nats.mean() - exact
    assert abs(float(error)) < 4.9 * float(bound.nats.std()) / math.sqrt(500)


def test_left_to_right_is_the_likelihood_of_that_sampler():
    tokens = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
    bound = nll_bound(
        TOY.denoiser(),
        tokens,
        space=TOY.space,
        schedule=Linear(),
        estimator="left_to_right",
        seed=0,
    )
    exact = -torch.stack([TOY.joint[tuple(row)] for row in tokens.tolist()]).log()
    assert torch.allclose(bound.nats, exact, atol=1e-12)
    assert (bound.stderr == 0).all()


def test_an_ideal_denoiser_makes_the_bound_tight_in_every_order():
    tokens = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
    exact = -torch.stack([TOY.joint[tuple(row)] for row in tokens.tolist()]).log()
    bound = nll_bound(
        TOY.denoiser(), tokens, space=TOY.space, schedule=Linear(), estimator="exact", seed=0
    )
    assert torch.allclose(bound.nats, exact, atol=1e-12)


def test_the_bound_is_conditional_on_any_given_subset():
    tokens = torch.tensor([[0, 2, 1, 1]])
    may_hide = torch.tensor([[True, False, True, False]])
    bound = nll_bound(
        TOY.denoiser(),
        tokens,
        space=TOY.space,
        schedule=Linear(),
        estimator="exact",
        seed=0,
        may_hide=may_hide,
    )
    conditional = TOY.joint[0, 2, 1, 1] / TOY.joint[:, 2, :, 1].sum()
    assert float(bound.nats[0]) == pytest.approx(-math.log(float(conditional)), abs=1e-12)


@every_schedule
@pytest.mark.parametrize("estimator", ["any_order", "time"])
def test_a_uniform_denoiser_scores_the_log_of_the_permitted_ids(name, estimator):
    tokens = torch.tensor([[0, 1, 3, 4, 6, 6]]).expand(4, 6)
    bound = nll_bound(
        uniform_denoiser(SPACE),
        tokens,
        space=SPACE,
        schedule=named_schedule(name),
        estimator=estimator,
        draws=500,
        seed=1,
    )
    expected = 6 * math.log(SPACE.permitted)
    assert (abs(bound.nats - expected) <= 4.9 * bound.stderr + 1e-9).all()


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


def test_places_that_are_not_hidden_cost_nothing_whatever_the_logits():
    tokens = torch.tensor([[0, 1, 3]])
    noisy = torch.tensor([[0, 2, 3]])
    logits = torch.full((1, 3, 7), float("nan"))
    logits[0, 1] = 0
    assert token_nll(logits, tokens, noisy, space=SPACE)[0, [0, 2]].tolist() == [0, 0]


def test_given_places_and_padding_are_not_hidden_scored_or_counted():
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


def test_a_time_conditioned_denoiser_is_refused_where_the_estimator_has_no_time():
    class Timed(HashDenoiser):
        uses_time = True

    for estimator in ("any_order", "exact", "left_to_right"):
        with pytest.raises(ConfigError, match="time"):
            nll_bound(
                Timed(SPACE),
                torch.ones(1, 3, dtype=torch.int64),
                space=SPACE,
                schedule=Linear(),
                estimator=estimator,
                seed=0,
            )


@pytest.mark.parametrize("options", [
    {"estimator": "exactly"}, {"draws": 1}, {"estimator": "exact", "length": 17},
])  # fmt: skip
def test_bounds_that_cannot_be_meant_are_refused(options):
    tokens = torch.ones(1, options.pop("length", 4), dtype=torch.int64)
    with pytest.raises(ConfigError):
        nll_bound(
            uniform_denoiser(SPACE), tokens, space=SPACE, schedule=Linear(), seed=0, **options
        )


@pytest.mark.parametrize("options", [{"weight": "elbo"}, {"label_smoothing": 1.0}])
def test_losses_that_cannot_be_meant_are_refused(options):
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


class Wrapped(nn.Module):
    """A denoiser whose call is another's, and which shows neither features nor a head."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.uses_time = inner, inner.uses_time

    def forward(self, tokens, **rest):
        return self.inner(tokens, **rest)


BACKBONES = {
    "tied": lambda: transformer(vocab_size=9, width=16, depth=1, heads=2, tie=True),
    "time and label": lambda: transformer(
        vocab_size=9, width=16, depth=1, heads=2, uses_time=True, classes=3
    ),
    "bits": lambda: bit_transformer(
        grid=[2, 3], bits=6, groups=2, width=16, depth=1, heads=2, mask_vector=True
    ),
}


def small_model(name):
    torch.manual_seed(0)
    model = BACKBONES[name]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.4)
    return model


def loss_of(model, inner=None, **options):
    """The loss on a small batch that `inner` can read, and the batch's tokens."""
    config = (inner or model).config
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, config.vocab_size - 1, (4, 12), generator=generator)
    options = {
        "space": TokenSpace(config.vocab_size, config.mask_id, never=(0,)),
        "schedule": Linear(), "seed": 3, "label_smoothing": 0.1, **options,
    }  # fmt: skip
    if getattr(config, "classes", 0):
        options["cond"] = {"label": torch.tensor([0, 1, 2, 3])}
    return masked_diffusion_loss(model, tokens, **options)


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_features_and_a_head_give_the_loss_and_the_gradients_of_whole_logits(name):
    model = small_model(name)
    vocab = model.config.vocab_size
    parts = TokenSpace(vocab, model.config.mask_id, parts=((6, 1, vocab), (6, 2, vocab - 1)))
    for options in ({}, {"space": parts}, {"weight": "uniform", "label_smoothing": 0.0}):
        ours = loss_of(model, **options)
        theirs = loss_of(Wrapped(model), model, **options)
        assert bool(ours.hidden.any())
        torch.testing.assert_close(ours.value, theirs.value, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours.nll, theirs.nll, rtol=1e-12, atol=0)
        parameters = list(model.parameters())
        mine, others = (
            torch.autograd.grad(each.value, parameters, materialize_grads=True)
            for each in (ours, theirs)
        )
        torch.testing.assert_close(mine, others, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_the_head_sees_the_hidden_rows_alone_and_never_whole_logits(monkeypatch, name):
    model, seen = small_model(name), []
    logits = MatrixHead.logits

    def counted(self, part):
        found = logits(self, part)
        seen.append(len(found))
        return found

    def refuse(self, x):
        raise AssertionError("the head was called as a whole")

    monkeypatch.setattr(MatrixHead, "logits", counted)
    monkeypatch.setattr(type(model.head), "forward", refuse)
    loss = loss_of(model)
    loss.value.backward()
    assert sum(seen) == int(loss.hidden.sum())


def test_the_bound_by_features_and_a_head_is_that_by_whole_logits():
    model = small_model("tied")
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    options = {"space": TokenSpace(9, mask_id=9), "schedule": Linear(), "seed": 0}
    for estimator in ("exact", "time"):
        ours, theirs = (
            nll_bound(each, tokens, estimator=estimator, draws=4, **options)
            for each in (model, Wrapped(model))
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class Sharpened(TransformerForMaskedLM):
    """A model whose call is no longer its features and its head."""

    def forward(self, tokens, **rest):
        return 2 * super().forward(tokens, **rest)


def test_a_class_or_a_hook_that_changes_the_call_is_not_passed_over():
    model = small_model("tied")
    plain = loss_of(model)
    sharp = Sharpened(model.config).double()
    sharp.load_state_dict(model.state_dict())
    expected = loss_of(Wrapped(sharp), sharp)
    assert not torch.allclose(expected.value, plain.value)
    assert torch.equal(loss_of(sharp).value, expected.value)
    for module in (model, model.head):
        handle = module.register_forward_hook(lambda module, given, logits: 2 * logits)
        assert torch.equal(loss_of(model).value, expected.value)
        handle.remove()
    torch.testing.assert_close(loss_of(model).value, plain.value, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["qkv"], ["qkv", "head"]], ids=["trunk", "head"])
def test_adapters_are_trained_whether_the_wrapper_or_the_model_is_called(targets):
    from peft import LoraConfig, get_peft_model

    base = small_model("time and label")
    before = loss_of(base).value
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    ).double()
    expected = loss_of(Wrapped(adapted), base)
    assert not torch.allclose(expected.value, before)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected.value, trained)
    for model in (adapted, base):
        found = loss_of(model, base)
        torch.testing.assert_close(found.value, expected.value, rtol=1e-12, atol=0)
        mine = torch.autograd.grad(found.value, trained)
        torch.testing.assert_close(mine, gradients, rtol=1e-10, atol=1e-12)


def test_distributed_gradients_are_those_of_one_process(tmp_path):
    """The objective is wrapped as a whole, so that the model inside is itself."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    class Objective(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self):
            return loss_of(self.model).value

    model = small_model("tied")
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss_of(model).value, parameters)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        DistributedDataParallel(Objective(model))().backward()
    finally:
        distributed.destroy_process_group()
    found = [parameter.grad for parameter in parameters]
    torch.testing.assert_close(found, list(expected), rtol=1e-12, atol=1e-14)
