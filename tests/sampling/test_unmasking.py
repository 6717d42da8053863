"""The unmasking loop: rows of the head, waits for the device, what a threshold writes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hashed import GOLDEN
from torch.utils._python_dispatch import TorchDispatchMode
from toys import HashDenoiser

from mdiff.backbones.published.llada import llada
from mdiff.backbones.transformer import transformer
from mdiff.denoiser import FromLogits, flat_positions, guided
from mdiff.errors import ConfigError
from mdiff.find import find, names
from mdiff.kernels.reveal_torch import reveal_torch
from mdiff.ops import Draw
from mdiff.ops import categorical as ops
from mdiff.samplers.confidence import confidence
from mdiff.sampling.run import sample
from mdiff.tokens import TokenSpace

SPACE = TokenSpace(29, mask_id=29)
SHORT = torch.tensor([-1, 2, 4])


class Watched(torch.nn.Module):
    """A head that remembers how many rows each call had."""

    def __init__(self, head):
        super().__init__()
        self.head, self.rows = head, []

    def forward(self, x):
        self.rows.append(len(x))
        return self.head(x)


def model_with_watched_head(**options):
    torch.manual_seed(0)
    model = transformer(vocab_size=29, width=16, depth=2, heads=2, **options).eval()
    with torch.no_grad():
        # At first all logits are nearly equal, and a label changes nothing.
        model.head.weight.mul_(40)
        for name, weight in model.named_parameters():
            if "modulation" in name:
                weight.normal_(std=0.5)
    model.head = Watched(model.head)
    return model, model.head


def canvas_of(rows=3, length=10):
    canvas = torch.full((rows, length), SPACE.mask_id)
    canvas[0, :4] = 7
    return canvas


def test_the_head_runs_on_the_requested_rows_alone():
    model, head = model_with_watched_head()
    sample(model, canvas_of(), space=SPACE, sampler="first_hitting", seed=1)
    # One position of each sample a call; the first sample has six.
    assert head.rows == [3] * 6 + [2] * 4
    head.rows.clear()
    sample(model, canvas_of(), space=SPACE, sampler="confidence", seed=1, steps=2, counts="even")
    assert head.rows == [26, 13]


@pytest.mark.parametrize("sampler", ["first_hitting", "confidence", "blocks"])
@pytest.mark.parametrize("scale", [None, 2.5])
def test_chunks_of_the_head_change_nothing_but_its_calls(sampler, scale, monkeypatch):
    model, head = model_with_watched_head(classes=3)
    denoiser, cond = model, {"label": torch.tensor([0, 1, 2])}
    if scale is not None:
        denoiser = guided(model, guidance_scale=scale, without={"label": torch.tensor(3)})
    options = {"space": SPACE, "sampler": sampler, "seed": 1, "cond": cond}
    if sampler == "confidence":
        # Positions of a hidden canvas are nearly equal: noise says which comes first.
        options["noise"] = 1.0
    whole = sample(denoiser, canvas_of(), **options)
    most = max(head.rows)
    monkeypatch.setitem(ops.CHUNK, "cpu", 2 * SPACE.vocab_size)
    head.rows.clear()
    parts = sample(denoiser, canvas_of(), **options)
    assert max(head.rows) == 2 < most
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.allclose(whole.log_prob, parts.log_prob, atol=1e-4)


def test_guidance_by_rows_is_guidance_by_logits(monkeypatch):
    """The branches mixed inside the draw, and as the guided denoiser mixes them."""
    model, _ = model_with_watched_head(classes=3)
    pair = guided(
        model, guidance_scale=2.5, without={"label": torch.tensor(3)}, space=SPACE,
        guidance_schedule="interval", interval=(0.0, 0.7),
    )  # fmt: skip
    options = {"space": SPACE, "seed": 1, "cond": {"label": torch.tensor([0, 1, 2])}}
    inside = sample(pair, canvas_of(), **options)
    monkeypatch.setattr("mdiff.denoiser.calls.asks_rows", lambda denoiser: False)
    outside = sample(pair, canvas_of(), **options)
    assert torch.equal(inside.tokens, outside.tokens)
    assert torch.equal(inside.calls, outside.calls)
    assert torch.allclose(inside.log_prob, outside.log_prob, atol=1e-4)


def test_a_head_of_another_width_is_refused():
    model, _ = model_with_watched_head()
    with pytest.raises(ConfigError, match="29"):
        sample(model, torch.full((1, 4), 29), space=TokenSpace(30, mask_id=29))


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")


class NothingWaits(TorchDispatchMode):
    """Fails at an operation for whose result a program has to wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise AssertionError(f"{name} waits for the device")
        if name in ("index", "index_put_", "index_put"):
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            if masks:
                raise AssertionError(f"{name} by a mask waits for the device")
        return func(*args, **(kwargs or {}))


def guided_model():
    model, _ = model_with_watched_head(classes=3)
    return guided(model, guidance_scale=2.5, without={"label": torch.tensor(3)}, space=SPACE)


def published_model():
    """LLaDA's trunk, whose rows are taken after the last layer."""
    config = json.loads((GOLDEN / "llada" / "config.json").read_text())
    torch.manual_seed(0)
    return llada(config | {"vocab_size": 30, "embedding_size": 30, "mask_token_id": 29}).eval()


MODELS = {
    "transformer": (lambda: model_with_watched_head()[0], {}),
    "guided": (guided_model, {"cond": {"label": torch.tensor([0, 1, 2])}}),
    "llada": (published_model, {"space": TokenSpace(30, mask_id=29)}),
    "ragged": (lambda: model_with_watched_head()[0], {"valid": torch.arange(10) > SHORT[:, None]}),
}


SAMPLERS = sorted(set(names("samplers")) - {"blocks"})
# These ask the device once a step how many positions are hidden.
ASKING = ("budget", "edit", "gibbs", "path_planning", "psi", "remdm", "speculative", "wino")
QUIET = [name for name in SAMPLERS if name not in ASKING]


@pytest.mark.parametrize(
    ("name", "model"),
    # A grid is never ragged.
    sorted({(name, model) for name in QUIET for model in MODELS} - {("halton", "ragged")}),
)
def test_no_step_waits_for_the_device(name, model, monkeypatch):
    """Every state but the first, whose making looks at the canvas once."""
    monkeypatch.setenv("MDIFF_BACKEND", "torch")
    options = {"seed": 3, "space": SPACE}
    if name == "confidence":
        options |= {"steps": 4, "noise": 1.0}
    if name == "halton":
        options |= {"grid": (2, 5)}
    build, given = MODELS[model]
    with torch.no_grad():
        states = find("samplers", name)(build(), canvas_of(), **options | given)
        next(states)
        with NothingWaits():
            for state in states:
                last = state
    valid = given.get("valid", torch.ones_like(last.tokens, dtype=torch.bool))
    assert not (last.tokens == SPACE.mask_id)[valid].any()


def test_flat_positions_are_the_same_with_a_number_and_without():
    at = torch.tensor([[True, False], [True, True]])
    assert flat_positions(at).tolist() == flat_positions(at, 3).tolist() == [0, 2, 3]


def test_the_watch_for_waits_would_notice_one():
    for wait in (lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x[x > 0]):
        with NothingWaits(), pytest.raises(AssertionError, match="waits"):
            wait(torch.ones(3))


@pytest.mark.parametrize("threshold", [None, 0.5, -1.0])
def test_the_surest_are_written_and_ties_go_to_the_first_position(threshold):
    tokens = torch.full((3, 5), 9)
    tokens[0, 1] = 4
    asked = tokens == 9
    asked[2, 0] = False
    score = torch.tensor([0.2, 0.9, 0.9, 0.1] + [torch.nan] * 4 + [1.0] + [0.5, 0.5, 0.5, 0.4])
    drawn = Draw(torch.arange(13), score.clone(), -score, score)
    count = torch.tensor([1, 3, 0])
    out = reveal_torch(tokens, asked, drawn, score, count_B=count, threshold=threshold)
    expected = {
        None: [[2], [0, 1, 4], []],
        0.5: [[2, 3], [0, 1, 4], [1, 2, 3]],
        -1.0: [[0, 2, 3, 4], [0, 1, 4], [1, 2, 3, 4]],
    }[threshold]
    assert [row.nonzero()[:, 0].tolist() for row in out.at] == expected
    written = torch.full((3, 5), -1).masked_scatter(asked, drawn.tokens)
    assert torch.equal(out.tokens, torch.where(out.at, written, tokens))
    assert (out.log_prob[~out.at] == 0).all()
    assert (tokens[0, 1], tokens[2, 0]) == (4, 9)


@pytest.mark.parametrize(
    ("score", "threshold", "sure"),
    [
        ("confidence", 0.9, lambda p: p.amax(1) >= 0.9),
        ("margin", 0.5, lambda p: p.topk(2).values.diff(dim=1).neg()[:, 0] >= 0.5),
        ("entropy", 0.4, lambda p: -(p * p.log()).sum(1) <= 0.4),
    ],
)
def test_a_threshold_writes_every_position_that_is_sure_enough_and_at_least_one(
    score, threshold, sure
):
    generator = torch.Generator().manual_seed(2)
    table = 4 * torch.randn(40, 12, generator=generator)
    canvas = torch.full((1, 40), 12)
    space = TokenSpace(12, mask_id=12)
    states = list(
        confidence(
            FromLogits(lambda tokens: table[None]), canvas, space=space, temperature=0.0,
            score=score, threshold=threshold,
        )
    )  # fmt: skip
    p = table.double().softmax(1)
    assert torch.equal(states[0].revealed[0], sure(p))
    # The table never changes: what was not sure at first is written one a call.
    assert [int(state.revealed.sum()) for state in states[1:]] == [1] * (40 - int(sure(p).sum()))


def test_a_threshold_that_nothing_reaches_changes_nothing():
    canvas = canvas_of()
    options = {"space": SPACE, "sampler": "confidence", "seed": 5, "steps": 5}
    plain = sample(HashDenoiser(SPACE), canvas, **options)
    same = sample(HashDenoiser(SPACE), canvas, threshold=1.0, **options)
    assert torch.equal(plain.tokens, same.tokens)
    assert torch.equal(plain.calls, same.calls)


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.0}, {"threshold": 1.5}, {"threshold": math.nan},
        {"threshold": -0.1, "score": "entropy"}, {"threshold": 0.9, "noise": 1.0},
        {"threshold": 2.0, "score": "margin"},
    ],
    ids=str,
)  # fmt: skip
def test_a_threshold_out_of_range_is_refused(options):
    with pytest.raises(ConfigError, match="threshold"):
        list(confidence(HashDenoiser(SPACE), canvas_of(), space=SPACE, **options))
