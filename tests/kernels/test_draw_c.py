"""The C backend: that it is built and runs, and its arithmetic beside torch's and float64."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from exactness import counters

from mdiff import ops
from mdiff.cli import doctor
from mdiff.errors import BackendError
from mdiff.kernels import draw_c as module
from mdiff.kernels import philox
from mdiff.kernels.draw_torch import draw_torch
from mdiff.kernels.reference import TILE, draw_reference
from mdiff.ops import BACKENDS, draw

COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_the_library = pytest.mark.skipif(
    COMPILER is None and "c" not in BACKENDS, reason="no C compiler, so that no library is built"
)
# What float32 may move the edge of a cumulative distribution by.
ROUNDING = 2e-6


def normal(rows, vocab, seed=0):
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def distance_to_an_edge(logits, counter, tile):
    """How near a uniform of each row comes to a decision, in probability, (N,) float64.

    The decisions of the tile reservoir: a tile is accepted where u (S + s) < s, and in an
    accepted tile the id is the first whose cumulative share passes v.
    """
    rows, vocab = logits.shape
    tiles = -(-vocab // tile)
    padded = torch.full((rows, tiles * tile), -torch.inf, dtype=torch.float64)
    padded[:, :vocab] = logits
    weight = (padded - padded.amax(1, keepdim=True)).exp().view(rows, tiles, tile)
    mass = weight.sum(2)
    seed, sample, step, position = (
        counter[name][:, None] for name in ("seed", "sample", "step", "position")
    )
    lane = torch.arange(tiles) + (philox.DRAW << 24)
    accept, pick, _, _ = philox.words(seed, position, sample, step, lane)
    to_accept = (philox.to_uniform(accept) - mass / mass.cumsum(1)).abs().amin(1)
    share = weight.cumsum(2) / mass.clamp(min=1e-300)[:, :, None]
    inside = (philox.to_uniform(pick)[:, :, None] - share).abs().amin(2).amin(1)
    return torch.minimum(to_accept, inside)


def test_c_is_built_where_there_is_a_compiler_and_is_then_what_the_cpu_runs(monkeypatch):
    monkeypatch.delenv("MDIFF_BACKEND", raising=False)
    assert ("c" in BACKENDS) != ("c" in ops.MISSING)
    if COMPILER is not None:
        assert "c" in BACKENDS, ops.MISSING
    assert ops.backend_name() == ("c" if "c" in BACKENDS else "torch")
    assert ops.backend_name(device="cuda") == "torch"


def test_without_the_library_torch_runs_and_asking_for_c_is_an_error(monkeypatch):
    monkeypatch.delitem(BACKENDS, "c")
    monkeypatch.setitem(ops.MISSING, "c", "its library is not built")
    monkeypatch.delenv("MDIFF_BACKEND", raising=False)
    assert ops.backend_name() == "torch"
    assert draw(torch.zeros(1, 3), seed=0).tokens.shape == (1,)
    assert doctor.backends()["c"] == "missing: its library is not built"
    assert doctor.backends()["torch"] == "runs, as c is missing"
    for ask in ({"backend": "c"}, {}):
        monkeypatch.setenv("MDIFF_BACKEND", "c")
        with pytest.raises(BackendError, match="not built") as caught:
            draw(torch.zeros(1, 3), seed=0, **ask)
        assert caught.value.exit_code == 5
    assert "asked for by MDIFF_BACKEND, but" in doctor.backends()["c"]


def test_a_library_that_is_missing_broken_or_of_another_version_is_not_used(tmp_path, monkeypatch):
    library, why = module.load([str(tmp_path)])
    assert library is None
    assert "not built" in why
    (tmp_path / "_onepass.x.so").write_bytes(b"no library")
    library, why = module.load([str(tmp_path)])
    assert library is None
    assert "does not load" in why
    if "c" in BACKENDS:
        monkeypatch.setattr(module, "ABI", module.ABI + 1)
        library, why = module.load(list(module.mdiff.kernels.__path__))
        assert library is None
        assert "install again" in why


@needs_the_library
def test_doctor_says_that_c_runs_and_what_it_hands_over(monkeypatch):
    monkeypatch.delenv("MDIFF_BACKEND", raising=False)
    found = doctor.backends()
    assert found["c"].startswith("runs on the CPU")
    assert "float64 logits over to torch" in found["c"]
    assert "draw by c" in {check["name"] for check in doctor.backend_checks() if check["passed"]}


@needs_the_library
@pytest.mark.parametrize(
    ("kind", "options", "path"),
    [
        (torch.float32, {}, "c"),
        (torch.bfloat16, {"temperature": 0.5}, "c"),
        (torch.float16, {"min_p": 0.1, "never": (1,), "span": (0, 20)}, "c"),
        (torch.float32, {"temperature": 0.0, "measure": "drawn"}, "c"),
        (torch.float32, {"top_k": 30, "top_p": 1.0}, "c"),
        (torch.float32, {"top_k": 3}, "c"),
        (torch.bfloat16, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}, "c"),
        (torch.float32, {"top_p": 0.5}, "c"),
        (torch.float64, {}, "torch"),
    ],
    ids=str,
)
def test_c_runs_unless_it_says_that_it_hands_over(kind, options, path, monkeypatch):
    ran = []
    library = module.LIBRARY

    class Watched:
        def onepass_draw(self, request):
            ran.append("c")
            return library.onepass_draw(request)

    def watched_torch(*args, **options):
        ran.append("torch")
        return draw_torch(*args, **options)

    monkeypatch.setattr(module, "LIBRARY", Watched())
    monkeypatch.setattr(module, "draw_torch", watched_torch)
    monkeypatch.delenv("MDIFF_BACKEND", raising=False)
    logits = normal(4, 30).to(kind)
    draw(logits, seed=1, **options)
    assert ran == [path]
    reason = module.by_torch(logits)
    assert (reason is None) == (path == "c")


@needs_the_library
def test_c_refuses_logits_that_are_not_on_the_cpu():
    with pytest.raises(BackendError, match="CPU"):
        draw(torch.zeros(1, 3, device="meta"), seed=0, backend="c")


@needs_the_library
@pytest.mark.parametrize(("tile", "scale"), [(16, 0.0), (16, 1.0), (TILE, 0.0), (TILE, 4.0)])
def test_ids_differ_from_torch_and_the_reference_at_near_ties_only(tile, scale):
    """20,000 rows: the few that differ all have a uniform within rounding of a decision."""
    rows, vocab = 20_000, 200
    logits, counter = scale * normal(rows, vocab, seed=3), counters(rows)
    one, two = (run(logits, tile=tile, **counter).tokens for run in (module.draw_c, draw_torch))
    near = distance_to_an_edge(logits, counter, tile) < ROUNDING
    assert near[one != two].all()
    assert near.double().mean() < 2e-3
    some = torch.cat([torch.arange(100), (one != two).nonzero()[:, 0]])
    true = draw_reference(logits[some], tile=tile, **{k: v[some] for k, v in counter.items()})
    assert near[some][one[some] != true.tokens].all()


@needs_the_library
def test_the_stream_is_that_of_philox_for_any_64_bit_counter():
    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(-(2**63), 2**63 - 1, (4, 3000), generator=generator)
    counter = dict(zip(("seed", "sample", "step", "position"), keys))
    logits = normal(3000, 90)
    one, two = (run(logits, tile=32, **counter).tokens for run in (module.draw_c, draw_torch))
    near = distance_to_an_edge(logits, counter, 32) < ROUNDING
    assert near[one != two].all()
    assert (one == two).double().mean() > 0.99


@needs_the_library
def test_the_exponential_is_that_of_float64():
    """Ids at z beside one at 0: their mass, from the log-probability of the one.

    One such id measures the exponential, within 3e-7 of its value. 1,023 also measure a lane's
    sum: 64 numbers, then 4 or 5 sums of lanes, each addition within 2^-24 of the sum.
    """
    z = torch.linspace(-30, 0, 4001)
    for others, rounding in ((1, 2e-7), (1023, 3e-7 + 69 * 2**-24)):
        logits = torch.cat([torch.zeros_like(z)[:, None], z[:, None].repeat(1, others)], 1)
        out = draw(logits, seed=1, temperature=0, backend="c")
        log_p = logits.double().log_softmax(1)
        assert (out.log_prob - log_p[:, 0]).abs().max() < rounding
        entropy = -(log_p.exp() * log_p).sum(1)
        assert (out.entropy - entropy).abs().max() < 2 * rounding


@needs_the_library
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_is_read_as_it_is(kind):
    pattern = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(kind)
    logits = torch.stack([pattern, torch.zeros_like(pattern)], 1)
    one = draw(logits, seed=1, backend="c", temperature=0)
    two = draw(logits.float(), seed=1, backend="torch", temperature=0)
    assert torch.equal(one.tokens, two.tokens)
    # torch takes no logit as further than 800 from the largest.
    far = (pattern.float().abs() > 800)[:, None] | pattern.isnan()[:, None]
    for a, b in zip(one[1:], two[1:]):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.allclose(a[~far[:, 0]], b[~far[:, 0]], atol=1e-6)
    logits = normal(50, 2500).to(kind)
    one, two = draw(logits, seed=1, backend="c"), draw(logits.float(), seed=1, backend="c")
    assert all(torch.equal(a, b) for a, b in zip(one, two))


@needs_the_library
def test_two_threads_give_what_one_gives_bit_for_bit():
    logits = normal(100, 50_257)
    before = torch.get_num_threads()
    drawn = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            drawn.append(draw(logits, seed=4, temperature=0.9, backend="c"))
    finally:
        torch.set_num_threads(before)
    for other in drawn[1:]:
        assert all(torch.equal(a, b) for a, b in zip(drawn[0], other))


@needs_the_library
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"min_p": 0.1}, {"top_k": 2}, {"top_p": 0.1}], ids=str
)
def test_every_output_is_written(options, monkeypatch):
    empty = torch.empty

    def poisoned(*shape, dtype=torch.float32, device=None):
        return empty(*shape, dtype=dtype, device=device).fill_(
            -7 if dtype == torch.int64 else torch.nan
        )

    monkeypatch.setattr(torch, "empty", poisoned)
    out = module.draw_c(normal(37, 1500), **options, **counters(37))
    assert (out.tokens >= 0).all()
    assert not any(field.isnan().any() for field in out[1:])


@needs_the_library
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"min_p": 0.1}, {"top_k": 7}, {"top_p": 0.9}], ids=str
)
def test_nan_anywhere_that_is_read_leaves_a_row_without_a_law(options):
    logits = normal(8, 3000)
    logits[0, 2999] = torch.nan
    logits[1, 1024:2048] = -torch.nan
    logits[2, 5] = torch.inf
    logits[3, :2048] = -torch.inf
    logits[3, 700] = torch.nan
    logits[4, 1024:2048] = -torch.inf
    logits[5, :2900] = -torch.inf
    logits[6, [0, 2998]] = torch.nan
    span = torch.tensor([[0, 3000]] * 6 + [[1, 2990], [9, 9]])
    one = draw(logits, seed=1, span=span, backend="c", **options)
    two = draw(logits, seed=1, span=span, backend="torch", **options)
    assert torch.equal(one.tokens, two.tokens)
    assert one.log_prob.isnan().tolist() == [True] * 4 + [False] * 3 + [True]
    for a, b in zip(one[1:], two[1:]):
        assert torch.allclose(a, b, atol=2e-5, equal_nan=True)


@needs_the_library
def test_columns_outside_the_span_and_never_ids_are_not_looked_at():
    logits = normal(3, 5000)
    spoiled = logits.clone()
    spoiled[:, :1500] = torch.nan
    spoiled[:, 3100:] = torch.inf
    spoiled[:, [1600, 2047, 2048]] = torch.nan
    options = {"span": (1500, 3100), "never": (1600, 2047, 2048), "temperature": 1.2}
    one = draw(spoiled, seed=3, backend="c", **options)
    two = draw(logits, seed=3, backend="c", **options)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not one.entropy.isnan().any()


@needs_the_library
def test_logits_of_any_layout_are_read_without_a_copy():
    wide = normal(40, 2100)
    for logits in (wide[::3], wide[:, 5:2005], wide.T[:40], wide[:1].expand(40, 2100)):
        one = draw(logits, seed=2, backend="c")
        two = draw(logits.contiguous(), seed=2, backend="c")
        assert all(torch.equal(a, b) for a, b in zip(one, two))
    span = torch.tensor([[3] * 40, [30] * 40]).T
    one = draw(wide, seed=2, span=span, backend="c")
    assert torch.equal(one.tokens, draw(wide, seed=2, span=(3, 30), backend="c").tokens)


@needs_the_library
@pytest.mark.parametrize("top_k", [None, 1, 3, 40, 64, 150, 699])
@pytest.mark.parametrize("top_p", [None, 0.02, 0.6, 0.97])
def test_filters_keep_the_same_ids_where_many_logits_are_equal(top_k, top_p):
    """Steps of 1/2 make ties at every edge; each id that is kept is drawn from some row."""
    row = (2 * normal(1, 700, seed=5)).round() / 2
    row[0, ::9] = -torch.inf
    options = {"top_k": top_k, "top_p": top_p, "temperature": 2.0, "measure": "drawn"}
    logits = row.expand(3000, -1)
    one = draw(logits, seed=1, backend="c", **options)
    two = draw(logits, seed=1, backend="torch", **options)
    assert torch.equal(one.tokens.unique(), two.tokens.unique())
    assert (one.tokens == two.tokens).double().mean() > 0.998
    for a, b in zip(one[1:], two[1:]):
        assert torch.allclose(a[one.tokens == two.tokens], b[one.tokens == two.tokens], atol=2e-5)


@needs_the_library
def test_a_filter_of_all_equal_logits_keeps_the_lowest_ids():
    for options, kept in (({"top_k": 70}, 70), ({"top_p": 0.25}, 500), ({"min_p": 1.0}, 2000)):
        drawn = draw(torch.zeros(9000, 2000), seed=2, backend="c", **options)
        assert drawn.tokens.max() < kept
        assert drawn.tokens.unique().numel() > 0.9 * kept


@needs_the_library
@pytest.mark.parametrize("order", ["ascending", "descending", "spike"])
def test_a_peak_that_rises_all_along_a_row_or_at_once_loses_nothing(order):
    """The sums are relative to a reference that the peak leaves behind again and again."""
    row = torch.linspace(-300, 300, 9000)
    if order == "descending":
        row = row.flip(0)
    if order == "spike":
        row = torch.cat([torch.zeros(8000), torch.full((1000,), 12.0)])
    logits = row.expand(200, -1)
    for options in ({}, {"temperature": 3.0}, {"temperature": 0.2}, {"top_p": 0.5}):
        one = draw(logits, seed=1, backend="c", **options)
        true = draw(logits, seed=1, backend="reference", **options)
        assert (one.tokens == true.tokens).double().mean() > 0.98
        same = one.tokens == true.tokens
        for a, b in zip(one[1:], true[1:]):
            assert torch.allclose(a[same].double(), b[same], atol=2e-5)


@needs_the_library
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_p": 0.8}], ids=str)
def test_the_loop_for_any_processor_gives_what_the_widest_gives(kind, options):
    logits = normal(2000, 1100).to(kind)
    logits[5, 30] = torch.nan
    logits[6, 1099] = torch.inf
    logits[7, :1050] = -torch.inf
    try:
        assert module.LIBRARY.onepass_choose(0) == 0
        one = draw(logits, seed=3, backend="c", **options)
    finally:
        wide = module.LIBRARY.onepass_choose(1)
    two = draw(logits, seed=3, backend="c", **options)
    assert wide == ("avx512f" in cpu_flags())
    assert (one.tokens == two.tokens).double().mean() > 0.999
    same = one.tokens == two.tokens
    for a, b in zip(one[1:], two[1:]):
        assert torch.allclose(a[same], b[same], atol=1e-5, equal_nan=True)


def cpu_flags():
    """The instructions that this processor has, by Linux's names."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return {word for line in text.splitlines() if line.startswith("flags") for word in line.split()}
