"""Generations timed against the samplers of MDLM, and the time of a step outside the model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from statistics import mean, median

import torch
from torch import Tensor

from mdiff.backbones.transformer import transformer
from mdiff.denoiser import HasHead
from mdiff.evaluation.bench.baselines import mdlm_draw, mdlm_probabilities, mdlm_sampler
from mdiff.evaluation.bench.laws import MDLM, MDLM_FLOAT32, Law, failures
from mdiff.evaluation.bench.timing import CLOCKS, Row, Size, cpu_seconds, ratios
from mdiff.find import find
from mdiff.ops import backend_name, bind_draw
from mdiff.samplers.first_hitting import first_hitting
from mdiff.sampling import Sampler, Tally
from mdiff.tokens import TokenSpace, hidden_canvas

# How many times faster at least, and at most so many percent of a step outside the model.
ANCESTRAL_TARGET, CACHED_TARGET, OUTSIDE_TARGET, REVISING_TARGET = 30.0, 20.0, 1.0, 2.0
# The shape of builtin:shakespeare, but for the vocabulary; its first calls warm up.
OVERHEAD_SHAPE = {"width": 256, "depth": 8, "heads": 4, "mlp_width": 704}
WARM = 5
# Samplers that take tokens back or draw at every hidden position, with so many steps of each.
REVISING = ("remdm", "psi", "path_planning", "edit", "gibbs", "budget")
STEPS = 25


class Timed:
    """A Denoiser that adds up the seconds spent in a model and its head, by each of `CLOCKS`."""

    uses_time = False

    def __init__(self, model: HasHead) -> None:
        self.model = model
        self.seconds = [0.0] * len(CLOCKS)
        self.made = torch.empty(0)

    def __call__(self, tokens: Tensor, **rest: object) -> Tensor:
        """The model's logits."""
        features: Callable[..., Tensor] = self.features
        return self.head(features(tokens, **rest))

    def features(self, tokens: Tensor, *, number: int | None = None, **rest: object) -> Tensor:
        """The model's features."""
        features: Callable[..., Tensor] = self.model.features
        self.made = self._timed(lambda: features(tokens, number=number, **rest))
        return self.made

    def head(self, x: Tensor) -> Tensor:
        """The logits of features."""
        return self._timed(lambda: self.model.head(x))

    def _timed(self, run: Callable[[], Tensor]) -> Tensor:
        begun = [clock() for clock in CLOCKS.values()]
        result = run()
        for i, clock in enumerate(CLOCKS.values()):
            self.seconds[i] += clock() - begun[i]
        return result


def step_seconds(
    *, vocab: int, length: int, samples: int = 1
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each step of first hitting, and its seconds inside the model, by clock.

    The model has the shape of builtin:shakespeare and random weights; the first steps warm up and
    are excluded.
    """
    space = TokenSpace(vocab, mask_id=vocab)
    model = Timed(transformer(vocab_size=vocab, max_length=length, **OVERHEAD_SHAPE).eval())
    steps, inside = [], []
    with torch.inference_mode():
        begun = [clock() for clock in CLOCKS.values()]
        for _ in first_hitting(model, hidden_canvas(samples, length, space=space), space=space):
            steps.append([c() - b for c, b in zip(CLOCKS.values(), begun)])
            inside.append(model.seconds)
            model.seconds = [0.0] * len(CLOCKS)
            begun = [clock() for clock in CLOCKS.values()]
    by_clock = zip(CLOCKS, zip(*steps[WARM:]), zip(*inside[WARM:]))
    return {name: (list(whole), list(within)) for name, whole, within in by_clock}


def overhead_row(size: Size, say: Callable[[str], None]) -> Row:
    """The share of a step of first hitting that is not spent in the model, one sample."""
    say(f"overhead, V = {size.vocab:,}, L = {size.length}")
    torch.manual_seed(0)
    whole, inside = step_seconds(vocab=size.vocab, length=size.length)["thread"]
    outside = [w - i for w, i in zip(whole, inside)]
    return Row(
        "overhead", f"outside the model, V = {size.vocab:,}, L = {size.length}: share of a step",
        *ratios(outside, whole, 100), unit="%", target=OUTSIDE_TARGET, at_least=False,
        detail={"backend": backend_name(), "step_seconds": whole, "outside_seconds": outside},
    )  # fmt: skip


def revising_row(size: Size, name: str, say: Callable[[str], None]) -> Row:
    """The share of a step of a sampler that is neither model nor draw; both of one sample.

    A step includes adding up its figures. The draw is timed again behind each step, on the same
    features; the note says what the share is with it.
    """
    say(f"overhead of {name}, V = {size.vocab:,}, L = {size.length}")
    torch.manual_seed(0)
    vocab, length, clock = size.vocab, size.length, CLOCKS["thread"]
    space = TokenSpace(vocab, mask_id=vocab)
    model = Timed(transformer(vocab_size=vocab, max_length=length, **OVERHEAD_SHAPE).eval())
    canvas = hidden_canvas(1, length, space=space)
    options: dict[str, object] = {"steps": STEPS}
    if name == "edit":
        options = {"threshold": 1, "least": -(-length // STEPS)}
    if name == "budget":
        options = {}
    if name == "gibbs":
        # From a finished canvas on, so that no step is one of first hitting.
        canvas = torch.randint(vocab, canvas.shape)
        options = {"sweeps": STEPS / length, "given": torch.zeros_like(canvas, dtype=torch.bool)}
    sampler: Sampler = find("samplers", name)
    draw, tally = bind_draw(vocab), Tally(canvas)
    whole, drawing, outside, rows = [], [], [], []
    with torch.inference_mode():
        states = sampler(model, canvas, space=space, **options)
        begun = clock()
        for state in islice(states, STEPS):
            tally.add(state)
            whole.append(clock() - begun)
            outside.append(whole[-1] - model.seconds[0])
            rows.append(len(model.made))
            zero, model.seconds[0] = torch.zeros(rows[-1], dtype=torch.int64), 0.0
            begun = clock()
            draw.of_features(model.made, model.head, seed=zero, sample=zero, step=zero,
                             position=zero)  # fmt: skip
            drawing.append(clock() - begun - model.seconds[0])
            model.seconds[0], begun = 0.0, clock()
    whole, outside, drawing = whole[WARM:], outside[WARM:], drawing[WARM:]
    # Minima of each clock, not of a difference of two measurements.
    beside, middle = (100 * (of(outside) - of(drawing)) / of(whole) for of in (min, median))
    share = 100 * median(outside) / median(whole)
    return Row(
        "overhead", f"{name}, outside the model and the draw, V = {vocab:,}, L = {length}",
        beside, middle, unit="%", target=REVISING_TARGET, at_least=False,
        note=f"{share:.2f} % with the draw of {median(rows):.0f} rows",
        detail={"backend": backend_name(), "step_seconds": whole, "outside_seconds": outside,
                "draw_seconds": drawing, "rows": rows},
    )  # fmt: skip


class Generation:
    """One model and a stretch of each sampler at a time, all in seconds a step.

    The baselines run at `size.timed` times spread evenly over [0, 1], each on a canvas with the
    share of hidden positions of that time, or in full, stretch after stretch, with `size.full`.
    """

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        self.size, self.calls, self.mask_id = size, {False: 0, True: 0}, size.vocab - 1
        # The mask is a column, as MDLM has it; our draw forbids it.
        self.space = TokenSpace(size.vocab, mask_id=self.mask_id)
        self.model = transformer(
            vocab_size=size.vocab, mask_id=self.mask_id, width=size.width, depth=size.depth,
            max_length=size.length,
        ).eval()  # fmt: skip
        self.start = hidden_canvas(1, size.length, space=self.space)
        times = torch.linspace(1, 0, size.steps + 1, dtype=torch.float64).tolist()
        self.ours = first_hitting(self.model, self.start, space=self.space)
        self.whole = {cached: self.baseline(self.start, times, cached) for cached in self.calls}

    def baseline(
        self, canvas: Tensor, times: Sequence[float], cached: bool
    ) -> Iterator[tuple[Tensor, bool]]:
        """MDLM's sampler over these times, in float64 or with the cache in float32."""
        dtype = torch.float32 if cached else torch.float64
        return mdlm_sampler(
            self.model, canvas, mask_id=self.mask_id, times=times, dtype=dtype, cached=cached
        )

    def our_calls(self, stretch: int) -> int:
        """How many of the L calls of first hitting fall into a stretch."""
        timed, length = self.size.timed, self.size.length
        return (stretch + 1) * length // timed - stretch * length // timed

    def first_hitting(self, stretch: int) -> float:
        """Seconds a call of the calls of this stretch."""
        calls = self.our_calls(stretch)
        return cpu_seconds(lambda: [next(self.ours) for _ in range(calls)]) / calls

    def stretch(self, number: int, *, cached: bool) -> float:
        """Seconds a step of a baseline over its share of all steps."""
        steps = self.size.steps // self.size.timed

        def run() -> None:
            for _ in range(steps):
                self.calls[cached] += next(self.whole[cached])[1]

        return cpu_seconds(run) / steps

    def one_step(self, number: int, *, cached: bool) -> float:
        """Seconds of one step of a baseline in the middle of its share of all steps.

        Of the cached one, the draw, which every step has, and the call as often as it is expected.
        """
        size, mask_id = self.size, self.mask_id
        t = 1 - (number + 0.5) / size.timed
        s = t - 1 / size.steps
        canvas = self.start.clone()
        given = torch.randperm(size.length)[round(t * size.length) :]
        canvas[0, given] = torch.randint(mask_id, (len(given),))
        if not cached:
            sampler = self.baseline(canvas, (t, s), cached)
            return cpu_seconds(lambda: next(sampler))
        known = partial(mdlm_probabilities, mask_id=mask_id, dtype=torch.float32)
        found: list[Tensor] = []
        called = cpu_seconds(lambda: found.append(known(self.model(canvas)[0], canvas[0])))
        drawn = cpu_seconds(
            lambda: torch.equal(mdlm_draw(found[0], canvas[0], mask_id=mask_id, t=t, s=s), canvas)
        )
        return drawn + called * expected_calls(size.steps, size.length) / size.steps


def expected_calls(steps: int, length: int) -> float:
    """The expected number of steps of m(t) = t that change something: each position picks one.

    >>> round(expected_calls(1000, 256), 1)
    226.0
    """
    return steps * (1 - (1 - 1 / steps) ** length)


def generation_rows(
    size: Size, checked: Mapping[str, Law], say: Callable[[str], None]
) -> Iterator[Row]:
    """First hitting against 1,000 ancestral steps, and against those with a cache of the call.

    Stretches are not repeats (the cost of a step depends on the time), so that the figure is of
    their total, not of minima.
    """
    run = Generation(size)
    baseline = run.stretch if size.full else run.one_step
    ours: list[float] = []
    others: dict[bool, list[float]] = {False: [], True: []}
    with torch.inference_mode():
        for cached in others:
            run.one_step(0, cached=cached)
        for number in range(size.timed):
            say(f"generation, stretch {number + 1} of {size.timed}")
            ours.append(run.first_hitting(number))
            for cached, other in others.items():
                other.append(baseline(number, cached=cached))
    expected = round(expected_calls(size.steps, size.length))
    how = "" if size.full else f" ({size.timed} timed)"
    for cached, name, label, calls, target in (
        (False, MDLM, "ancestral float64 steps", size.steps, ANCESTRAL_TARGET),
        (True, MDLM_FLOAT32, "cached float32 steps", expected, CACHED_TARGET),
    ):
        calls = run.calls[cached] if size.full else calls
        sides = ((ours, size.length), (others[cached], size.steps))
        whole = [mean(each) * steps for each, steps in sides]
        middle = [median(each) * steps for each, steps in sides]
        yield Row(
            "generation",
            f"generation, V = {size.vocab:,}, L = {size.length}, against {size.steps:,} "
            f"{label}{how}",
            whole[1] / whole[0], middle[1] / middle[0], target=target,
            note=failures(checked, backend_name(), name),
            detail={
                "backend": backend_name(), "extrapolated": not size.full,
                "steps_timed": size.steps if size.full else size.timed, "whole_seconds": whole,
                "calls": (size.length, calls), "rows_of_head": (size.length, calls * size.length),
                "rows_drawn": (size.length, size.steps * size.length),
                "mdiff": {"seconds_a_call": ours}, "other": {"seconds_a_step": others[cached]},
            },
        )  # fmt: skip
