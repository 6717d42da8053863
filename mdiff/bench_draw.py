"""The draw timed against what others run, after both sides' law was checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mdiff.bench_timing import (
    Row,
    Size,
    Timing,
    cpu_seconds,
    cuda_seconds,
    interleaved,
    times_faster,
)
from mdiff.errors import BackendError
from mdiff.machine import last_cache_bytes
from mdiff.ops import backend_name, draw
from mdiff.peers import amused_step, diffusers_amused_step, llada_step, mdlm_step
from mdiff.selftest import chi_square_p

MDLM, MDLM_FLOAT32 = "MDLM float64", "MDLM float32"
LLADA, AMUSED, DIFFUSERS = "LLaDA float64", "AmusedScheduler.step", "diffusers AmusedScheduler"
OURS = ("c", "torch")

# Issue 5: how many times faster, by backend and vocabulary.
TARGETS: Mapping[tuple[str, int], Mapping[str, float]] = {
    ("c", 50_257): {MDLM: 150, LLADA: 100, AMUSED: 60, DIFFUSERS: 60},
    ("torch", 50_257): {MDLM: 25, LLADA: 18, AMUSED: 11, DIFFUSERS: 11},
    ("c", 4096): {MDLM: 100, LLADA: 50, AMUSED: 45, DIFFUSERS: 45},
}
READ_SHARE = 60.0
GPU_TARGETS = {LLADA: 45.0, MDLM: 40.0}
GPU_VOCAB, GPU_REPEATS = 126_464, 10

LAW_IDS, LAW_DRAWS = 40, 20_000
FALSE_ALARM = 1e-6
# The standard deviation of the logits, as of a model of text that is not sure.
SPREAD = 3.0
BYTES = 4


@dataclass(frozen=True)
class Case:
    """Logits that both sides get, and a canvas.

    `logits_NV` (N, V), the last column -inf: that of the mask, as MDLM and LLaDA have it inside
    the vocabulary, so that all sides draw from the same law. `tokens_N` (N,) holds the mask where
    hidden; `asked_MV` are the hidden rows, as a denoiser returns them when asked by `at`. The
    step goes from time t to s where the baseline has times.
    """

    logits_NV: Tensor
    tokens_N: Tensor
    asked_MV: Tensor
    t: float = 0.5
    s: float = 0.499

    @property
    def mask_id(self) -> int:
        """The last column."""
        return self.logits_NV.shape[1] - 1

    @property
    def hidden_N(self) -> Tensor:
        """Where a token is drawn."""
        return self.tokens_N == self.mask_id


@dataclass(frozen=True)
class Law:
    """Whether a side draws from softmax and leaves given tokens alone."""

    name: str
    p_value: float
    given_kept: bool

    @property
    def passed(self) -> bool:
        """No chi-square beyond the false alarm of 1e-6, no given token changed."""
        return self.p_value > FALSE_ALARM and self.given_kept


Side = Callable[[Case], Tensor]


def sides(device: str = "cpu", ours: tuple[str, ...] = OURS) -> tuple[dict[str, Side], list[str]]:
    """Every side that runs here, by name, ours first, and why each of the others does not.

    A side returns the tokens (N,) of a case after its draw.
    """

    def of_backend(name: str) -> Side:
        return lambda case: case.tokens_N.masked_scatter(
            case.hidden_N, draw(case.asked_MV, seed=1, backend=name).tokens
        )

    def of_mdlm(dtype: torch.dtype) -> Side:
        # In float32 its in-place operations would change the logits that all sides share.
        return lambda case: mdlm_step(
            case.logits_NV.to(dtype, copy=True), case.tokens_N, mask_id=case.mask_id, t=case.t,
            s=case.s, dtype=dtype,
        )  # fmt: skip

    found: dict[str, Side] = {}
    missing = []
    for name in ours:
        try:
            found[backend_name(name, device=device)] = of_backend(name)
        except BackendError as error:
            missing.append(str(error))
    found[MDLM], found[MDLM_FLOAT32] = of_mdlm(torch.float64), of_mdlm(torch.float32)
    found[LLADA] = lambda case: llada_step(case.logits_NV, case.tokens_N, mask_id=case.mask_id)[0]
    found[AMUSED] = lambda case: amused_step(case.logits_NV, case.tokens_N, mask_id=case.mask_id)[1]
    try:
        diffusers_amused_step(0)
        found[DIFFUSERS] = lambda case: diffusers_amused_step(case.mask_id)(
            case.logits_NV, case.tokens_N
        )[1]
    except BackendError as error:
        missing.append(str(error))
    return found, missing


def make_case(rows: int, vocab: int, *, device: str = "cpu", dtype: torch.dtype) -> Case:
    """Normal logits of `SPREAD`, half of the rows hidden."""
    generator = torch.Generator(device).manual_seed(0)
    logits_NV = torch.randn(rows, vocab, generator=generator, device=device).mul_(SPREAD).to(dtype)
    logits_NV[:, -1] = -torch.inf
    tokens_N = torch.randint(vocab - 1, (rows,), generator=generator, device=device)
    order_N = torch.randperm(rows, generator=generator, device=device)
    tokens_N[order_N[: rows // 2]] = vocab - 1
    return Case(logits_NV, tokens_N, logits_NV[tokens_N == vocab - 1])


def law_case(device: str = "cpu") -> Case:
    """One row of `LAW_IDS` ids, `LAW_DRAWS` times hidden and as often given."""
    generator = torch.Generator().manual_seed(1)
    row_V = torch.randn(LAW_IDS + 1, generator=generator).mul(SPREAD / 2)
    row_V[-1] = -torch.inf
    tokens_N = torch.randint(LAW_IDS, (2 * LAW_DRAWS,), generator=generator)
    tokens_N[::2] = LAW_IDS
    logits_NV = row_V.expand(2 * LAW_DRAWS, -1).contiguous().to(device)
    # A long step, so that the joint categorical has both of its outcomes.
    return Case(logits_NV, tokens_N.to(device), logits_NV[::2].contiguous(), t=1.0, s=0.4)


def law(name: str, side: Side, case: Case) -> Law:
    """The chi-square of a side's draws; those of MDLM have the mask with probability s / t."""
    torch.manual_seed(2)
    drawn_N = side(case)
    stays = case.s / case.t if name in (MDLM, MDLM_FLOAT32) else 0.0
    p_V = case.logits_NV[0].double().softmax(0) * (1 - stays)
    p_V[case.mask_id] = stays
    hidden_N = case.hidden_N
    observed_V = torch.bincount(drawn_N[hidden_N], minlength=len(p_V)).double()
    impossible = p_V == 0
    if bool((observed_V[impossible] > 0).any()):
        p_value = 0.0
    else:
        expected_V = p_V * hidden_N.sum()
        p_value = chi_square_p(observed_V[~impossible].cpu(), expected_V[~impossible].cpu())
    return Law(name, p_value, torch.equal(drawn_N[~hidden_N], case.tokens_N[~hidden_N]))


def laws(found: Mapping[str, Side], device: str = "cpu") -> dict[str, Law]:
    """The law of every side, by name."""
    case = law_case(device)
    return {name: law(name, side, case) for name, side in found.items()}


def draw_rows(
    size: Size, found: Mapping[str, Side], checked: Mapping[str, Law], say: Callable[[str], None]
) -> Iterator[Row]:
    """The draw of each backend against each baseline, then the pass against reading alone."""
    others = [name for name in found if name not in (*OURS, MDLM_FLOAT32)]
    for vocab in (size.vocab, size.small):
        case = make_case(size.rows, vocab, dtype=torch.float32)
        say(f"draw, V = {vocab:,}, {size.rows} rows")
        tasks = {name: _task(found[name], case) for name in found if name != MDLM_FLOAT32}
        timings = interleaved(tasks, repeats=size.repeats)
        for ours in (name for name in OURS if name in found):
            for other in others:
                yield times_faster(
                    "draw", f"draw by {ours}, V = {vocab:,}, against {other}",
                    timings[ours], timings[other], rows=(len(case.asked_MV), size.rows),
                    target=TARGETS.get((ours, vocab), {}).get(other),
                    note=_failures(checked, ours, other),
                )  # fmt: skip
    say("draw, one pass against reading alone")
    yield from (pass_row(name, size) for name in OURS[:1] if name in found)


def pass_row(backend: str, size: Size) -> Row:
    """The bytes a second of the draw, with entropy and margin, over those of reading alone.

    Reading is the fastest of torch's sum, maximum and dot product over the same buffer, which is
    at least twice the last cache.
    """
    cache = last_cache_bytes()
    rows = max(512, -(-2 * (cache or 0) // (BYTES * size.vocab)))
    logits_NV = make_case(rows, size.vocab, dtype=torch.float32).logits_NV
    flat = logits_NV.flatten()
    readers: dict[str, Callable[[], object]] = {
        "sum": flat.sum,
        "amax": flat.amax,
        "dot": lambda: torch.dot(flat, flat),
    }
    tasks = {"draw": lambda: draw(logits_NV, seed=1, backend=backend), **readers}
    # Cheap enough to repeat more often than the rest.
    timings = interleaved(tasks, repeats=max(5, size.repeats))
    reader = min(readers, key=lambda name: timings[name].minimum)
    ours, read = timings["draw"], timings[reader]
    return Row(
        "draw", f"one pass by {backend}, V = {size.vocab:,}: share of the read bandwidth",
        100 * read.minimum / ours.minimum, 100 * read.median / ours.median, unit="%",
        target=READ_SHARE,
        detail={
            "mdiff": {"seconds": ours.seconds, "rows": rows}, "read_by": reader,
            "other": {"seconds": read.seconds, "rows": rows}, "buffer_bytes": BYTES * flat.numel(),
            "last_cache_bytes": cache, "read_bytes_per_second": BYTES * flat.numel() / read.minimum,
        },
    )  # fmt: skip


def gpu_rows(size: Size, say: Callable[[str], None]) -> Iterator[Row]:
    """On a CUDA machine: the Triton draw against LLaDA and MDLM as they run there, by events.

    All rows are hidden here and both sides work on all of them; the logits, bfloat16, are larger
    than the second cache.
    """
    if not torch.cuda.is_available():
        return
    found, missing = sides("cuda", ("triton",))
    if "triton" not in found:
        yield Row("draw", "draw by triton on the GPU", note=missing[0])
        return
    say(f"draw on the GPU, V = {GPU_VOCAB:,}, {size.rows} rows")
    found = {name: found[name] for name in ("triton", LLADA, MDLM)}
    checked = laws(found, "cuda")
    half = make_case(size.rows, GPU_VOCAB, device="cuda", dtype=torch.bfloat16)
    tokens_N = torch.full_like(half.tokens_N, half.mask_id)
    case = Case(half.logits_NV, tokens_N, half.logits_NV)
    timings = interleaved(
        {name: _task(side, case) for name, side in found.items()}, repeats=GPU_REPEATS,
        seconds=cuda_seconds,
    )  # fmt: skip
    for other in (LLADA, MDLM):
        yield times_faster(
            "draw", f"draw by triton on the GPU, V = {GPU_VOCAB:,}, bfloat16, against {other}",
            timings["triton"], timings[other], rows=(size.rows, size.rows),
            target=GPU_TARGETS[other], note=_failures(checked, "triton", other),
        )  # fmt: skip


def _task(side: Side, case: Case) -> Callable[[], Tensor]:
    return lambda: side(case)


def _failures(checked: Mapping[str, Law], *names: str) -> str:
    failing = [name for name in names if not checked[name].passed]
    return f"the law of {' and '.join(failing)} fails its check" if failing else ""


__all__ = ["Case", "Law", "Timing", "cpu_seconds", "draw_rows", "gpu_rows", "laws", "sides"]
