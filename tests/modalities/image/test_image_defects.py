"""Behaviours that published samplers for images get wrong: each test names the right one."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from toys import HashDenoiser

from mdiff import sample
from mdiff.backbones.transformer import transformer
from mdiff.denoiser import from_logits, guided
from mdiff.errors import ConfigError
from mdiff.find import find, names
from mdiff.modalities.image.codec import load_codec, make_codec, save_codec
from mdiff.modalities.image.codecs.levels import levels
from mdiff.modalities.image.modality import image
from mdiff.objective.bound import nll_bound
from mdiff.objective.conditioning import drop_condition
from mdiff.objective.loss import masked_diffusion_loss
from mdiff.pipeline.pipeline import Pipeline
from mdiff.sampling import reveal_counts, schedule_counts
from mdiff.schedule import Arccos, Cosine, Linear
from mdiff.tokens import TokenSpace

SPACE = TokenSpace(16, mask_id=16)
FEW_CALLS = {
    "ancestral": {"steps": 5}, "any_order": {"steps": 5}, "blocks": {"block_length": 16},
    "confidence": {"steps": 5, "noise": 4.5}, "first_hitting": {"per_call": 7},
    "halton": {"steps": 5},
}  # fmt: skip
every_sampler = pytest.mark.parametrize("name", names("samplers"))


class Fickle:
    """Other logits at every call, so that a token that is drawn again shows."""

    uses_time = False

    def __init__(self, vocab_size):
        self.generator = torch.Generator().manual_seed(5)
        self.vocab_size = vocab_size
        self.calls = 0

    def __call__(self, tokens, *, at=None, **rest):
        self.calls += 1
        logits = torch.randn(*tokens.shape, self.vocab_size, generator=self.generator) * 4
        return logits if at is None else logits[at]


def mixed_batch():
    """Rows of 36 positions with none, few, most and all of them hidden."""
    generator = torch.Generator().manual_seed(8)
    canvas = torch.randint(0, 16, (5, 36), generator=generator)
    share = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])[:, None]
    return torch.where(torch.rand(5, 36, generator=generator) < share, 16, canvas)


def states_of(name, canvas, denoiser, *, space=SPACE, few=True, **options):
    options = {**(FEW_CALLS.get(name, {}) if few else {}), **options}
    return list(find("samplers", name)(denoiser, canvas, space=space, **options))


@every_sampler
def test_a_fully_known_canvas_comes_back_unchanged_and_without_a_call(name):
    denoiser = Fickle(16)
    known = torch.arange(36).expand(2, 36).contiguous() % 16
    for options in ({}, FEW_CALLS.get(name, {})):
        out = sample(denoiser, known, space=SPACE, sampler=name, **options)
        assert torch.equal(out.tokens, known)
        assert out.calls.tolist() == [0, 0]
        assert out.log_prob.tolist() == [0, 0]
    assert denoiser.calls == 0
    beside = sample(denoiser, mixed_batch(), space=SPACE, sampler=name)
    assert torch.equal(beside.tokens[0], mixed_batch()[0])
    assert int(beside.calls[0]) == 0


def test_counts_follow_each_samples_own_unknowns_and_not_their_mean():
    """56 and 256 unknown positions in one batch have the tables that each has alone."""
    unknown = torch.tensor([56, 256])
    for schedule in (Cosine(), Arccos(), Linear()):
        both = schedule_counts(unknown, steps=12, schedule=schedule)
        for row, count in enumerate(unknown):
            alone = schedule_counts(count[None], steps=12, schedule=schedule)
            assert torch.equal(both[row], alone[0])
    done = reveal_counts("schedule", unknown, steps=12, schedule=Cosine()).cumsum(1)
    left = unknown[:, None] - done
    assert left[0, :4].tolist() == [55, 54, 51, 48]
    assert left[1, :4].tolist() == [253, 247, 236, 221]


@pytest.mark.parametrize("name", ["any_order", "confidence", "halton"])
def test_no_sample_is_counted_by_the_first_of_its_batch(name):
    canvas = mixed_batch()
    counts = torch.stack([
        state.revealed.sum(1)
        for state in states_of(name, canvas, HashDenoiser(SPACE), counts="schedule")
    ])  # fmt: skip
    for row in range(1, 5):
        alone = states_of(name, canvas[row : row + 1], HashDenoiser(SPACE), counts="schedule")
        own = [int(state.revealed.sum()) for state in alone]
        assert [int(n) for n in counts[:, row] if n] == own


@pytest.mark.parametrize(
    "name",
    sorted(set(names("samplers")) - {"edit", "gibbs", "path_planning", "psi", "remdm", "wino"}),
)
@pytest.mark.parametrize("few", [False, True])
def test_given_and_committed_tokens_are_never_drawn_again(name, few):
    canvas = mixed_batch()
    fixed = canvas != SPACE.mask_id
    before = canvas
    for state in states_of(name, canvas, Fickle(16), few=few, seed=4):
        assert torch.equal(state.tokens[fixed], before[fixed])
        assert not (state.revealed & fixed).any()
        fixed, before = fixed | state.revealed, state.tokens
    assert fixed.all()
    assert torch.equal(before[canvas != SPACE.mask_id], canvas[canvas != SPACE.mask_id])


def test_a_grid_of_64_by_64_is_filled_to_its_last_cell():
    flat = from_logits(lambda tokens: torch.zeros(*tokens.shape, 16))
    for options in ({"grid": (64, 64)}, {}, {"roll": True}):
        canvas = torch.full((1, 4096), SPACE.mask_id)
        out = sample(flat, canvas, space=SPACE, sampler="halton", steps=16, **options)
        assert (out.tokens != SPACE.mask_id).all()
        assert out.calls.tolist() == [16]


@every_sampler
@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.0}, {"temperature": 3.0}, {"top_k": 1}, {"top_p": 0.1},
], ids=str)  # fmt: skip
def test_no_mask_is_left_and_none_is_drawn_where_the_head_prefers_it(name, options):
    """The head has a column for the mask id, and another for an id not to be generated."""
    space = TokenSpace(18, mask_id=16, never=(17,))
    table = torch.zeros(18)
    table[16:] = 40.0
    head = from_logits(lambda tokens: table.expand(*tokens.shape, 18))
    for few in (False, True):
        last = states_of(name, mixed_batch(), head, space=space, few=few, **options)[-1]
        assert (last.tokens < 16).all()


@every_sampler
def test_the_callers_canvas_and_conditions_are_never_written_to(name):
    canvas, valid = mixed_batch(), torch.ones(5, 36, dtype=torch.bool)
    cond = {"label": torch.arange(5), "given": canvas != SPACE.mask_id}
    null = {"label": torch.tensor(0)}
    kept = [tensor.clone() for tensor in (canvas, valid, *cond.values(), *null.values())]
    pair = guided(
        HashDenoiser(SPACE), guidance_scale=2.0, without=null, hide="given", space=SPACE,
        guidance_schedule="interval", interval=(0.2, 0.9),
    )  # fmt: skip
    for _ in range(2):
        states_of(name, canvas, pair, valid=valid, cond=cond)
    for tensor, copy in zip((canvas, valid, *cond.values(), *null.values()), kept, strict=True):
        assert torch.equal(tensor, copy)


def test_training_and_scoring_leave_tokens_and_conditions_as_they_were():
    tokens, cond = torch.arange(72).view(2, 36) % 16, {"label": torch.tensor([1, 2])}
    kept = tokens.clone(), cond["label"].clone()
    denoiser = HashDenoiser(SPACE)
    masked_diffusion_loss(denoiser, tokens, space=SPACE, schedule=Linear(), cond=cond, seed=0)
    nll_bound(denoiser, tokens, space=SPACE, schedule=Linear(), cond=cond, seed=0, draws=2)
    assert torch.equal(tokens, kept[0])
    assert torch.equal(cond["label"], kept[1])


@pytest.mark.parametrize("score", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ties_go_to_the_first_position_and_the_count_is_kept(score, temperature):
    """Where all confidences tie, a threshold would reveal all of them or none."""
    flat = from_logits(lambda tokens: torch.zeros(*tokens.shape, 16))
    canvas = torch.full((2, 36), SPACE.mask_id)
    canvas[1, ::2] = 3
    table = reveal_counts("schedule", torch.tensor([36, 18]), steps=6, schedule=Cosine())
    states = states_of(
        "confidence", canvas, flat, counts=table, steps=6, noise=0.0, score=score,
        temperature=temperature,
    )  # fmt: skip
    assert torch.stack([state.revealed.sum(1) for state in states], 1).tolist() == table.tolist()
    hidden = canvas == SPACE.mask_id
    for state in states:
        first = state.revealed.long().argmax(1)
        assert first.tolist() == hidden.long().argmax(1).tolist()
        revealed = hidden & (hidden.cumsum(1) <= state.revealed.sum(1, keepdim=True))
        assert torch.equal(state.revealed, revealed)
        hidden = hidden & ~state.revealed


def labelled(**options):
    """A small model of labelled pictures with lively weights, untrained."""
    torch.manual_seed(0)
    made = image(codec=levels(levels=4, step=60), size=(4, 6), label="condition", labels=["a", "b"])
    space = made.space
    model = transformer(
        vocab_size=space.vocab_size, mask_id=space.mask_id, layout=made.layout, width=24, depth=1,
        heads=2, classes=2, init_std=0.5, **options,
    )  # fmt: skip
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "modulation", None) is not None:
                module.modulation.weight.normal_(std=0.5)
    return Pipeline(model.eval(), space, made, window=made.length)


def test_a_variation_of_strength_one_regenerates_every_token():
    pipe = labelled()
    picture = np.full((4, 6), 60, dtype=np.uint8)
    edits = pipe.modality.edited(picture, None, given={}, strength=1.0, seeds=torch.arange(3))
    assert all(canvas == [pipe.space.mask_id] * 24 for canvas in edits.canvases)
    # And a little less than one is a little less: 23 of 24, not all or one.
    edits = pipe.modality.edited(picture, None, given={}, strength=0.96, seeds=torch.arange(3))
    assert {canvas.count(pipe.space.mask_id) for canvas in edits.canvases} == {23}


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (8, 8)])
def test_a_labelled_model_takes_a_grid_of_any_sides(size):
    made = image(codec=levels(levels=4, step=60), size=size, label="condition", labels=["a", "b"])
    space = made.space
    model = transformer(
        vocab_size=space.vocab_size, mask_id=space.mask_id, layout=made.layout, width=24, depth=1,
        heads=2, classes=2,
    )  # fmt: skip
    pipe = Pipeline(model.eval(), space, made, window=made.length)
    for name in ("halton", "confidence"):
        drawn = pipe.generate({"label": "b"}, n=2, sampler=name, steps=3)
        assert all(one.output.size == (size[1], size[0]) for one in drawn)


def test_a_label_is_left_out_with_the_probability_asked_for_and_kept_otherwise():
    kept = drop_condition(
        {"label": torch.zeros(20_000, dtype=torch.int64)},
        null_condition={"label": torch.tensor([1])}, share=0.1, seed=0, sample=torch.arange(20_000),
    )["label"]  # fmt: skip
    # Five standard deviations of a binomial are 0.0106: false alarm below 1e-6.
    assert abs(float((kept == 0).double().mean()) - 0.9) < 0.0106


def test_every_named_option_of_a_sampler_is_reached_and_makes_a_difference():
    model, canvas = HashDenoiser(SPACE), torch.full((4, 24), 16)
    for name, options in (
        ("confidence", [{"score": s} for s in ("confidence", "entropy", "margin")]),
        ("confidence", [{"counts": c} for c in ("schedule", "even")]),
        ("confidence", [{"noise": n} for n in (0.0, 4.5)]),
        ("any_order", [{"order": o} for o in ("left_to_right", "right_to_left", "random")]),
        ("halton", [{"counts": c} for c in ("schedule", "even", "root", "square")]),
        ("halton", [{"roll": r} for r in (False, True)]),
    ):
        found = {
            tuple(sample(model, canvas, space=SPACE, sampler=name, steps=5, **each).tokens
                  .flatten().tolist())
            for each in options
        }  # fmt: skip
        assert len(found) == len(options), (name, options)


def test_the_noise_of_confidence_falls_linearly_and_does_not_compound(monkeypatch):
    factors = []

    def spy(fill, factor, step):
        factors.append(float(factor[0]))
        return torch.zeros(len(fill.positions), dtype=torch.float64)

    monkeypatch.setattr(importlib.import_module("mdiff.samplers.confidence"), "_gumbel", spy)
    sample(HashDenoiser(SPACE), torch.full((1, 24), 16), space=SPACE, sampler="confidence", steps=5,
           noise=10.0)  # fmt: skip
    assert factors == pytest.approx([8.0, 6.0, 4.0, 2.0, 0.0])


def test_a_model_is_given_the_same_time_in_sampling_as_in_training():
    heard: list[tuple[float, float]] = []

    class Listening:
        uses_time = True

        def __call__(self, tokens, *, at=None, t=None, **rest):
            share = (tokens == 16).double().mean(1)
            heard.extend(zip(t.tolist(), share.tolist()))
            logits = torch.zeros(*tokens.shape, 16)
            return logits if at is None else logits[at]

    schedule = Cosine()
    tokens = torch.zeros(64, 400, dtype=torch.int64)
    masked_diffusion_loss(Listening(), tokens, space=SPACE, schedule=schedule, seed=0)
    trained = list(heard)
    heard.clear()
    for name in ("first_hitting", "confidence"):
        options = {"per_call": 40} if name == "first_hitting" else {"steps": 10}
        sample(Listening(), torch.full((4, 400), 16), space=SPACE, sampler=name,
               schedule=schedule, **options)  # fmt: skip
    # Five standard deviations of 400 coins; a call of first hitting stands up to 40 positions off.
    for times, slack in ((trained, 0.125), (heard, 0.225)):
        assert len(times) > 10
        for t, share in times:
            m = float(schedule.mask_prob(torch.tensor(t, dtype=torch.float64)))
            assert abs(m - share) < slack


def test_codes_decode_whatever_their_width_and_after_loading(tmp_path):
    made = make_codec({"name": "vq", "channels": 1, "stride": 2, "codebook_size": 7,
                       "code_width": 3, "codes_per_position": 2, "width": 4})  # fmt: skip
    ids = torch.randint(0, 7, (3, 4, 5, 2), generator=torch.Generator().manual_seed(0))
    pictures = made.decode(ids)
    assert pictures.shape == (3, 1, 8, 10)
    save_codec(made, tmp_path)
    assert torch.equal(load_codec(tmp_path).decode(ids), pictures)


def test_guidance_needs_no_second_condition_from_the_caller():
    pipe = labelled()
    drawn = pipe.generate({"label": "a"}, guidance_scale=3.0, sampler="halton", steps=4)
    assert drawn[0].calls == 8
    with pytest.raises(ConfigError, match="without a condition"):
        pipe.generate(guidance_scale=3.0)


def test_the_quantisers_losses_are_finite_and_their_codes_in_range():
    pixels = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(1))  # fmt: skip
    for described in (
        {"name": "vq", "codebook_size": 16},
        {"name": "bits", "quantizer": "lfq", "bits": 4},
        {"name": "bits", "quantizer": "fsq", "levels": [4, 4]},
    ):
        said: list[str] = []
        made = make_codec(described | {"channels": 1, "stride": 4, "width": 4, "steps": 6,
                                       "batch_size": 8})  # fmt: skip
        made.fit(pixels, report=said.append)
        ids = made.encode(pixels)
        assert 0 <= int(ids.min()) <= int(ids.max()) < made.codebook_size
        assert "nan" not in said[-1]
