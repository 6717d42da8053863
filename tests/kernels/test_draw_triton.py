"""The Triton backend in Triton's interpreter, and compiled for a GPU that need not be there."""

from __future__ import annotations

import json
import os

import processes
import pytest
import torch
from exactness import counters
from folders import SUPPORT
from interpreted import ONEPASS, interpreter  # noqa: F401 (a fixture that pytest finds by name)

from mdiff.kernels import draw_triton as module
from mdiff.kernels.draw_torch import draw_torch
from mdiff.kernels.draw_triton import by_torch, draw_triton, why_not
from mdiff.kernels.reference import draw_reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
TILE = 64
# Eleven tiles: two whole groups of four, and one of which columns are missing.
VOCAB = 680
SPAN = torch.tensor([[70, 640], [300, 301]])
OPTIONS = [
    {}, {"temperature": 0.7}, {"temperature": 2.5, "measure": "drawn"}, {"temperature": 0.0},
    {"temperature": 1e-300}, {"forbidden": (0, 7, 65, 679)}, {"span": SPAN},
    {"span": SPAN, "forbidden": (70, 71, 500), "temperature": 0.0},
    {"min_p": 0.05}, {"min_p": 1.0}, {"min_p": 1e-60}, {"top_k": 5},
    {"top_k": 1, "measure": "drawn"}, {"top_p": 0.8}, {"top_p": 0.3, "temperature": 1.3},
    {"top_p": 0.999, "span": SPAN},
    {"top_k": 9, "top_p": 0.7, "min_p": 0.01, "temperature": 0.9},
    {"top_k": 64, "forbidden": (3, 77), "measure": "drawn", "temperature": 1.2},
    {"top_k": 30, "top_p": 0.95, "span": SPAN},
    {"measure": "drawn", "temperature": 0.0, "top_k": 3}, {"temperature": 0.0, "min_p": 0.5},
    {"measure": "drawn", "temperature": 0.8, "min_p": 0.02}, {"top_k": 680, "top_p": 1.0},
]  # fmt: skip


def normal(rows=2, vocab=VOCAB, seed=0):
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def both(logits, tile=TILE, **options):
    options = {**counters(len(logits)), **options}
    return draw_triton(logits, tile=tile, **options), draw_reference(logits, tile=tile, **options)


def agree(fast, true, atol=2e-5):
    assert torch.equal(fast.tokens, true.tokens)
    for a, b in zip(fast[1:], true[1:]):
        assert a.dtype == torch.float32
        assert torch.allclose(a.double(), b, atol=atol, equal_nan=True)


def test_it_is_triton_that_runs_and_in_its_interpreter(monkeypatch):
    def refused(*args, **options):
        raise AssertionError("torch ran")

    grids = []

    class Watched:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    kernel = ONEPASS.draw_kernel
    assert type(kernel).__name__ == "InterpretedFunction"
    monkeypatch.setattr(module, "draw_torch", refused)
    monkeypatch.setattr(ONEPASS, "draw_kernel", Watched())
    draw_triton(normal(2), tile=TILE, **counters(2))
    assert grids == [(2, 3), (2, 1)]
    assert why_not("cpu") == ""
    assert "on cuda" in why_not("mps")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_triton_draws_what_the_reference_draws(options):
    agree(*both(normal(), **options))


@pytest.mark.parametrize("vocab", [1, 63, 65, 256, 257])
def test_any_vocabulary_agrees_with_the_reference(vocab):
    agree(*both(normal(2, vocab), temperature=0.8))
    agree(*both(normal(2, vocab), top_k=3, min_p=0.01))


@pytest.mark.parametrize("tile", [1, 4, 512])
def test_any_tile_of_a_power_of_two_agrees_with_the_reference(tile):
    agree(*both(normal(2, 37), tile=tile))
    agree(*both(normal(2, 37), tile=tile, top_p=0.8))
    with pytest.raises(ValueError, match="power of two"):
        draw_triton(normal(1), tile=48, **counters(1))


@pytest.mark.parametrize("options", [{}, {"top_k": 7, "top_p": 0.8}, {"top_p": 0.9}], ids=str)
def test_split_rows_give_what_whole_rows_give_bit_for_bit(options, monkeypatch):
    drawn = []
    for programs in (1, 4, 1000):
        monkeypatch.setattr(module, "PROGRAMS", programs)
        runs = module._runs(2, -(-VOCAB // TILE), module.GROUP, torch.device("cpu"))[1]
        assert runs == {1: 1, 4: 2, 1000: 3}[programs]
        drawn.append(draw_triton(normal(), tile=TILE, **options, **counters(2)))
    for other in drawn[1:]:
        assert all(torch.equal(a, b) for a, b in zip(drawn[0], other))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_as_they_are(kind):
    logits = normal(2).to(kind)
    one = draw_triton(logits, tile=TILE, top_k=20, **counters(2))
    two = draw_triton(logits.float(), tile=TILE, top_k=20, **counters(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    agree(one, draw_reference(logits, tile=TILE, top_k=20, **counters(2)))


@pytest.mark.parametrize(
    "options",
    [{"top_k": 10}, {"top_p": 0.41}, {"top_k": 33, "top_p": 0.41}, {"min_p": 1.0}],
    ids=str,
)
def test_ties_at_the_edge_are_kept_from_the_lowest_id(options):
    """Three rows of few levels: flat, in steps of 1, and around zero with both its signs."""
    flat = torch.zeros(1, VOCAB)
    steps = (torch.arange(VOCAB) * 7 % 5).float()[None]
    zeros = torch.where(torch.arange(VOCAB) % 3 == 0, -0.0, 0.0)[None].clone()
    zeros[:, ::50] = -2.0
    agree(*both(torch.cat([flat, steps, zeros]), measure="drawn", **options))


def test_guidance_mixes_the_branches_in_the_pass():
    scale = torch.tensor([1.0, 2.5, -0.5], dtype=torch.float64)
    conditional, unconditional = normal(3), normal(3, seed=1)
    conditional[:, 100:140] = -torch.inf
    unconditional[:, 100:140] = -torch.inf
    conditional[:2, 5] = -torch.inf
    # A row whose scale is 1 does not look at the other branch.
    unconditional[0] = torch.nan
    guided = {"unconditional": unconditional, "scale": scale}
    for options in ({"temperature": 0.7, "forbidden": (9, 300)}, {"top_k": 12}, {"min_p": 0.1}):
        agree(*both(conditional, **guided, **options), atol=5e-5)
    # An id that only the other branch excludes has no value.
    unconditional[1, 9] = -torch.inf
    fast, true = both(conditional, **guided)
    assert fast.entropy.isnan().tolist() == [False, True, False]
    agree(fast, true, atol=5e-5)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.5}, {"min_p": 0.1}, {"top_p": 0.5}, {"temperature": 0.0}],
    ids=str,
)
def test_rows_without_a_law_draw_the_lowest_permitted_id(options):
    logits = normal(7)
    logits[0, 679] = torch.nan
    logits[1, 64:128] = -torch.nan
    logits[2, 5] = torch.inf
    logits[3] = -torch.inf
    logits[4, :600] = -torch.inf
    logits[5, [1, 679]] = torch.nan
    span = torch.tensor([[0, VOCAB]] * 5 + [[2, 670], [9, 9]])
    options = {**counters(7), **options, "span": span, "forbidden": (0, 1), "tile": TILE}
    out = draw_triton(logits, **options)
    assert out.log_prob.isnan().tolist() == [True] * 4 + [False, False, True]
    assert out.tokens[[0, 1, 2, 3, 6]].tolist() == [2, 2, 2, 2, 9]
    true = draw_torch(logits, **options)
    assert torch.equal(out.tokens, true.tokens)
    for a, b in zip(out[1:], true[1:]):
        assert torch.allclose(a, b, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}], ids=str)
def test_columns_outside_the_span_and_forbidden_ids_have_no_effect(options):
    logits, spoiled = normal(), normal()
    spoiled[:, :90] = torch.nan
    spoiled[:, 610:] = torch.inf
    spoiled[:, [100, 255, 256]] = torch.nan
    options = {**counters(2), **options, "forbidden": (100, 255, 256), "temperature": 1.2}
    options |= {"span": torch.tensor([[90, 610]] * 2), "tile": TILE}
    one, two = draw_triton(logits, **options), draw_triton(spoiled, **options)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not one.entropy.isnan().any()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_p": 0.6}], ids=str)
@pytest.mark.parametrize("programs", [1, 1000])
def test_every_output_is_written_and_nothing_else_is_read(options, programs, monkeypatch):
    empty = torch.empty

    def poisoned(*shape, dtype, device):
        fill = torch.nan if dtype.is_floating_point else -1
        return empty(*shape, dtype=dtype, device=device).fill_(fill)

    clean = draw_triton(normal(), tile=TILE, **options, **counters(2))
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(module, "PROGRAMS", programs)
    out = draw_triton(normal(), tile=TILE, **options, **counters(2))
    assert (out.tokens >= 0).all()
    assert not any(field.isnan().any() for field in out[1:])
    assert all(torch.equal(a, b) for a, b in zip(out, clean))


def test_the_stream_is_that_of_philox_for_any_64_bit_counter():
    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(-(2**63), 2**63 - 1, (4, 12), generator=generator)
    counter = dict(zip(("seed", "sample", "step", "position"), keys))
    agree(*both(normal(12, 90), tile=32, **counter))
    same = {name: value[:1].expand(3) for name, value in counter.items()}
    agree(*both(normal(3, 90), tile=32, **same))


def test_logits_of_any_layout_are_read_without_a_copy():
    wide = normal(9)
    for logits in (wide[::4], wide[:2, 5:305], wide.T[:2], wide[:1].expand(2, VOCAB), wide[:0]):
        one = draw_triton(logits, tile=TILE, **counters(len(logits)))
        two = draw_triton(logits.contiguous(), tile=TILE, **counters(len(logits)))
        assert all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.parametrize(
    ("kind", "options"), [(torch.float64, {}), (torch.float32, {"top_k": 65})], ids=str
)
def test_what_triton_does_not_take_goes_to_torch_and_is_named(kind, options, monkeypatch):
    ran = []
    monkeypatch.setattr(
        module, "draw_torch", lambda *args, **given: ran.append(1) or draw_torch(*args, **given)
    )
    logits = normal(2).to(kind)
    draw_triton(logits, tile=TILE, **options, **counters(2))
    assert ran
    assert by_torch(logits, options.get("top_k"))
    assert by_torch(normal(2), 64) is None
    assert by_torch(normal(2), VOCAB) is None


def test_without_the_interpreter_the_cpu_is_refused_by_name():
    code = (
        "import sys, torch; from mdiff.kernels.draw_triton import draw_triton, why_not\n"
        "assert why_not('cuda') == '' and 'TRITON_INTERPRET' in why_not('cpu'), why_not('cpu')\n"
        "assert 'triton' not in sys.modules\n"
        "import triton; assert 'TRITON_INTERPRET' in why_not('cpu')\n"
        "zero = torch.zeros(1, dtype=torch.int64)\n"
        "try: draw_triton(torch.zeros(1, 3), seed=zero, sample=zero, step=zero, position=zero)\n"
        "except RuntimeError as error: assert 'TRITON_INTERPRET' in str(error)\n"
        "else: raise SystemExit('it ran')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    processes.python("-c", code, env=environment, check=True)


@pytest.mark.parametrize(
    "names",
    [
        ["top_p bf16", "loss, every option fp32", "reveal"],
        pytest.param([], id="all", marks=pytest.mark.slow),
    ],
)
def test_the_kernels_compile_for_sm_90_without_a_gpu(tmp_path, names):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = processes.python(SUPPORT / "compiled.py", *names, env=environment, check=True)
    found = json.loads(run.stdout)
    assert len(found) == (len(names) or 6)
    for name, ptx in found.items():
        assert ".target sm_90" in ptx, name
        assert ".address_size 64" in ptx, name
        # The offset of a row is a product of 64 bits.
        assert "mul.lo.s64" in ptx or "mul.wide.s32" in ptx, name
    for name in set(found) - {"reveal"}:
        # Whole groups are loaded ahead, 16 bytes a thread.
        assert "cp.async.cg.shared.global" in found[name], name
