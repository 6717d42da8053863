"""Samplers that take tokens back: their own laws, enumerated, and what they never do."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch
from scipy import stats
from toys import HashDenoiser, make_toy

from mdiff import from_logits, sample
from mdiff.errors import ConfigError, DataError
from mdiff.find import find
from mdiff.samplers.remdm import loop_shares
from mdiff.sampling import LastWriting, grid_of_shares, largest_sigma, stays_hidden
from mdiff.schedule import Cosine, Linear, Polynomial
from mdiff.tokens import TokenSpace

FALSE_ALARM = 1e-6 / 64  # family-wise 1e-6 over at most 64 statistical tests in this file
IDEAL = make_toy(3, 3, seed=5)
# The same canvases with conditionals of no joint: a written token is not certain to stand.
generator = torch.Generator().manual_seed(6)
TABLE = torch.randn(IDEAL.table.shape, generator=generator, dtype=torch.float64).log_softmax(-1)
MASK, LENGTH = IDEAL.vocab, IDEAL.length
REVISING = ["edit", "gibbs", "path_planning", "psi", "remdm"]


def denoiser(table=TABLE):
    return from_logits(lambda tokens: table[IDEAL.number(tokens)])


@pytest.fixture(params=[40_000, pytest.param(200_000, marks=pytest.mark.slow)], ids=str)
def masks(request):
    """As many canvases of masks as there are samples of a law."""
    return torch.full((request.param, LENGTH), MASK)


def run(name, canvas, *, table=TABLE, **options):
    return sample(denoiser(table), canvas, space=IDEAL.space, sampler=name, seed=3, **options)


def agrees(tokens, law):
    """The p-value of samples (N, L) under `law`, {canvas: probability}; rare ones are pooled."""
    assert abs(sum(law.values()) - 1) < 1e-9
    number = IDEAL.number(tokens)
    found = torch.bincount(number, minlength=len(IDEAL.table)).double()
    expected = torch.zeros_like(found)
    for canvas, chance in law.items():
        expected[int(IDEAL.number(torch.tensor([canvas])))] += chance * len(tokens)
    if found[expected == 0].sum() > 0:
        return 0.0
    rare = (expected < 5) & (expected > 0)
    found = torch.cat([found[expected >= 5], found[rare].sum()[None]])
    expected = torch.cat([expected[expected >= 5], expected[rare].sum()[None]])
    keep = expected > 0
    statistic = ((found - expected)[keep] ** 2 / expected[keep]).sum()
    return float(stats.chi2.sf(float(statistic), int(keep.sum()) - 1))


def p_of(canvas, table=TABLE):
    return table[int(IDEAL.number(torch.tensor([canvas])))].exp().tolist()


def draws(canvas, positions, table=TABLE):
    """[(probability, {position: token})] of independent draws at the positions."""
    p = p_of(canvas, table)
    for tokens in itertools.product(range(MASK), repeat=len(positions)):
        chance = 1.0
        for position, token in zip(positions, tokens):
            chance *= p[position][token]
        yield chance, dict(zip(positions, tokens))


def chain(shares, sigma, table=TABLE, begin=None):
    """The law of the hiding chain; `sigma(m_t, m_s, canvas, memory)` is one number a position.

    `memory` are the probabilities at the last writing, which are part of the state.
    """
    law = {(begin or (MASK,) * LENGTH, (1.0,) * LENGTH): 1.0}
    for m_t, m_s in itertools.pairwise(shares):
        following = defaultdict(float)
        for (canvas, memory), chance in law.items():
            hides = sigma(m_t, m_s, canvas, memory)
            p = p_of(canvas, table)
            options = []
            for i, token in enumerate(canvas):
                if token == MASK:
                    stays = float(stays_hidden(m_t, m_s, hides[i]))
                    each = [((v, p[i][v]), (1 - stays) * p[i][v]) for v in range(MASK)]
                    options.append([((MASK, 1.0), stays), *each])
                else:
                    kept = ((token, memory[i]), 1 - hides[i])
                    options.append([kept, ((MASK, 1.0), hides[i])])
            for each in itertools.product(*options):
                share = chance
                for _, part in each:
                    share *= part
                if share > 0:
                    now = tuple(token for (token, _), _ in each)
                    # The memory matters to `conf` alone; elsewhere it only splits states.
                    kept = tuple(round(q, 12) for (_, q), _ in each)
                    following[now, kept if sigma.remembers else (1.0,) * LENGTH] += share
        law = following
    total = defaultdict(float)
    for (canvas, _), chance in law.items():
        total[canvas] += chance
    return dict(total)


def everywhere(rule):
    def sigma(m_t, m_s, canvas, memory):
        return [rule(m_t, m_s)] * LENGTH

    sigma.remembers = False
    return sigma


def by_confidence(m_t, m_s, canvas, memory):
    most = largest_sigma(m_t, m_s)
    weight = [0.0 if c == MASK else float(torch.tensor(-q).exp()) for c, q in zip(canvas, memory)]
    return [most * w / max(sum(weight), 1e-300) for w in weight]


by_confidence.remembers = True


RULES = {
    "cap": ({"rule": "cap", "eta": 0.3}, everywhere(lambda t, s: min(0.3, largest_sigma(t, s)))),
    "rescale": (
        {"rule": "rescale", "eta": 0.5}, everywhere(lambda t, s: 0.5 * largest_sigma(t, s)),
    ),
    "forward_backward": (
        {"rule": "forward_backward"},
        everywhere(lambda t, s: min(largest_sigma(t, s), (t - s) / (1 - t) if t < 1 else 1.0)),
    ),
    "conf": ({"rule": "conf"}, by_confidence),
}  # fmt: skip


@pytest.mark.parametrize("schedule", [Linear(), Polynomial(2.0)], ids=str)
@pytest.mark.parametrize("case", RULES)
def test_remdm_has_its_own_enumerated_law(case, schedule, masks):
    options, sigma = RULES[case]
    steps = 3 if case == "conf" else 6
    law = chain(grid_of_shares(schedule, steps, None, None).tolist(), sigma)
    made = run("remdm", masks, steps=steps, schedule=schedule, **options)
    assert agrees(made.tokens, law) > FALSE_ALARM
    assert not made.log_prob_is_exact


def test_remdm_without_its_rule_is_rejected_against_the_law_with_it(masks):
    law = chain(grid_of_shares(Linear(), 6, None, None).tolist(), RULES["rescale"][1])
    for mutant in ({"rule": "rescale", "eta": 0.25}, {"rule": "cap", "eta": 0.0}):
        assert agrees(run("remdm", masks, steps=6, **mutant).tokens, law) < FALSE_ALARM


def test_the_loop_has_its_own_enumerated_law_and_never_hides_more_than_there_is(masks):
    shares = loop_shares(12).tolist()
    assert shares[0] == 1
    assert shares[-1] == 0
    law = chain(shares, everywhere(lambda t, s: min(0.6, largest_sigma(t, s)) if t == s else 0.0))
    assert agrees(run("remdm", masks, steps=12, rule="loop", eta=0.6).tokens, law) > FALSE_ALARM
    # The published code lets sigma exceed its limit: a chance of -4.4 at eta 0.6.
    assert float(stays_hidden(0.1, 0.1, 0.6)) < 0
    assert float(stays_hidden(0.1, 0.1, min(0.6, largest_sigma(0.1, 0.1)))) >= 0


@pytest.mark.parametrize("kappa", [0.0, 0.5, 0.9])
def test_psi_has_its_own_enumerated_law(kappa, masks):
    shares = grid_of_shares(Cosine(), 5, None, None).tolist()
    law = chain(shares, everywhere(lambda t, s: (1 - kappa) * s))
    assert (
        agrees(run("psi", masks, steps=5, schedule=Cosine(), kappa=kappa).tokens, law) > FALSE_ALARM
    )


def test_a_finished_canvas_is_hidden_to_the_share_of_its_start(masks):
    canvas = torch.tensor([[0, 2, 1]]).repeat(len(masks), 1)
    given = torch.tensor([[False, True, False]]).repeat(len(masks), 1)
    states = find("samplers", "remdm")(
        denoiser(), canvas, space=IDEAL.space, seed=3, given=given, steps=4, start=0.4, eta=0.2,
    )  # fmt: skip
    first = next(states)
    share = first.hidden_again.double().mean(0).tolist()
    assert share[1] == 0
    assert abs(share[0] - 0.4) < 0.01
    assert abs(share[2] - 0.4) < 0.01
    *_, last = states
    assert (last.tokens[:, 1] == 2).all()
    assert (last.tokens < MASK).all()


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Polynomial(3.0)], ids=str)
def test_marginals_are_those_of_masking_whatever_is_hidden_again(schedule):
    """With a prediction that is certain: x_0 with 1 - m, the mask with m, to 1e-10."""
    rules = [
        lambda t, s: 0.0,
        lambda t, s: min(0.02, largest_sigma(t, s)),
        lambda t, s: 0.7 * largest_sigma(t, s),
        largest_sigma,
        lambda t, s: min(largest_sigma(t, s), (t - s) / (1 - t) if t < 1 else 1.0),
        *(lambda t, s, k=k: (1 - k) * s for k in (0.0, 0.3, 1.0)),
    ]
    for rule, shares in itertools.product(
        rules, [grid_of_shares(schedule, 37, None, None), loop_shares(200)]
    ):
        hidden = 1.0
        for m_t, m_s in itertools.pairwise(shares.tolist()):
            sigma = rule(m_t, m_s)
            stays = float(stays_hidden(m_t, m_s, sigma)) if m_t else 1.0
            assert -1e-12 < stays < 1 + 1e-12
            hidden = hidden * stays + (1 - hidden) * sigma
            assert abs(hidden - m_s) < 1e-10


def test_without_hiding_the_draws_are_those_of_ancestral():
    canvas = torch.full((64, 12), 5)
    space = TokenSpace(11, mask_id=5, never=(0, 9))
    options = {"space": space, "seed": 2, "steps": 23, "schedule": Cosine()}
    expected = sample(HashDenoiser(space), canvas, sampler="ancestral", **options)
    for name, setting in (
        ("remdm", {"eta": 0.0}), ("remdm", {"eta": 0, "rule": "rescale"}), ("psi", {"kappa": 1.0}),
    ):  # fmt: skip
        made = sample(HashDenoiser(space), canvas, sampler=name, **options, **setting)
        assert torch.equal(made.tokens, expected.tokens)
        assert torch.equal(made.calls, expected.calls)
        assert torch.equal(made.log_prob, expected.log_prob)


def planned(steps, score, kept):
    """The law of path planning: {canvas: probability}."""
    law = {(MASK,) * LENGTH: 1.0}
    for step in range(steps):
        following = defaultdict(float)
        left = (1 - kept) * (steps - 1 - step) / steps
        count = LENGTH - int(LENGTH * left + 1e-9)
        for canvas, chance in law.items():
            p = p_of(canvas)
            for share, drawn in draws(canvas, range(LENGTH)):
                value = [
                    p[i][canvas[i] if score == "standing" and canvas[i] != MASK else drawn[i]]
                    for i in range(LENGTH)
                ]
                best = sorted(range(LENGTH), key=lambda i: (-value[i], i))[:count]
                after = [MASK] * LENGTH
                for i in best:
                    after[i] = drawn[i] if canvas[i] == MASK else canvas[i]
                following[tuple(after)] += chance * share
        law = following
    return dict(law)


@pytest.mark.parametrize("kept", [0.0, 0.2])
@pytest.mark.parametrize("score", ["standing", "drawn"])
def test_path_planning_has_its_own_enumerated_law(score, kept, masks):
    law = planned(4, score, kept)
    made = run("path_planning", masks, steps=4, score=score, kept=kept)
    assert agrees(made.tokens, law) > FALSE_ALARM
    swapped = {"standing": "drawn", "drawn": "standing"}[score]
    other = run("path_planning", masks, steps=4, score=swapped, kept=kept)
    assert agrees(other.tokens, law) < FALSE_ALARM


def edited(threshold, edit_threshold, least, rounds_after):
    """The law of `edit` over finished canvases, with the calls after the last mask as memory."""
    law, done = {((MASK,) * LENGTH, 0): 1.0}, defaultdict(float)
    while law:
        following = defaultdict(float)
        for (canvas, after), chance in law.items():
            p = p_of(canvas)
            hidden = [i for i in range(LENGTH) if canvas[i] == MASK]
            for share, drawn in draws(canvas, range(LENGTH)):
                sure = [i for i in hidden if p[i][drawn[i]] > threshold]
                if len(sure) < least:
                    sure = sorted(hidden, key=lambda i: (-p[i][drawn[i]], i))[:least]
                changed = [
                    i for i in range(LENGTH)
                    if i not in hidden and drawn[i] != canvas[i] and p[i][drawn[i]] > edit_threshold
                ]  # fmt: skip
                now = list(canvas)
                for i in (*sure, *changed):
                    now[i] = drawn[i]
                later = after + (not hidden)
                full = MASK not in now
                if (not hidden and not changed) or (full and later >= rounds_after):
                    done[tuple(now)] += chance * share
                else:
                    following[tuple(now), later] += chance * share
        law = following
    return dict(done)


@pytest.mark.parametrize("setting", [(0.5, 0.4, 1, 4), (0.3, 0.6, 2, 2), (1.5, 0.3, 1, 3),
                                     (0.4, 1.5, 1, 16)], ids=str)  # fmt: skip
def test_edit_has_its_own_enumerated_law(setting, masks):
    threshold, edit_threshold, least, rounds_after = setting
    made = run("edit", masks, threshold=threshold, edit_threshold=edit_threshold, least=least,
               rounds_after=rounds_after)  # fmt: skip
    assert agrees(made.tokens, edited(*setting)) > FALSE_ALARM
    assert int(made.calls.max()) <= LENGTH + rounds_after


def gibbs_matrix(table, choose):
    """The transitions of one move over finished canvases; `choose` gives [(chance, positions)]."""
    finished = list(itertools.product(range(MASK), repeat=LENGTH))
    number = {canvas: n for n, canvas in enumerate(finished)}
    matrix = torch.zeros(len(finished), len(finished), dtype=torch.float64)
    for canvas in finished:
        for chance, positions in choose(canvas, table):
            hidden = tuple(MASK if i in positions else v for i, v in enumerate(canvas))
            for share, drawn in draws(hidden, positions, table):
                after = tuple(drawn.get(i, v) for i, v in enumerate(canvas))
                matrix[number[canvas], number[after]] += chance * share
    return finished, matrix


def one_at_random(canvas, table):
    return [(1 / LENGTH, [i]) for i in range(LENGTH)]


def two_at_once(canvas, table):
    pairs = list(itertools.combinations(range(LENGTH), 2))
    return [(1 / len(pairs), list(pair)) for pair in pairs]


def smallest_margin(canvas, table):
    margins = []
    for i in range(LENGTH):
        hidden = tuple(MASK if j == i else v for j, v in enumerate(canvas))
        best = sorted(p_of(hidden, table)[i], reverse=True)
        margins.append(best[0] - best[1])
    return [(1.0, [margins.index(min(margins))])]


def test_gibbs_keeps_the_joint_and_its_relatives_do_not():
    p = IDEAL.joint.flatten()
    moved = {
        rule.__name__: float((p @ gibbs_matrix(IDEAL.table, rule)[1] - p).abs().sum() / 2)
        for rule in (one_at_random, two_at_once, smallest_margin)
    }
    assert moved["one_at_random"] < 1e-12
    assert moved["two_at_once"] > 0.01
    assert moved["smallest_margin"] > 0.01


def test_gibbs_has_its_own_enumerated_law_from_a_finished_canvas(masks):
    finished, matrix = gibbs_matrix(TABLE, one_at_random)
    begin = (2, 0, 1)
    law = torch.zeros(len(finished), dtype=torch.float64)
    law[finished.index(begin)] = 1
    law = law @ torch.linalg.matrix_power(matrix, 2 * LENGTH)
    canvas = torch.tensor([begin]).repeat(len(masks), 1)
    given = torch.zeros_like(canvas, dtype=torch.bool)
    made = run("gibbs", canvas, given=given, sweeps=2)
    assert agrees(made.tokens, dict(zip(finished, law.tolist()))) > FALSE_ALARM
    assert (made.calls == 2 * LENGTH).all()
    one = run("gibbs", canvas, given=given, sweeps=1)
    assert agrees(one.tokens, dict(zip(finished, law.tolist()))) < FALSE_ALARM


def test_gibbs_from_masks_begins_with_the_exact_law_and_keeps_it(masks):
    law = dict(zip(itertools.product(range(MASK), repeat=LENGTH), IDEAL.joint.flatten().tolist()))
    made = run("gibbs", masks, table=IDEAL.table, sweeps=1)
    assert agrees(made.tokens, law) > FALSE_ALARM
    assert (made.calls == 2 * LENGTH).all()


def budgeted(toy, total, per_call=None):
    """The law of `budget` on a toy, its mean of nats spent under the joint, and the largest."""
    length, mask = toy.length, toy.vocab
    p, entropy = toy.table.exp(), -(toy.table.exp() * toy.table.clamp(min=-700)).sum(-1)
    base = [(mask + 1) ** (length - 1 - i) for i in range(length)]
    law, done = {((mask,) * length, 0.0): 1.0}, {}
    while law:
        following = defaultdict(float)
        for (canvas, spent), chance in law.items():
            number = sum(v * b for v, b in zip(canvas, base))
            hidden = [i for i in range(length) if canvas[i] == mask]
            ranked = sorted(hidden, key=lambda i: (float(entropy[number, i]), i))
            cost, count, price = 0.0, 1, 0.0
            for k in range(1, len(ranked) + 1):
                done_by = length - len(hidden) + k
                if per_call is None:
                    fits = spent + cost <= total * done_by / length
                else:
                    fits = cost <= per_call
                if fits:
                    count, price = k, cost
                cost += float(entropy[number, ranked[k - 1]])
            chosen = ranked[:count]
            for tokens in itertools.product(range(mask), repeat=count):
                share, after = chance, list(canvas)
                for i, v in zip(chosen, tokens):
                    share, after[i] = share * float(p[number, i, v]), v
                if mask in after:
                    following[tuple(after), spent + price] += share
                else:
                    done[tuple(after)] = (done.get(tuple(after), (0.0, 0.0))[0] + share,
                                          spent + price)  # fmt: skip
        law = following
    return done


@pytest.mark.parametrize("options", [{"nats": 1.0}, {"nats": 0.0}, {"nats_per_call": 0.7}], ids=str)
def test_budget_has_its_own_enumerated_law_and_says_what_it_spent(options, masks):
    law = budgeted(IDEAL, options.get("nats"), options.get("nats_per_call"))
    made = run("budget", masks, table=IDEAL.table, **options)
    assert (
        agrees(made.tokens, {canvas: chance for canvas, (chance, _) in law.items()}) > FALSE_ALARM
    )
    for canvas, (_, spent) in law.items():
        rows = (made.tokens == torch.tensor(canvas)).all(1)
        assert (made.nats_spent[rows] - spent).abs().max() < 1e-5
    if "nats" in options:
        assert float(made.nats_spent.max()) <= options["nats"] + 1e-5


def divergences(toys, total):
    """(KL(joint, law), the mean of nats spent under the joint, the total) of each toy."""
    for seed in toys:
        toy = make_toy(2, 3, seed=seed, sharpness=1 + seed % 4)
        law = budgeted(toy, total)
        p = {c: float(toy.joint[c]) for c in itertools.product(range(2), repeat=3)}
        kl = sum(q * (torch.tensor(q / law[c][0]).log()).item() for c, q in p.items() if q > 0)
        yield kl, sum(q * law[c][1] for c, q in p.items()), total


def bound_holds(toys):
    tight = 0
    for total in (0.0, 0.3, 1.0, 5.0):
        for kl, spent, most in divergences(toys, total):
            assert -1e-9 < kl <= spent + 1e-9
            assert spent <= most + 1e-9
            tight += kl > 0.3 * spent > 0.01
    return tight


def test_the_divergence_is_at_most_the_nats_spent():
    assert bound_holds(range(20)) > 0
    # Nothing is spent at one position a call, and then the law is exact.
    assert all(abs(kl) < 1e-9 and spent == 0 for kl, spent, _ in divergences(range(5), 0.0))


@pytest.mark.slow
def test_the_divergence_is_at_most_the_nats_spent_on_many_toys():
    assert bound_holds(range(1000)) > 100


class Adversary:
    """Another law at every call: what was sure is not, and something else is."""

    uses_time = False

    def __init__(self):
        self.calls = 0

    def __call__(self, tokens, *, at=None, valid=None, documents=None, t=None, cond=None,
                 cache=None):  # fmt: skip
        self.calls += 1
        logits = torch.full((*tokens.shape, 11), -20.0)
        logits[..., self.calls % 11] = 20.0
        return logits if at is None else logits[at]


@pytest.mark.parametrize(("name", "options", "most"), [
    ("remdm", {"steps": 40, "rule": "rescale", "eta": 1.0}, 40),
    ("remdm", {"steps": 40, "rule": "conf"}, 40),
    ("psi", {"steps": 40, "kappa": 0.0}, 40),
    ("path_planning", {"steps": 17}, 17),
    ("edit", {"threshold": 0.0, "edit_threshold": 0.0}, 12 + 16),
    ("edit", {"threshold": 2.0, "edit_threshold": 0.5, "rounds_after": 3}, 12 + 3),
    ("gibbs", {"sweeps": 2.0}, 12 + 24),
])  # fmt: skip
def test_it_ends_within_its_calls_whatever_the_denoiser(name, options, most):
    space = TokenSpace(11, mask_id=11)
    made = sample(Adversary(), torch.full((3, 12), 11), space=space, sampler=name, **options)
    assert int(made.rounds.max()) <= most
    assert (made.tokens < 11).all()


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("name", REVISING)
def test_a_finished_text_is_revised_where_it_is_not_given(name, blocks):
    space = TokenSpace(11, mask_id=5, never=(0, 9))
    canvas = torch.randint(6, 9, (6, 12), generator=torch.Generator().manual_seed(1))
    given = torch.rand(6, 12, generator=torch.Generator().manual_seed(2)) < 0.4
    options = {"start": 0.5} if name in ("remdm", "psi") else {}
    options |= {"kept": 0.3} if name == "path_planning" else {}
    options |= {"edit_threshold": 0.1} if name == "edit" else {}
    options |= {"block_length": 4} if blocks else {}
    tally, changed = LastWriting(canvas), torch.zeros_like(given)
    bound = find("samplers", "blocks" if blocks else name)
    if blocks:
        options["inner"] = find("samplers", name)
    before = canvas
    for state in bound(HashDenoiser(space), canvas, space=space, seed=1, given=given, **options):
        for moved in (state.revealed, state.rewritten, state.hidden_again):
            assert not (moved & given).any()
        assert (state.tokens[given] == canvas[given]).all()
        assert (state.rewritten <= state.revealed).all()
        assert not (state.revealed & state.hidden_again).any()
        assert ((before != 5) & (state.tokens == 5) == state.hidden_again).all()
        assert ((before != 5) & (state.tokens != 5) & (state.tokens != before)
                == state.rewritten).all()  # fmt: skip
        tally.add(state)
        changed |= state.tokens != canvas
        before = state.tokens
    assert changed.any()
    assert ((tally.times > 0) == (tally.step > 0)).all()
    assert (tally.times[given] == 0).all()
    assert not torch.isin(before[~given], torch.tensor([0, 5, 9])).any()


@pytest.mark.parametrize("name", REVISING)
def test_without_a_free_position_there_is_no_state(name):
    canvas = torch.ones(2, 4, dtype=torch.int64)
    given = torch.ones_like(canvas, dtype=torch.bool)
    space = TokenSpace(11, mask_id=5)
    states = find("samplers", name)(HashDenoiser(space), canvas, space=space, given=given)
    assert list(states) == []


def test_a_given_mask_and_a_given_of_another_shape_are_refused():
    space = TokenSpace(11, mask_id=5)
    canvas = torch.full((2, 4), 5)
    for given, match in (
        (torch.ones(2, 4, dtype=torch.bool), "row 0, position 0 holds the mask but is given"),
        (torch.ones(2, 3, dtype=torch.bool), r"given \(2, 3\)"),
        (torch.ones(2, 4), "bool"),
        ([[True]], "expected"),
    ):
        with pytest.raises(DataError, match=match):
            sample(HashDenoiser(space), canvas, space=space, given=given)


def test_given_none_is_all_that_is_not_hidden_for_every_sampler():
    space = TokenSpace(11, mask_id=5)
    canvas = torch.full((3, 8), 5)
    canvas[:, 2:4] = 7
    for name in ("first_hitting", "confidence", "halton", "blocks", "amused", "remdm", "gibbs"):
        plain = sample(HashDenoiser(space), canvas, space=space, sampler=name, seed=4)
        named = sample(HashDenoiser(space), canvas, space=space, sampler=name, seed=4,
                       given=canvas != 5)  # fmt: skip
        assert torch.equal(plain.tokens, named.tokens)
        assert torch.equal(plain.calls, named.calls)


def test_the_log_probability_is_said_to_be_exact_only_where_it_is():
    canvas = torch.full((5, LENGTH), MASK)
    for name, options, exact in (
        ("first_hitting", {}, True), ("any_order", {}, True), ("ancestral", {"steps": 4}, True),
        ("blocks", {"block_length": 2}, True), ("first_hitting", {"top_p": 1.0}, True),
        ("first_hitting", {"temperature": 0.5}, False), ("first_hitting", {"top_k": 2}, False),
        ("first_hitting", {"min_p": 0.1}, False), ("confidence", {}, False),
        ("remdm", {"rule": "rescale", "eta": 0.9}, False), ("gibbs", {}, False),
    ):  # fmt: skip
        made = run(name, canvas, **options)
        assert made.log_prob_is_exact is exact, name
    order = run("any_order", canvas, table=IDEAL.table)
    joint = IDEAL.joint[tuple(order.tokens.T)].log()
    assert (order.log_prob - joint).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "options"), [
    ("remdm", {"rule": "cpa"}), ("remdm", {"eta": 1.5}), ("remdm", {"eta": -0.1}),
    ("remdm", {"rule": "conf", "eta": 0.1}), ("remdm", {"steps": 0}), ("remdm", {"start": 0.0}),
    ("remdm", {"rule": "loop", "start": 0.5}), ("psi", {"kappa": 1.01}), ("psi", {"kappa": -1.0}),
    ("psi", {"start": 1.5}), ("path_planning", {"score": "standign"}),
    ("path_planning", {"kept": 1.0}), ("path_planning", {"steps": 0}),
    ("edit", {"threshold": -0.1}), ("edit", {"edit_threshold": float("nan")}),
    ("edit", {"least": 0}), ("edit", {"rounds_after": -1}), ("gibbs", {"sweeps": -1.0}),
    ("gibbs", {"sweeps": float("inf")}), ("budget", {"nats": -1.0}),
    ("budget", {"nats": 1.0, "nats_per_call": 1.0}), ("budget", {"nats_per_call": float("nan")}),
])  # fmt: skip
def test_options_out_of_range_are_refused_before_any_call(name, options):
    space = TokenSpace(11, mask_id=5)
    model = HashDenoiser(space)
    with pytest.raises(ConfigError):
        sample(model, torch.full((2, 4), 5), space=space, sampler=name, **options)
    assert model.calls == 0
