"""Batches that are being generated, and the finished samples."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mdiff.denoiser import block_length_of
from mdiff.errors import ConfigError
from mdiff.modalities import Describes, Description, EndsText, HasGrid, Modality
from mdiff.pipeline.guidance import GuidanceOptions, null_condition
from mdiff.pipeline.options import CallOptions, Model, call_seed
from mdiff.sampling import (
    BoundSampler,
    Ending,
    State,
    Tally,
    Writing,
    bind,
    growing,
    grown_canvases,
    row_seeds,
)
from mdiff.tokens import stack, stack_conditions

if TYPE_CHECKING:
    from PIL.Image import Image

# Rows that go through the model together.
BATCH = 32
# Of an item that is no image.
NOTHING = Description()


@dataclass(frozen=True)
class Generated:
    """One finished sample.

    `output` is the item that the modality decodes: a str, or a PIL image. `tokens` are its ids,
    the given ones included. `calls` is the number of model evaluations; `seconds` its share of
    the wall-clock time of its batch; `log_prob` the log-probability in nats, summed over the
    drawn tokens; `entropy` the mean entropy of the draws in nats. The same options with `seed`
    and num_samples=1 give this sample again. `description` is what the canvas says of an image,
    `writing` the step, log-probability, entropy and margin of each token's draw and how often it
    was written, as in `mdiff.sampling.LastWriting`: all 0 for a given one. `grow` is how its
    length was found, "" where it was given, and `log_prob_is_exact` whether `log_prob` is the
    log-likelihood of the drawn tokens in their order, as in `mdiff.sampling.Sample`.

    `text`, `image` and `token_ids` are the same under the names of transformers and diffusers.
    """

    output: object
    tokens: list[int]
    calls: int
    seconds: float
    log_prob: float
    entropy: float
    seed: int
    description: Description = NOTHING
    writing: Writing = field(default_factory=Writing)
    grow: str = ""
    log_prob_is_exact: bool = False

    @property
    def text(self) -> str:
        """The text; of an image its caption, else its label, where they are parts, else ""."""
        if isinstance(self.output, str):
            return self.output
        return self.description.caption or self.description.label or ""

    @property
    def image(self) -> Image | None:
        """The output where it is a PIL image, else None."""
        from PIL.Image import Image

        return self.output if isinstance(self.output, Image) else None

    @property
    def token_ids(self) -> list[int]:
        """The ids of all tokens, the given ones included."""
        return self.tokens

    def __str__(self) -> str:
        """The output as text."""
        return str(self.output)


@dataclass
class Generation:
    """One batch that is being generated: iterate over its states, then take `finished()`.

    `first` is the number of its first row among all rows asked for; `canvas` (B, L) int64,
    `valid` and `given` (B, L) bool or None and `seeds` (B,) int64 are what the sampler was given.
    `grow` says how its length was found, if it was, and `calls` by how many calls of each row.
    """

    first: int
    canvas: Tensor
    valid: Tensor | None
    seeds: Tensor
    modality: Modality
    states: Iterator[State]
    mask_id: int
    ending: Ending = field(default_factory=Ending)
    given: Tensor | None = None
    grow: str = ""
    calls: Sequence[int] = ()
    seconds: float = 0.0
    tally: Tally = field(init=False)

    def __post_init__(self) -> None:
        self.tally = Tally(self.canvas)

    def __iter__(self) -> Iterator[State]:
        """The states; the clock runs, and gradients are off, only while the sampler does.

        Raises CheckpointError at the end where a draw had no probabilities to draw from.
        """
        while True:
            start = time.perf_counter()
            with torch.no_grad():
                state = next(self.states, None)
                if state is not None:
                    self.tally.add(state)
            self.seconds += time.perf_counter() - start
            if state is None:
                break
            yield state
        self.tally.sample()

    def tokens(self, row: int) -> list[int]:
        """The current tokens of a row, without padding and, of one that grows, up to the last."""
        ids: list[int] = self._unpadded(self.tally.tokens, row).tolist()
        while self.grow == "blocks" and ids and ids[-1] == self.mask_id:
            ids.pop()
        return ids

    def output(self, row: int) -> object:
        """The item that the modality decodes from the current tokens of a row."""
        ids = self.tokens(row)
        if not self.ending.ids and self.ending.echo:
            return self.modality.decode(ids)
        shown = self.ending.shown(ids, self.hidden(row))
        if isinstance(self.modality, EndsText):
            return self.modality.decode(shown, whole=True)
        return self.modality.decode(shown)

    def pieces(self, row: int) -> list[str | None]:
        """The text of each position of a row, None where it is masked.

        Given ones are always shown, drawn ones up to the first drawn end that cuts the text.
        """
        ids, hidden = self.tokens(row), self.hidden(row)
        if not isinstance(self.modality, EndsText):
            return self.modality.pieces(ids)
        stop = self.ending.stop(ids, hidden)
        left_out = [i >= stop and drawn for i, drawn in enumerate(hidden)]
        kept = [self.mask_id if out else token for token, out in zip(ids, left_out)]
        pieces = self.modality.pieces(kept, whole=True)
        return [
            "" if out and token != self.mask_id else piece
            for piece, out, token in zip(pieces, left_out, ids)
        ]

    def hidden(self, row: int) -> list[bool]:
        """Whether each position of a row was to be written: masked at the start, or not given."""
        free = self.canvas == self.mask_id if self.given is None else ~self.given
        found: list[bool] = self._unpadded(free, row).tolist()
        return found

    def finished(self) -> list[Generated]:
        """Every sample of the batch, after running it to its end."""
        for _ in self:
            pass
        result = self.tally.sample()
        medium = self.modality if isinstance(self.modality, Describes) else None
        return [
            Generated(
                output=self.output(row),
                tokens=(ids := self.tokens(row)),
                calls=int(result.calls[row]) + (self.calls[row] if self.calls else 0),
                seconds=self.seconds / len(self.canvas),
                log_prob=float(result.log_prob[row]),
                entropy=float(result.entropy[row]),
                seed=int(self.seeds[row]),
                description=medium.described(ids) if medium else NOTHING,
                writing=result.writing.of_row(row, self.valid, len(ids)),
                grow=self.grow,
                log_prob_is_exact=result.log_prob_is_exact,
            )
            for row in range(len(self.canvas))
        ]

    def _unpadded(self, rows: Tensor, row: int) -> Tensor:
        return rows[row] if self.valid is None else rows[row][self.valid[row]]


def generations(
    model: Model, canvases: Sequence[Sequence[int]],
    conditions: Sequence[Mapping[str, int | Tensor]] | None, options: CallOptions,
    given: Sequence[Sequence[bool]] | None = None,
) -> Iterator[Generation]:  # fmt: skip
    """The batches of canvases; see `Pipeline.runs`. All checks are made before the first one."""
    batch_size = options.pop("batch_size", BATCH)
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: need at least 1")
    text = model.modality if isinstance(model.modality, EndsText) else None
    ids = () if text is None else text.end_ids
    ending = Ending(ids, options.pop("end", "cut"), options.pop("echo", True))
    space = ending.space(model.generated_space)
    grow = options.pop("grow", None) or ""
    canvases, calls = grown_canvases(
        grow, canvases, model.denoiser, space=space, ending=ending, revised=given is not None,
        device=model.device,
    )  # fmt: skip
    # A row that has ended is not to wait for another.
    batch_size = 1 if grow == "blocks" else batch_size
    guidance, seed = GuidanceOptions.of(options), call_seed(options)
    stops = text is not None and ending.policy == "cut" and grow != "blocks"
    stop = text.eos_id if text is not None and stops else None
    stated = model.stated.beside(options) if given is None else {}
    bound = _bound(model, options, stated, longest=max(map(len, canvases), default=0), stop=stop)
    null = null_condition(model.modality, guidance.negative)
    asked = list(conditions or [{}] * len(canvases))
    if len(asked) != len(canvases):
        raise ConfigError(f"{len(asked)} conditions for {len(canvases)} canvases")
    if given is not None and [len(row) for row in given] != [len(row) for row in canvases]:
        raise ConfigError("given: expected a bool for each token of each canvas")
    guide = guidance.bind(model, canvases)
    guidance.check_effect(model, canvases, asked, bool(null))
    parts = [slice(i, i + batch_size) for i in range(0, max(1, len(canvases)), batch_size)]
    stacked = [stack(canvases[part], space=model.space) for part in parts]
    seeds, device = row_seeds(seed, len(canvases)), model.device

    def batches() -> Iterator[Generation]:
        for part, (tokens, valid) in zip(parts, stacked):
            canvas = tokens.to(device)
            valid = None if valid is None else valid.to(device)
            denoiser, own = guide(canvas, valid)
            cond = stack_conditions(asked[part], null) | own
            fixed = None if given is None else _given(given[part], canvas)
            run = growing(bound, ending.ids) if grow == "blocks" else bound
            states = run(
                denoiser, canvas, space=space.checked(), seed=seeds[part].to(device), valid=valid,
                cond={name: value.to(device) for name, value in cond.items()} or None, given=fixed,
            )  # fmt: skip
            yield Generation(
                part.start, canvas, valid, seeds[part], model.modality, states, space.mask_id,
                ending, fixed, grow, calls[part],
            )  # fmt: skip

    return batches()


def _given(rows: Sequence[Sequence[bool]], canvas: Tensor) -> Tensor:
    """The rows side by side, (B, L) bool as the canvas; padding is given."""
    length = canvas.shape[1]
    padded = [[*row, *[True] * (length - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.bool, device=canvas.device)


def _bound(
    model: Model, options: CallOptions, stated: dict[str, float], *, longest: int, stop: int | None
) -> BoundSampler:  # fmt: skip
    """The sampler and its options with those that the model sets by default.

    These are what its files have `stated`, the id that ends a text, its window, its blocks and
    grid and, where it uses the time, its schedule. Raises ConfigError for a canvas that is longer
    than the window, where the sampler cannot move the window along.
    """
    sampler = options.pop("sampler", None)
    default = model.own_options(options)
    if block_length_of(model.denoiser) is not None:
        stated.pop("block_length", None)
    steps = stated.pop("steps", None)
    named = default if sampler is None else sampler
    bound = bind(named, {**stated, **options}, model.denoiser)
    if steps is not None and "steps" in inspect.signature(bound.inner).parameters:
        bound = bound.with_default("steps", steps)
    if stop is not None:
        bound = bound.with_default("stop", stop)
    if isinstance(model.modality, HasGrid):
        bound = bound.with_default("grid", model.modality.grid)
    if model.window is not None and longest > model.window:
        if not bound.takes("context"):
            raise ConfigError(
                f"a canvas of {longest} tokens is longer than the model's window of "
                f"{model.window}: use sampler 'blocks', which moves the window along"
            )
        context = options.get("context") or model.window
        bound = bound.with_default("context", context)
        default = inspect.signature(bound.function).parameters["block_length"].default
        bound = bound.with_default("block_length", min(default, context))
    return bound
