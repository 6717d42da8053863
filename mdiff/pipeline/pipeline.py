"""A model ready for use: denoiser, space, schedule and modality, with what people ask of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdiff.denoiser import Denoiser
from mdiff.errors import ConfigError
from mdiff.kernels import philox
from mdiff.modalities import Conditional, Editable, EndsText, HasGrid, Modality
from mdiff.modalities.image import Edits
from mdiff.objective import Bound
from mdiff.pipeline.features import features as mean_features
from mdiff.pipeline.features import features_at
from mdiff.pipeline.generation import Ending, Generated, Generation
from mdiff.pipeline.guidance import Prompt, Push, told_without
from mdiff.pipeline.loading import Parts, load_parts, save_parts
from mdiff.pipeline.scoring import bound_of_rows, windows
from mdiff.sampling import Sample as Sample
from mdiff.sampling import Sampler, State, in_blocks, option_types, plain_seed, resolve
from mdiff.sampling import sample as sample
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace, stack, stack_conditions

BATCH = 32
# Windows longer than this are not filled unasked: then a canvas has ANSWER tokens to write.
LONG_WINDOW, ANSWER = 1024, 256


@dataclass(frozen=True)
class Pipeline:
    """A loaded model; see `load`.

    `window` is the length it was trained on, None if unknown; `sampler` what generates where none
    is named.
    """

    denoiser: Denoiser
    space: TokenSpace
    modality: Modality
    schedule: Schedule = Linear()  # noqa: RUF009
    window: int | None = None
    sampler: str | Sampler = "first_hitting"

    @property
    def device(self) -> torch.device:
        """Where the denoiser takes its tokens, with its weights; the CPU for one without any."""
        main: torch.device | None = getattr(self.denoiser, "main_device", None)
        if main is not None:
            return main
        weights = getattr(self.denoiser, "parameters", None)
        first = None if weights is None else next(weights(), None)
        return torch.device("cpu") if first is None else first.device

    def generate(
        self,
        prompts: Prompt | Sequence[Any] = "",
        *,
        sampler: str | Sampler | None = None,
        length: int | None = None,
        n: int = 1,
        seed: int | Tensor | torch.Generator = 0,
        batch_size: int = BATCH,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> list[Generated]:
        """`n` samples for each prompt, each a canvas of `length` tokens with what it gives.

        A prompt of a text model is the text that the canvas begins with, or {"chat": text or
        messages}, put as its tokenizer's chat template puts it; of a model of pictures, a
        mapping such as {"label": "sneaker"} or {"caption": "grinning face"}.
        `length` is the model's window by default. `options` are the sampler's, and those of
        `runs`. A canvas longer than the window needs sampler="blocks", which then sees a window
        of it at a time. `guidance_scale` pushes away from what the model says without its
        condition or, where it has none, with what is given masked; `negative` is what a
        model that is told in words is pushed away from instead.

        Raises ConfigError for n, length or batch_size below 1 and for options that the sampler
        does not take, DataError for a prompt that does not fit.
        """
        canvases = self.canvases(prompts, length=length, n=n)
        # Of a chat the answer is shown.
        options.setdefault("echo", not all(_is_chat(prompt) for prompt in _asked(prompts)))
        runs = self.runs(
            canvases, conditions=self.conditions(prompts, n=n), sampler=sampler, seed=seed,
            batch_size=batch_size, guidance_scale=guidance_scale, **options,
        )  # fmt: skip
        return [sample for run in runs for sample in run.finished()]

    def infill(
        self, templates: str | Sequence[str], *, n: int = 1, batch_size: int = BATCH, **options: Any
    ) -> list[Generated]:
        """`n` samples for each template, such as "The [MASK:8] of [MASK:3] night".

        The other options are those of `generate`, `length` excepted.
        """
        canvases = self.templates(templates, n=n)
        runs = self.runs(canvases, batch_size=batch_size, **options)
        return [sample for run in runs for sample in run.finished()]

    def stream(
        self, prompts: Prompt | Sequence[Any] = "", *, length: int | None = None, n: int = 1,
        **options: Any,
    ) -> Iterator[State]:  # fmt: skip
        """The states of all samples as one batch, in the order of `generate`."""
        canvases = self.canvases(prompts, length=length, n=n)
        told = self.conditions(prompts, n=n)
        for run in self.runs(canvases, conditions=told, batch_size=len(canvases), **options):
            yield from run

    def edit(
        self,
        picture: Any,
        mask: Any = None,
        *,
        given: Mapping[str, Any] | None = None,
        strength: float = 1.0,
        n: int = 1,
        seed: int | Tensor | torch.Generator = 0,
        **options: Any,
    ) -> list[Generated]:
        """`n` versions of a picture, made anew where `mask` is true (everywhere without one).

        `mask` is (H, W) bool, or "ROWS,COLUMNS" half-open such as "8:24,8:24". Every token whose
        encoder reads a pixel of the mask is generated, and the original pixels are put back
        outside it, so that not one of them changes. `strength` in [0, 1] is the share of those
        tokens that is hidden, an exact count of places by each sample's seed: 1 makes all of
        them anew. `given` are other parts, such as {"caption": "grinning face"}. The other
        options are those of `generate`.

        Raises ConfigError for a model that has no pictures or a strength outside [0, 1],
        DataError for a picture or a mask that does not fit.
        """
        edits, runs = self.edit_runs(
            picture, mask, given=given, strength=strength, n=n, seed=seed, **options
        )
        made = [sample for run in runs for sample in run.finished()]
        return [replace(sample, output=edits.pasted(sample.output)) for sample in made]

    def edit_runs(
        self,
        picture: Any,
        mask: Any = None,
        *,
        given: Mapping[str, Any] | None = None,
        strength: float = 1.0,
        n: int = 1,
        seed: int | Tensor | torch.Generator = 0,
        **options: Any,
    ) -> tuple[Edits, Iterator[Generation]]:
        """What `edit` makes anew, and its batches as in `runs`; `Edits.pasted` finishes each."""
        if not isinstance(self.modality, Editable):
            raise ConfigError(f"edit: this is a model of {self.modality.name}, not of pictures")
        if n < 1:
            raise ConfigError(f"n={n}: need at least 1")
        seeds = row_seeds(plain_seed(seed, n), n)
        edits = self.modality.edited(
            picture, mask, given=given or {}, strength=strength, seeds=seeds
        )
        runs = self.runs(
            edits.canvases, conditions=self.conditions(given or "", n=n), seed=seeds, **options
        )
        return edits, runs

    def canvases(
        self, prompts: Prompt | Sequence[Any] = "", *, length: int | None = None, n: int = 1
    ) -> list[list[int]]:
        """The canvas of each prompt, `n` times in a row."""
        if length is None and self.window is None:
            raise ConfigError("length is missing, and this model does not say how long to write")
        made = []
        for prompt in _asked(prompts):
            size = self.window if length is None else length
            if length is None and size is not None and size > LONG_WINDOW:
                # So long a window is not what somebody means who names no length.
                size = min(size, len(self.modality.canvas(prompt)) + ANSWER)
            made.append(self.modality.canvas(prompt, size))
        return _times(made, n)

    def conditions(
        self, prompts: Prompt | Sequence[Any] = "", *, n: int = 1
    ) -> list[Mapping[str, int | Tensor]]:
        """What the denoiser is told of each prompt beside its canvas, `n` times in a row."""
        if not isinstance(self.modality, Conditional):
            return [{}] * (n * len(_asked(prompts)))
        told = map(self.modality.condition, _asked(prompts))
        return [one for each in told for one in [each] * n]

    def templates(self, templates: str | Sequence[str], *, n: int = 1) -> list[list[int]]:
        """The canvas of each template with gaps, `n` times in a row."""
        asked = [templates] if isinstance(templates, str) else list(templates)
        return _times([self.modality.template(template) for template in asked], n)

    def runs(
        self,
        canvases: Sequence[Sequence[int]],
        *,
        conditions: Sequence[Mapping[str, int | Tensor]] | None = None,
        sampler: str | Sampler | None = None,
        seed: int | Tensor | torch.Generator = 0,
        batch_size: int = BATCH,
        guidance_scale: float | None = None,
        guidance_schedule: str = "constant",
        guidance_interval: tuple[float, float] | None = None,
        end: str = "cut",
        echo: bool = True,
        negative: Prompt | None = None,
        **options: Any,
    ) -> Iterator[Generation]:
        """Batches of canvases, each to be iterated over; row r has a seed of its own.

        Row 0 has `seed` itself and row r a seed derived from it, so that any row can be had
        again alone. `conditions` are what the denoiser is told of each row. `guidance_schedule`
        and `guidance_interval` are those of `guided`; with a `negative` prompt it pushes away from
        the model with that in place of what is given in front, or of what it is told. `end` says
        what becomes of the ids that end a text: "cut" shows what comes before the first that is
        drawn, "keep" all, "suppress" never draws one. Without `echo` the output leaves out what
        is given in front. What cannot be meant is refused before the first batch.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: need at least 1")
        text = self.modality if isinstance(self.modality, EndsText) else None
        ending = Ending(() if text is None else text.end_ids, end, echo)
        space = ending.space(self.space)
        sampler, asked = in_blocks(
            self.sampler if sampler is None else sampler, options,
            own=getattr(self.denoiser, "block_length", None),
        )  # fmt: skip
        stop = text.eos_id if text is not None and end == "cut" else None
        defaults = self._defaults(sampler, canvases, asked, stop=stop)
        function, settings = resolve(sampler, defaults)
        without = told_without(self.modality, negative)
        told = list(conditions or [{}] * len(canvases))
        if len(told) != len(canvases):
            raise ConfigError(f"{len(told)} conditions for {len(canvases)} canvases")
        if guidance_scale is not None and without and not any(told):
            raise ConfigError(f"guidance_scale without a condition: give {', '.join(without)}")
        asked_push = Push(guidance_scale, guidance_schedule, guidance_interval, negative)
        denoiser, told_by_guidance = asked_push.on(self, canvases)
        stack(canvases, space=self.space)
        seeds = row_seeds(seed, len(canvases))
        device = self.device

        def batches() -> Iterator[Generation]:
            for first in range(0, len(canvases), batch_size):
                tokens, valid = stack(canvases[first : first + batch_size], space=self.space)
                canvas = tokens.to(device)
                valid = None if valid is None else valid.to(device)
                cond = stack_conditions(told[first : first + batch_size], without)
                cond |= told_by_guidance(canvas, valid)
                part = seeds[first : first + batch_size]
                states = function(
                    denoiser, canvas, space=space, seed=part.to(device), valid=valid,
                    cond=self._on_device(cond) or None, **settings,
                )  # fmt: skip
                yield Generation(
                    first, canvas, valid, part, self.modality, states, space.mask_id, ending
                )

        return batches()

    def _on_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _defaults(
        self,
        sampler: str | Sampler,
        canvases: Sequence[Sequence[int]],
        options: Mapping[str, Any],
        *,
        stop: int | None,
    ) -> dict[str, Any]:
        """The options with what the model knows: its end of text, its window, its times."""
        function, _ = resolve(sampler, {})
        known = option_types(function)
        longest = max(map(len, canvases), default=0)
        found = dict(options)
        block = getattr(self.denoiser, "block_length", None)
        if "block_length" in known and block is not None:
            found.setdefault("block_length", block)
        if "stop" in known and stop is not None:
            found.setdefault("stop", stop)
        if "grid" in known and isinstance(self.modality, HasGrid):
            found.setdefault("grid", self.modality.grid)
        if self.denoiser.uses_time:
            # Its times mean what they meant in training.
            found.setdefault("schedule", self.schedule)
        if self.window is not None and longest > self.window:
            if "context" not in known:
                raise ConfigError(
                    f"a canvas of {longest} tokens is longer than the model's window of "
                    f"{self.window}: use sampler 'blocks', which moves the window along"
                )
            found.setdefault("context", self.window)
            default = inspect.signature(function).parameters["block_length"].default
            found.setdefault("block_length", min(default, found["context"]))
        return found

    def score(
        self,
        items: str | Mapping[str, Any] | Sequence[Any],
        *,
        estimator: str | None = None,
        draws: int = 64,
        seed: int = 0,
        batch_size: int = BATCH,
    ) -> Bound:
        """The bound on -log p of each item, in nats, with its standard error, both (N,).

        An item is what the modality encodes: a text, a picture, or a mapping of all parts. One
        longer than the window is scored in windows side by side. `estimator` is as in
        `nll_bound`, by default "any_order", or "time" for a denoiser that uses the time.
        """
        asked = _asked(items)
        rows = windows(self, asked)
        bound = bound_of_rows(
            self, rows, estimator=estimator, draws=draws, seed=seed, batch_size=batch_size
        )
        nats = torch.zeros(len(asked), dtype=torch.float64, device="cpu")
        variance = torch.zeros_like(nats)
        owner = torch.tensor(rows.owner, dtype=torch.int64, device="cpu")
        nats.index_add_(0, owner, bound.nats)
        variance.index_add_(0, owner, bound.stderr**2)
        return Bound(nats, variance.sqrt())

    def features(
        self,
        items: Any,
        *,
        at: Tensor | None = None,
        mask_ratio: float = 0.0,
        layer: int | None = None,
        seed: int = 0,
        batch_size: int = BATCH,
    ) -> Tensor:
        """Features (N, D) float32 of items: the mean over their places, as `representation` says.

        An item is what the modality encodes, such as a text or a picture, or a mapping of the
        parts that it gives; what it does not give is hidden and in no mean. Tokens (N, L) int64
        do as well; with `at` (N, L) bool, theirs at these places alone, one row a place.
        """
        if isinstance(items, Tensor) and items.dtype == torch.int64:
            if at is not None:
                return features_at(self, items, at=at, layer=layer)
            rows: Any = items
        elif at is not None:
            raise ConfigError("at: only tokens (N, L) int64 have places to choose from")
        else:
            asked = items if isinstance(items, list | tuple) else [items]
            rows = [
                self.modality.canvas(item)
                if isinstance(item, Mapping)
                else self.modality.encode(item)
                for item in asked
            ]
        return mean_features(
            self, rows, mask_ratio=mask_ratio, layer=layer, seed=seed, batch_size=batch_size
        )

    def save(self, folder: str | Path) -> None:
        """Write the model so that `load(folder)` gives it back; the folder must not exist."""
        save_parts(
            Path(folder),
            Parts(self.denoiser, self.space, self.modality, self.schedule, self.window),
        )


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | Mapping[str, Any] | str | None = None,
    mask_id: int | None = None,
    block_length: int | None = None,
    tokenizer: str | Path | None = None,
) -> Pipeline:
    """The pipeline of "builtin:NAME", a directory or a Hub id.

    A directory: what `Pipeline.save` or `mdiff train` wrote (a run's latest complete
    checkpoint, or one checkpoint), a model of another project (`docs/checkpoints.md`), or any
    Hugging Face masked language model. `dtype` is a torch.dtype or its name; None keeps what is
    stored. `device` is by default the first GPU, if there is one; "auto" spreads another
    project's model that is larger over all devices, and a mapping {part: device} as it says.
    `mask_id` and `block_length` override the files. Without a tokenizer the modality is plain
    token ids; `tokenizer` is a directory, a file or a Hub id for a model of another project that
    lies without one.

    Raises CheckpointError for files that are missing, altered or unsafe (nothing is loaded
    then), BackendError where the Hub or the device cannot be reached.
    """
    parts = load_parts(
        str(name),
        dtype=dtype,
        device=device,
        mask_id=mask_id,
        block_length=block_length,
        tokenizer=None if tokenizer is None else str(tokenizer),
    )
    return Pipeline(
        parts.denoiser, parts.space, parts.modality, parts.schedule, parts.window, parts.sampler
    )


def row_seeds(seed: int | Tensor | torch.Generator, rows: int) -> Tensor:
    """One seed a row, (rows,) int64: the seed itself, then seeds derived from it."""
    plain = plain_seed(seed, rows)
    if isinstance(plain, Tensor):
        if plain.shape != (rows,) or plain.dtype != torch.int64:
            raise ConfigError(f"seed {tuple(plain.shape)} {plain.dtype}: expected ({rows},) int64")
        return plain
    signed = (plain + 2**63) % 2**64 - 2**63
    number = torch.arange(rows, device="cpu")
    first = torch.full((rows,), signed, dtype=torch.int64, device="cpu")
    return torch.where(number == 0, first, philox.derive(signed, number))


def _asked(prompts: Prompt | Sequence[Any]) -> list[Any]:
    """The prompts as a list: a text or a mapping is one."""
    return [prompts] if isinstance(prompts, str | Mapping) else list(prompts)


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Mapping) and "chat" in prompt


def _times(canvases: list[list[int]], n: int) -> list[list[int]]:
    if n < 1:
        raise ConfigError(f"n={n}: need at least 1")
    if not canvases:
        raise ConfigError("nothing to generate: the list of prompts is empty")
    return [canvas for canvas in canvases for _ in range(n)]
