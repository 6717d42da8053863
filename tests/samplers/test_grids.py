"""Samplers on grids: orders and counts, against published tables and in general."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest
import torch
from folders import GOLDEN as GOLDEN
from toys import HashDenoiser

from mdiff import sample
from mdiff.errors import ConfigError
from mdiff.find import find, names
from mdiff.ops import draw
from mdiff.samplers.confidence import confidence
from mdiff.samplers.halton import CURVES, curve_counts, halton, halton_order, revealed_by
from mdiff.sampling import reveal_counts, schedule_counts
from mdiff.schedule import Arccos, Cosine, Exponential, Linear
from mdiff.tokens import TokenSpace

GRIDS = json.loads((GOLDEN / "grids.json").read_text())
MASKS_LEFT = json.loads((GOLDEN / "pure_functions.json").read_text())["maskgit_masks_left"]
SPACE = TokenSpace(11, mask_id=11, never=(3,))


def hidden(*shape):
    return torch.full(shape, SPACE.mask_id)


# The order of a grid.


@pytest.mark.parametrize("side", ["8", "16", "24", "32"])
def test_halton_orders_are_the_published_ones(side):
    order = halton_order((int(side), int(side)))
    assert order.tolist() == GRIDS["halton_orders"]["orders"][side]


@pytest.mark.parametrize("grid", [
    (64, 64), (1, 1), (1, 7), (9, 1), (3, 5), (27, 16), (81, 2), (100, 37),
], ids=str)  # fmt: skip
def test_a_halton_order_visits_every_cell_of_any_grid_once(grid):
    assert halton_order(grid).sort().values.tolist() == list(range(grid[0] * grid[1]))


def test_ten_thousand_points_would_not_have_covered_64_by_64():
    """So that the test above can fail: some cells are first met by a later point."""

    def inverse(index, base):
        return sum((index // base**k % base) / base ** (k + 1) for k in range(15))

    met = {(int(64 * inverse(i, 2)), int(64 * inverse(i, 3))) for i in range(1, 10_001)}
    assert len(met) == 4090


def test_early_cells_are_spread_and_no_quarter_waits():
    """Of any first n cells of an even grid each quarter has n / 4, to within a few cells."""
    order = halton_order((32, 32))
    quarter = (order // 32 >= 16) * 2 + (order % 32 >= 16).long()
    counts = torch.nn.functional.one_hot(quarter, 4).cumsum(0)
    even = torch.arange(1, 1025)[:, None] / 4
    assert float((counts - even).abs().max()) < 8


def order_of_reveal(states):
    """The position revealed at each step, (steps, B)."""
    return torch.stack([state.revealed.long().argmax(1) for state in states])


def run(canvas, **options):
    return list(halton(HashDenoiser(SPACE), canvas, space=SPACE, **options))


def test_halton_reveals_in_its_order_and_passes_over_given_positions():
    order = halton_order((3, 4)).tolist()
    canvas = hidden(1, 12)
    assert order_of_reveal(run(canvas, grid=(3, 4)))[:, 0].tolist() == order
    assert order_of_reveal(run(canvas))[:, 0].tolist() == order
    canvas[0, order[::2]] = 1
    assert order_of_reveal(run(canvas))[:, 0].tolist() == order[1::2]


def test_positions_beyond_the_grid_follow_in_canvas_order():
    found = order_of_reveal(run(hidden(1, 9), grid=(2, 3)))[:, 0].tolist()
    assert found == [*halton_order((2, 3)).tolist(), 6, 7, 8]


def test_a_rolled_order_is_the_same_cycle_from_each_samples_own_start():
    cycle = halton_order((4, 4)).tolist()
    rolled = order_of_reveal(run(hidden(40, 16), roll=True)).T.tolist()
    starts = [cycle.index(row[0]) for row in rolled]
    assert all(row == cycle[s:] + cycle[:s] for row, s in zip(rolled, starts))
    assert len(set(starts)) > 8
    beyond = order_of_reveal(run(hidden(6, 18), grid=(4, 4), roll=True))
    assert (beyond[-2:] == torch.tensor([[16], [17]])).all()


@pytest.mark.parametrize("grid", [(3, 5), (0, 12), (12,), (3.0, 4), "34", 12], ids=str)
def test_a_grid_that_does_not_fit_is_refused_before_any_call(grid):
    denoiser = HashDenoiser(SPACE)
    with pytest.raises(ConfigError, match="grid"):
        list(halton(denoiser, hidden(1, 12), space=SPACE, grid=grid))
    assert denoiser.calls == 0


def test_a_row_with_fewer_valid_positions_than_the_grid_is_refused_as_it_is_alone():
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 7:] = False
    with pytest.raises(ConfigError, match="7 positions"):
        run(hidden(2, 12), grid=(3, 4), valid=valid)


# How many a step.


@pytest.mark.parametrize("sampler", ["confidence", "halton"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "arccos", "exponential", "polynomial"])
def test_a_schedule_of_reveal_counts_goes_by_its_name(sampler, schedule):
    canvas = hidden(2, 16)
    out = sample(
        HashDenoiser(SPACE), canvas, space=SPACE, sampler=sampler, schedule=schedule, steps=5
    )
    assert out.calls.tolist() == [5, 5]
    assert (out.tokens != SPACE.mask_id).all()


@pytest.mark.parametrize("curve", ["root", "square"])
def test_root_and_square_counts_go_by_their_name(curve):
    canvas = hidden(3, 16)
    canvas[1, :9] = 1
    canvas[2, 1:] = 1
    found = torch.stack([s.revealed.sum(1) for s in run(canvas, steps=4, counts=curve)], 1)
    expected = {"square": [[1, 3, 5, 7], [1, 1, 1, 4], [1, 0, 0, 0]],
                "root": [[8, 3, 2, 3], [3, 1, 2, 1], [1, 0, 0, 0]]}  # fmt: skip
    assert found.tolist() == expected[curve]


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("begin", [0.0, 0.2])
def test_counts_of_a_curve_are_exact_for_every_sample(curve, begin):
    start = torch.tensor([0, 1, 4, 5, 37, 256])
    for steps in (1, 2, 5, 40):
        table = curve_counts(start, steps=steps, curve=curve, begin=begin)
        assert table.shape == (6, steps)
        assert table.sum(1).tolist() == start.tolist()
        assert (table >= 0).all()
        done = table.cumsum(1)
        assert (done >= torch.arange(1, steps + 1).minimum(start[:, None])).all()
        assert torch.equal(reveal_counts(table, start, steps=steps, schedule=Linear()), table)


def test_a_curve_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="root"):
        curve_counts(torch.tensor([4]), steps=2, curve="rot")
    with pytest.raises(ConfigError, match="steps=0"):
        curve_counts(torch.tensor([4]), steps=0, curve="root")
    with pytest.raises(ConfigError, match="counts"):
        run(hidden(1, 4), steps=2, counts="rot")


@pytest.mark.parametrize("case", GRIDS["halton_confidence_sequence"]["cases"], ids=str)
def test_the_published_sequences_of_revealed_counts_are_ours(case):
    positions = torch.tensor([case["side"] ** 2])
    got = revealed_by(positions, steps=case["steps"], curve=case["mode"])[0]
    assert got.tolist() == case["counts"]


@pytest.mark.parametrize("mode", ["root", "square", "cosine", "arccos", "linear"])
def test_maskbits_masking_ratios_are_ours_after_its_floor(mode):
    """Its fraction still masked is gamma(r), with a floor of 1e-6."""
    golden = GRIDS["maskbit_masking_ratio"]
    r = torch.tensor(golden["progress"], dtype=torch.float64)
    schedules = {"cosine": Cosine(), "arccos": Arccos(), "linear": Linear()}
    ours = [1 - CURVES[mode](r)]
    if mode in schedules:
        ours.append(schedules[mode].mask_prob(1 - r))
    for gamma in ours:
        peer = torch.tensor(golden["modes"][mode], dtype=torch.float64)
        assert torch.allclose(gamma.clamp(1e-6, 1), peer, rtol=0, atol=1e-6)


class Published:
    """MaskGIT's curves gamma(r) as maps of ours, r = 1 - t, clipped as it clips them.

    "exp" is our exponential of rate ln(unknown), which ends a share 1 / unknown short of 1;
    "log" is the inverse function of that.
    """

    def __init__(self, method, unknown):
        self.method, self.unknown = method, unknown

    def mask_prob(self, t):
        return self.gamma(1 - torch.as_tensor(t, dtype=torch.float64)).clamp(1e-6, 1)

    def gamma(self, r):
        exponential = Exponential(math.log(self.unknown))
        short = 1 - 1 / self.unknown
        if self.method == "exp":
            return exponential.mask_prob(1 - r) * short
        if self.method == "log":
            return exponential.time_at(((1 - r) / short).clamp(max=1))
        if self.method == "cosine":
            return Cosine().mask_prob(1 - r)
        power = 1.0 if self.method == "uniform" else float(self.method[3:])
        return 1 - r**power


@pytest.mark.parametrize("method", GRIDS["maskgit_schedule"]["methods"])
def test_maskgits_curves_are_ours_after_its_clip(method):
    golden = GRIDS["maskgit_schedule"]
    t = 1 - torch.tensor(golden["ratio"], dtype=torch.float64)
    for unknown, peer in zip(golden["unknown"], golden["methods"][method]):
        ours = Published(method, unknown).mask_prob(t)
        assert torch.allclose(ours, torch.tensor(peer, dtype=ours.dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["log", "exp"])
def test_maskgit_masks_left_are_ours_where_its_curve_depends_on_the_count(method):
    cases = [c for c in MASKS_LEFT["cases"] if c["method"] == method]
    assert cases
    for case in cases:
        unknown = case["tokens"] - case["known"]
        table = reveal_counts(
            "schedule", torch.tensor([unknown]), steps=case["steps"],
            schedule=Published(method, unknown),
        )[0]  # fmt: skip
        left = (unknown - table.cumsum(0) + table).tolist()
        assert left == case["masked_before_each_step"]


# aMUSEd, by the options of `confidence`.


class Rounded:
    """A curve of ours taken in float32: there cos(pi / 3) falls just below 1/2."""

    def __init__(self, name):
        self.name = name

    def mask_prob(self, t):
        ratio = torch.tensor(1 - t, dtype=torch.float32)
        return 1 - ratio if self.name == "linear" else torch.cos(ratio * math.pi / 2)


@pytest.mark.parametrize("case", GRIDS["amused_masks_left"]["cases"], ids=str)
def test_amused_masks_left_are_counts_of_the_whole_canvas(case):
    start = torch.tensor([case["tokens"] - case["known"]])
    of = torch.tensor([case["tokens"] * case["starting_mask_ratio"]])
    table = schedule_counts(start, steps=case["steps"], schedule=Rounded(case["schedule"]), of=of)
    assert (start - table.cumsum(1))[0].tolist() == case["masks_left_after_step"]
    canvas = hidden(1, case["tokens"])
    canvas[0, : case["known"]] = 1
    ladder = torch.linspace(2, 0, case["steps"])
    assert torch.allclose(ladder, torch.tensor(case["temperatures"]), rtol=0, atol=1e-6)
    left = [
        int((state.tokens == SPACE.mask_id).sum())
        for state in confidence(
            HashDenoiser(SPACE), canvas, space=SPACE, counts=table, noise=ladder
        )
    ]
    assert left == [n for n, revealed in zip(case["masks_left_after_step"], table[0]) if revealed]


@pytest.mark.parametrize("case", GRIDS["amused_step_trace"]["cases"], ids=["one"])
def test_the_amused_step_trace_is_ours(case):
    """No token temperature and no noise: each step's canvas and its draws, exactly."""
    space = TokenSpace(9, mask_id=case["mask_token_id"], never=(8,))
    trace = case["trace"]
    first = torch.tensor(trace[0]["sample"]).flatten(1)
    script = Script([torch.tensor(step["logits"]) for step in trace], vocab=space.vocab_size)
    table = schedule_counts(
        (first == space.mask_id).sum(1), steps=case["steps"], schedule=Rounded("cosine"),
        of=torch.full((len(first),), first.shape[1]),
    )  # fmt: skip
    states = confidence(
        script, first, space=space, temperature=0.0, counts=table,
        noise=torch.zeros(case["steps"]),
    )  # fmt: skip
    before = first
    for logits, step, state in zip(script.steps, trace, states, strict=True):
        assert torch.equal(before, torch.tensor(step["sample"]).flatten(1))
        assert torch.equal(state.tokens, torch.tensor(step["prev_sample"]).flatten(1))
        at = before == space.mask_id
        drawn = draw(logits[at], seed=0, temperature=0.0, never=space.forbidden).tokens
        clean = before.masked_scatter(at, drawn)
        assert torch.equal(clean, torch.tensor(step["pred_original_sample"]).flatten(1))
        before = state.tokens


class Script:
    """A denoiser that gives, call by call, the logits (B, K, h, w) it was handed."""

    uses_time = False

    def __init__(self, steps, *, vocab):
        rows = [step.flatten(2).transpose(1, 2) for step in steps]
        self.steps = [torch.nn.functional.pad(row, (0, vocab - row.shape[2])) for row in rows]
        self.calls = 0

    def __call__(self, tokens, *, at=None, **rest):
        self.calls += 1
        return self.steps[self.calls - 1][at]


def test_noise_by_the_step_is_the_annealed_noise_written_out():
    canvas = hidden(5, 12)
    canvas[1, :5] = 2
    for steps in (1, 4, 6):
        ladder = 4.5 * (1 - torch.arange(1, steps + 1, dtype=torch.float64) / steps)
        runs = [
            sample(
                HashDenoiser(SPACE), canvas, space=SPACE, sampler="confidence", steps=steps,
                noise=noise,
            ).tokens
            for noise in (4.5, ladder, ladder.tolist())
        ]  # fmt: skip
        assert torch.equal(runs[0], runs[1])
        assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("noise", [
    torch.ones(3), torch.ones(2, 4), torch.tensor([1.0, 1.0, -1.0, 0.0]),
    torch.full((4,), torch.inf),
], ids=str)  # fmt: skip
def test_noise_that_is_not_one_number_a_step_is_refused(noise):
    for options in ({"steps": 4}, {}):
        with pytest.raises(ConfigError, match="noise"):
            list(
                confidence(HashDenoiser(SPACE), hidden(1, 12), space=SPACE, noise=noise, **options)
            )


# Filling in around what is given.

RUNS = {
    "ancestral": {"steps": 4}, "any_order": {"steps": 3, "order": "random"},
    "blocks": {"block_length": 7}, "confidence": {"steps": 3, "noise": 4.5},
    "first_hitting": {"per_call": 6}, "halton": {"steps": 3, "roll": True},
}  # fmt: skip


@pytest.mark.parametrize("name", names("samplers"))
def test_no_given_token_changes_under_random_masks(name):
    """Masks of every share in one batch, at each sampler's defaults and at few calls."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, 11, (200, 24), generator=generator)
    share = torch.linspace(0, 1, 200)[:, None]
    canvas = torch.where(torch.rand(200, 24, generator=generator) < share, SPACE.mask_id, tokens)
    given = canvas != SPACE.mask_id
    for options in ({}, RUNS.get(name, {})):
        *_, last = find("samplers", name)(
            HashDenoiser(SPACE), canvas, space=SPACE, seed=3, **options
        )
        assert torch.equal(last.tokens[given], tokens[given])
        new = last.tokens[~given]
        assert ((new < 11) & (new != 3)).all()
        assert torch.equal(last.calls > 0, (~given).any(1))


def test_holes_at_the_edge_and_in_the_middle_are_one_kind_of_canvas():
    """Inpainting and outpainting: a rectangle, or all but one, on a 6 x 6 grid."""
    rows, columns = torch.arange(36) // 6, torch.arange(36) % 6
    inside = (rows >= 2) & (rows < 5) & (columns >= 1) & (columns < 4)
    for hole, sampler in product((inside, ~inside), names("samplers")):
        canvas = torch.where(hole, SPACE.mask_id, 7).expand(3, 36).contiguous()
        out = sample(HashDenoiser(SPACE), canvas, space=SPACE, sampler=sampler)
        assert (out.tokens[:, ~hole] == 7).all()
        assert (out.tokens != SPACE.mask_id).all()
