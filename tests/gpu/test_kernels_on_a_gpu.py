"""The Triton kernels as compiled for the GPU that is here: `make gpu`."""

from __future__ import annotations

import pytest
import torch
from exactness import TAIL, distributions, figures_agree, two_levels
from scipy import stats
from test_draw_c import ROUNDING, distance_to_an_edge

from mdiff.kernels import draw_triton as module
from mdiff.kernels.draw_torch import draw_torch
from mdiff.kernels.draw_triton import draw_triton, why_not
from mdiff.kernels.loss_rows import Rows
from mdiff.kernels.reference import TILE, Draw, draw_reference, kept_columns
from mdiff.kernels.reveal_torch import reveal_torch
from mdiff.kernels.reveal_triton import reveal_triton
from mdiff.ops import masked_cross_entropy

pytestmark = pytest.mark.gpu
FALSE_ALARM = 1e-6 / 8
OPTIONS = [
    {"temperature": 0.7}, {"temperature": 2.5, "measure": "drawn"}, {"temperature": 0.0},
    {"forbidden": (0, 7, 50_256)}, {"min_p": 0.05}, {"min_p": 1e-60}, {"top_k": 1},
    {"top_k": 64, "measure": "drawn"}, {"top_p": 0.8}, {"top_p": 0.999, "temperature": 1.3},
    {"top_k": 40, "top_p": 0.7, "min_p": 0.01, "temperature": 0.9}, {"top_k": 65},
]  # fmt: skip


def counters(rows, device="cuda"):
    zero = torch.zeros(rows, dtype=torch.int64, device=device)
    return {"seed": zero + 9, "sample": zero, "step": zero,
            "position": torch.arange(rows, device=device)}  # fmt: skip


def normal(rows, vocab, kind=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (3 * torch.randn(rows, vocab, generator=generator, device="cuda")).to(kind)


def on_the_cpu(options):
    return {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def agree(logits, fast, **options):
    """The figures are those of float64; ids differ at near-ties only, and hardly ever."""
    true = draw_reference(logits.cpu(), **on_the_cpu(options))
    fast = Draw(*(field.cpu() for field in fast))
    same = fast.tokens == true.tokens
    if not same.all():
        keys = ("seed", "sample", "step", "position")
        counter = {k: options[k].cpu()[~same] for k in keys}
        heat = options.get("temperature", 1.0)
        model = logits.cpu()[~same].double() / heat
        model[:, list(options.get("forbidden", ()))] = -torch.inf
        kept = kept_columns(model, *(options.get(name) for name in ("top_k", "top_p", "min_p")))
        model[~kept] = -torch.inf
        assert (distance_to_an_edge(model, counter, TILE) < ROUNDING).all()
    assert same.double().mean() > 0.9
    assert torch.allclose(fast.log_prob.double()[same], true.log_prob[same], atol=1e-4)
    assert torch.allclose(fast.entropy.double(), true.entropy, atol=1e-3)
    assert torch.allclose(fast.margin.double(), true.margin, atol=1e-4)


def test_triton_runs_on_this_gpu():
    assert torch.cuda.is_available()
    assert why_not("cuda") == ""


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 1000, 50_257, 126_464, 262_144])
def test_any_type_and_vocabulary_agree_with_the_reference(kind, vocab):
    logits = normal(16, vocab, kind)
    agree(logits, draw_triton(logits, **counters(16)), **counters(16))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab", [50_257, 126_464])
def test_every_option_agrees_with_the_reference(options, vocab):
    logits = normal(8, vocab)
    options = {**options, **counters(8)}
    agree(logits, draw_triton(logits, **options), **options)


def test_guidance_and_spans_agree_with_the_reference():
    span = torch.tensor([[0, 50_257], [1000, 9000], [5, 6], [3, 50_000]] * 2, device="cuda")
    options = {
        "unconditional": normal(8, 50_257, seed=1), "span": span,
        "scale": torch.tensor([1.0, 2.0, 0.5, -1.0] * 2, dtype=torch.float64, device="cuda"),
        **counters(8),
    }  # fmt: skip
    logits = normal(8, 50_257)
    fast = draw_triton(logits, **options)
    true = draw_torch(
        logits.double(), **{**options, "unconditional": options["unconditional"].double()}
    )
    assert torch.equal(fast.tokens, true.tokens)
    for a, b in zip(fast[1:], true[1:]):
        assert torch.allclose(a.double(), b, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.02}], ids=str)
def test_the_law_is_softmax_by_chi_square(options):
    rows, vocab = 200_000, 37
    logits = normal(1, vocab, seed=6)
    tokens = draw_triton(logits.expand(rows, vocab), tile=16, **options, **counters(rows)).tokens
    scaled = logits.double().cpu()
    kept = kept_columns(scaled, *(options.get(name) for name in ("top_k", "top_p", "min_p")))
    target = rows * scaled.masked_fill(~kept, -torch.inf).softmax(1)[0]
    counts = torch.bincount(tokens.cpu(), minlength=vocab).double()
    assert (counts[target == 0] == 0).all()
    keep = target > 5
    statistic = float(((counts - target)[keep] ** 2 / target[keep]).sum())
    assert stats.chi2.sf(statistic, int(keep.sum()) - 1) > FALSE_ALARM


@pytest.mark.parametrize("name", distributions(2))
def test_the_figures_are_those_of_float64(name):
    logits = distributions()[name].cuda().expand(64, -1)
    figures_agree(draw_triton(logits, **counters(64)), logits)


def test_a_tail_of_ids_of_6e_8_each_keeps_its_mass():
    """One likely id, 50,256 of probability 6e-8: 400,000 draws hit the tail 1,206 times."""
    rows, logits = 400_000, two_levels().cuda()
    tokens = draw_triton(logits.expand(rows, -1), **counters(rows)).tokens
    mean = rows * (len(logits) - 1) * TAIL
    assert abs(int((tokens != 0).sum()) - mean) < 5.5 * mean**0.5


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 9, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("rows", [3, 3000])
def test_outputs_are_written_and_do_not_depend_on_the_split(options, rows, monkeypatch):
    empty = torch.empty
    logits = normal(rows, 20_000)
    first = draw_triton(logits, **options, **counters(rows))

    def poisoned(*shape, dtype, device):
        fill = torch.nan if dtype.is_floating_point else -1
        return empty(*shape, dtype=dtype, device=device).fill_(fill)

    for programs in (1, 10_000):
        monkeypatch.setattr(module, "PROGRAMS", programs)
        monkeypatch.setattr(torch, "empty", poisoned)
        second = draw_triton(logits, **options, **counters(rows))
        monkeypatch.undo()
        assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_rows_beyond_2_to_the_31_logits_are_read_where_they_are():
    rows, vocab = 43_000, 50_257
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-1] = normal(1, vocab, torch.bfloat16)[0]
    counter = counters(rows)
    whole = draw_triton(logits, **counter)
    alone = draw_triton(logits[-1:], **{k: v[-1:] for k, v in counter.items()})
    assert all(torch.equal(a[-1:], b) for a, b in zip(whole, alone))


def a_step(rows=32, vocab=50_257):
    tokens = torch.zeros((4, rows), dtype=torch.int64, device="cuda")
    asked = torch.arange(4 * rows, device="cuda").view(4, rows) % 3 > 0
    count = torch.tensor([0, 3, 9, 99], device="cuda")
    logits, counter = normal(int(asked.sum()), vocab), counters(int(asked.sum()))

    def step(forbidden=(3, 700)):
        drawn = draw_triton(logits, forbidden=forbidden, top_k=50, **counter)
        at = {"count_B": count, "threshold": -1.0}
        return drawn, reveal_triton(tokens, asked, drawn, drawn.log_prob, **at)

    return tokens, asked, count, step


def test_a_step_waits_for_nothing_and_a_graph_repeats_it():
    tokens, asked, count, step = a_step()
    drawn, revealed = step()
    true = reveal_torch(tokens, asked, drawn, drawn.log_prob, count_B=count, threshold=-1.0)
    assert all(torch.equal(a, b) for a, b in zip(revealed, true))
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        # Ids that no call before has forbidden: their map is made on the device.
        step(forbidden=(5, 6))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, again = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(revealed, again))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1000, 50_257, 262_144])
@pytest.mark.parametrize(
    ("forbidden", "smoothing", "spans"), [((), 0.0, False), ((0, 7, 999), 0.1, True)]
)
def test_the_losses_and_their_gradient_are_those_of_float64(
    kind, vocab, forbidden, smoothing, spans
):
    logits, count = normal(64, vocab, kind), 64
    targets = torch.arange(count, device="cuda") + 100
    span = torch.tensor([[0, vocab], [3, 990]], device="cuda").repeat(32, 1) if spans else None
    weight = torch.rand(count, device="cuda")
    rows, every = Rows(targets, forbidden, span, smoothing), slice(0, count)
    wide = logits.double()
    nll, smooth, total = rows.loss_(wide, every, differentiate=True)
    wide *= weight[:, None] / total
    found = rows.by_triton_(logits, weight, every, differentiate=True)
    assert torch.allclose(found[0].double(), nll, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found[1].double(), smooth, rtol=1e-5, atol=1e-5)
    # A gradient is rounded to the type of the logits.
    rounding = 1e-5 if kind == torch.float32 else 2**-7
    assert torch.allclose(logits.double(), wide, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_loss_of_a_head_has_the_gradients_of_torch(kind):
    generator = torch.Generator("cuda").manual_seed(0)
    features = torch.randn(3000, 64, generator=generator, device="cuda").to(kind)
    targets = torch.arange(3000, device="cuda") * 7
    head = torch.nn.Linear(64, 50_257).to("cuda", kind)
    found = []
    for backend in ("triton", "torch"):
        given = features.clone().requires_grad_()
        head.zero_grad()
        out = masked_cross_entropy(given, head, targets, never=(5,), backend=backend)
        out.value.backward()
        found.append([out.value.detach(), out.nll, given.grad, head.weight.grad, head.bias.grad])
    for mine, other in zip(*found):
        rounding = 1e-5 if kind == torch.float32 else 1e-2
        assert (mine - other).double().norm() <= rounding * other.double().norm()
