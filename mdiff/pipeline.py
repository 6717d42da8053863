"""A model ready for use: denoiser, space, schedule and modality, with what people ask of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdiff.canvas import stack
from mdiff.denoiser import Denoiser, guided
from mdiff.errors import ConfigError
from mdiff.filling import State
from mdiff.generation import Generated, Generation
from mdiff.kernels import philox
from mdiff.loading import Parts, load_parts, save_parts
from mdiff.objective import Bound, nll_bound
from mdiff.sampling import Sample as Sample
from mdiff.sampling import Sampler, option_types, plain_seed, resolve
from mdiff.sampling import sample as sample
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace

# The entry of `cond` that guidance reads: the places which the other branch hides.
GIVEN = "given"
BATCH = 32


@dataclass(frozen=True)
class Pipeline:
    """A loaded model; see `load`. `window` is the length it was trained on, None if unknown."""

    denoiser: Denoiser
    space: TokenSpace
    modality: Any
    schedule: Schedule = Linear()  # noqa: RUF009
    window: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the denoiser's weights lie; the CPU for one without any."""
        weights = getattr(self.denoiser, "parameters", None)
        first = None if weights is None else next(weights(), None)
        return torch.device("cpu") if first is None else first.device

    def generate(
        self,
        prompts: str | Sequence[Any] = "",
        *,
        sampler: str | Sampler = "first_hitting",
        length: int | None = None,
        n: int = 1,
        seed: int | Tensor | torch.Generator = 0,
        batch_size: int = BATCH,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> list[Generated]:
        """`n` samples for each prompt, each a canvas of `length` tokens that begins with it.

        `length` is the model's window by default. `options` are the sampler's. A canvas longer
        than the window needs sampler="blocks", which then sees a window of the text at a time.
        `guidance_scale` pushes away from what the model says with the prompt masked.

        Raises ConfigError for n, length or batch_size below 1 and for options that the sampler
        does not take, DataError for a prompt that does not fit.
        """
        canvases = self.canvases(prompts, length=length, n=n)
        runs = self.runs(
            canvases, sampler=sampler, seed=seed, batch_size=batch_size,
            guidance_scale=guidance_scale, **options,
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
        self, prompts: str | Sequence[Any] = "", *, length: int | None = None, n: int = 1,
        **options: Any,
    ) -> Iterator[State]:  # fmt: skip
        """The states of all samples as one batch, in the order of `generate`."""
        canvases = self.canvases(prompts, length=length, n=n)
        for run in self.runs(canvases, batch_size=len(canvases), **options):
            yield from run

    def canvases(
        self, prompts: str | Sequence[Any] = "", *, length: int | None = None, n: int = 1
    ) -> list[list[int]]:
        """The canvas of each prompt, `n` times in a row."""
        if length is None and self.window is None:
            raise ConfigError("length is missing, and this model does not say how long to write")
        size = self.window if length is None else length
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        return _times([self.modality.canvas(prompt, size) for prompt in asked], n)

    def templates(self, templates: str | Sequence[str], *, n: int = 1) -> list[list[int]]:
        """The canvas of each template with gaps, `n` times in a row."""
        asked = [templates] if isinstance(templates, str) else list(templates)
        return _times([self.modality.template(template) for template in asked], n)

    def runs(
        self,
        canvases: Sequence[Sequence[int]],
        *,
        sampler: str | Sampler = "first_hitting",
        seed: int | Tensor | torch.Generator = 0,
        batch_size: int = BATCH,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> Iterator[Generation]:
        """Batches of canvases, each to be iterated over; row r has a seed of its own.

        Row 0 has `seed` itself and row r a seed derived from it, so that any row can be had
        again alone. What cannot be meant is refused before the first batch.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: need at least 1")
        function, settings = resolve(sampler, self._defaults(sampler, canvases, options))
        denoiser = self.denoiser
        if guidance_scale is not None:
            denoiser = guided(denoiser, guidance_scale=guidance_scale, hide=GIVEN, space=self.space)
        stack(canvases, space=self.space)
        seeds = row_seeds(seed, len(canvases))
        device = self.device

        def batches() -> Iterator[Generation]:
            for first in range(0, len(canvases), batch_size):
                tokens, valid = stack(canvases[first : first + batch_size], space=self.space)
                canvas = tokens.to(device)
                valid = None if valid is None else valid.to(device)
                guides = denoiser is not self.denoiser
                given = {GIVEN: canvas != self.space.mask_id} if guides else None
                part = seeds[first : first + batch_size]
                states = function(
                    denoiser, canvas, space=self.space, seed=part.to(device), valid=valid,
                    cond=given, **settings,
                )  # fmt: skip
                yield Generation(first, canvas, valid, part, self.modality, states)

        return batches()

    def _defaults(
        self, sampler: str | Sampler, canvases: Sequence[Sequence[int]], options: dict[str, Any]
    ) -> dict[str, Any]:
        """The options with what the model knows: its end of text, its window, its times."""
        function, _ = resolve(sampler, {})
        known = option_types(function)
        longest = max(map(len, canvases), default=0)
        found = dict(options)
        if "stop" in known and getattr(self.modality, "eos_id", None) is not None:
            found.setdefault("stop", self.modality.eos_id)
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
        texts: str | Sequence[Any],
        *,
        estimator: str | None = None,
        draws: int = 64,
        seed: int = 0,
        batch_size: int = BATCH,
    ) -> Bound:
        """The bound on -log p of each text, in nats, with its standard error, both (N,).

        A text longer than the window is scored in windows side by side. `estimator` is as in
        `nll_bound`, by default "any_order", or "time" for a denoiser that uses the time.
        """
        asked = [texts] if isinstance(texts, str) else list(texts)
        pieces, owner = [], []
        for number, text in enumerate(asked):
            ids = list(self.modality.encode(text))
            width = self.window or max(1, len(ids))
            for start in range(0, len(ids), width):
                pieces.append(ids[start : start + width])
                owner.append(number)
        nats = torch.zeros(len(asked), dtype=torch.float64)
        variance = torch.zeros_like(nats)
        for first in range(0, len(pieces), batch_size):
            bound = self.bound(
                pieces[first : first + batch_size], estimator=estimator, draws=draws,
                seed=int(philox.derive(seed, first)),
            )  # fmt: skip
            where = torch.tensor(owner[first : first + batch_size])
            nats.index_add_(0, where, bound.nats)
            variance.index_add_(0, where, bound.stderr**2)
        return Bound(nats, variance.sqrt())

    def bound(
        self, rows: Sequence[Sequence[int]], *, estimator: str | None, draws: int, seed: int
    ) -> Bound:
        """The bound of rows of tokens as one batch, on the CPU."""
        tokens, valid = stack(rows, space=self.space)
        self.space.check(tokens, valid, masks=False)
        device = self.device
        bound = nll_bound(
            self.denoiser, tokens.to(device), space=self.space, schedule=self.schedule,
            estimator=estimator or ("time" if self.denoiser.uses_time else "any_order"),
            draws=draws, seed=seed, valid=None if valid is None else valid.to(device),
        )  # fmt: skip
        return Bound(bound.nats.cpu(), bound.stderr.cpu())

    def features(self, tokens: Tensor, *, at: Tensor) -> Tensor:
        """The denoiser's last features (N, D) at the places `at` (B, L) bool of a canvas."""
        inner = getattr(self.denoiser, "features", None)
        if inner is None:
            raise ConfigError(f"{type(self.denoiser).__name__} has no features to show")
        found: Tensor = inner(tokens, at=at)
        return found

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
    device: torch.device | str | None = None,
    mask_id: int | None = None,
    block_length: int | None = None,
) -> Pipeline:
    """The pipeline of "builtin:NAME", a directory or a Hub id.

    A directory: what `Pipeline.save` or `mdiff train` wrote (a run's latest complete
    checkpoint, or one checkpoint), or any Hugging Face masked language model. `dtype` is a
    torch.dtype or its name; None keeps what is stored. `mask_id` and `block_length` override
    the files. Without a tokenizer the modality is plain token ids.

    Raises CheckpointError for files that are missing, altered or unsafe (nothing is loaded
    then), BackendError where the Hub or the device cannot be reached.
    """
    parts = load_parts(
        str(name), dtype=dtype, device=device, mask_id=mask_id, block_length=block_length
    )
    return Pipeline(parts.denoiser, parts.space, parts.modality, parts.schedule, parts.window)


def row_seeds(seed: int | Tensor | torch.Generator, rows: int) -> Tensor:
    """One seed a row, (rows,) int64: the seed itself, then seeds derived from it."""
    plain = plain_seed(seed, rows)
    if isinstance(plain, Tensor):
        if plain.shape != (rows,) or plain.dtype != torch.int64:
            raise ConfigError(f"seed {tuple(plain.shape)} {plain.dtype}: expected ({rows},) int64")
        return plain
    signed = (plain + 2**63) % 2**64 - 2**63
    number = torch.arange(rows)
    first = torch.full((rows,), signed, dtype=torch.int64)
    return torch.where(number == 0, first, philox.derive(signed, number))


def _times(canvases: list[list[int]], n: int) -> list[list[int]]:
    if n < 1:
        raise ConfigError(f"n={n}: need at least 1")
    if not canvases:
        raise ConfigError("nothing to generate: the list of prompts is empty")
    return [canvas for canvas in canvases for _ in range(n)]
