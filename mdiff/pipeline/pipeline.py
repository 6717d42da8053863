"""A model ready for use: denoiser, space, schedule and modality, and what can be done with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from mdiff.errors import ConfigError
from mdiff.modalities import Conditional, Editable, EndsText
from mdiff.objective import Bound
from mdiff.pipeline.features import encoded, features, features_at
from mdiff.pipeline.generation import Generated, Generation, generations
from mdiff.pipeline.options import (
    CallOptions,
    Model,
    Prompt,
    SamplingOptions,
    Seed,
    call_number,
    call_prompts,
    call_seed,
    canvas_of,
    listed,
    repeated,
    revising_options,
)
from mdiff.pipeline.saving import save_model
from mdiff.pipeline.scoring import bound_of_rows, items_of, of_items, windows
from mdiff.sampling import Sampler, State, row_seeds

if TYPE_CHECKING:
    from mdiff.modalities.image import Edits


class Pipeline(Model):
    """A loaded model and what can be done with it; see `load`."""

    def generate(
        self, prompt: Prompt | Sequence[Prompt] = "", *, num_samples: int = 1,
        length: int | None = None, max_new_tokens: int | None = None, seed: Seed | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        negative_prompt: Prompt | None = None, sampler: str | Sampler | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Generated]:  # fmt: skip
        """`num_samples` samples for each prompt, each a canvas that begins with its prompt.

        A prompt of a model of text is the text to continue, or {"chat": text or messages} for
        the tokenizer's chat template, if wanted with "tools", "documents" and "drop_oldest" (true:
        a conversation longer than the window loses its oldest turns); of a model of images, a
        mapping such as {"label": "sneaker"} or {"caption": "grinning face"}. `length` is the
        canvas in tokens, the prompt included, by default the model's window; `max_new_tokens`
        counts the tokens after the prompt instead. A canvas longer than the window needs
        sampler="blocks", which attends to one window at a time. `seed` is a number (0 by default)
        or (rows,) int64; `generator`, a torch.Generator or one a row, yields a seed instead.

        `guidance_scale` guides away from the model without its condition or, where it takes
        none, with the prompt masked; a `negative_prompt` replaces the condition or the prompt
        there. With `grow` the length is found: by "blocks" a block model's canvas grows until it
        ends, as that of a chat does where no length is given; "daedal" lengthens that of another
        before the first reveal. `sampler` is a name from samplers/ or a function; `options` are
        its own and those of a call, by default as the model's generation_config.json states.

        Raises ConfigError for numbers below 1 and for options that the sampler does not take,
        DataError for a prompt that does not fit.
        """
        prompts, number = call_prompts(prompt, options), call_number(num_samples, options)
        # Of a chat the answer alone is shown, which ends where the model ends it.
        chats = all(isinstance(each, Mapping) and "chat" in each for each in prompts)
        options.setdefault("echo", not chats)
        if chats and length is None and max_new_tokens is None and self.grows:
            options.setdefault("grow", "blocks" if options.get("end", "cut") == "cut" else None)
        canvases = self.canvases(
            prompts, num_samples=number, length=length, max_new_tokens=max_new_tokens,
            grow=bool(options.get("grow")),
        )  # fmt: skip
        runs = self.runs(
            canvases, conditions=self.conditions(prompts, num_samples=number), sampler=sampler,
            seed=seed, generator=generator, negative_prompt=negative_prompt, **options,
        )  # fmt: skip
        return [sample for run in runs for sample in run.finished()]

    def infill(
        self, templates: str | Sequence[str], **options: Unpack[CallOptions]
    ) -> list[Generated]:
        """`num_samples` samples for each template, such as "The [MASK:8] of [MASK:3] night".

        The options are those of `generate`, the length excepted.
        """
        number = call_number(options.pop("num_samples", 1), options)
        canvases = self.templates(templates, num_samples=number)
        return [sample for run in self.runs(canvases, **options) for sample in run.finished()]

    def stream(
        self, prompt: Prompt | Sequence[Prompt] = "", *, length: int | None = None,
        max_new_tokens: int | None = None, **options: Unpack[CallOptions],
    ) -> Iterator[State]:  # fmt: skip
        """The states of all samples as one batch; arguments and order are those of `generate`."""
        prompts = call_prompts(prompt, options)
        number = call_number(options.pop("num_samples", 1), options)
        canvases = self.canvases(
            prompts, num_samples=number, length=length, max_new_tokens=max_new_tokens
        )
        options["batch_size"] = len(canvases)
        conditions = self.conditions(prompts, num_samples=number)
        for run in self.runs(canvases, conditions=conditions, **options):
            yield from run

    def edit(
        self, picture: object, mask: object = None, *, given: Mapping[str, object] | None = None,
        strength: float = 1.0, **options: Unpack[CallOptions],
    ) -> list[Generated]:  # fmt: skip
        """`num_samples` versions of an image, regenerated where `mask` is true (None: everywhere).

        `mask` is (H, W) bool, or "ROWS,COLUMNS" half-open such as "8:24,8:24". Every token whose
        encoder reads a pixel of the mask is generated (of an encoder that reads the whole picture,
        every token whose own patch has one), and the original pixels are put back outside it, so
        that not one of them changes. `strength` in [0, 1] is the share of those tokens that is
        hidden, an exact number of positions by each sample's seed: 1 regenerates all of them, 0
        gives the image back as it was. `given` are other parts, such as {"caption": "grinning
        face"}. The options are those of `generate`, the length excepted.

        Raises ConfigError for a model without images or a strength outside [0, 1], DataError
        for an image or a mask that does not fit.
        """
        edits, runs = self.edit_runs(picture, mask, given=given, strength=strength, **options)
        made = [(sample, sample.image) for run in runs for sample in run.finished()]
        return [replace(sample, output=edits.pasted(image)) for sample, image in made if image]

    def edit_runs(
        self, picture: object, mask: object = None, *, given: Mapping[str, object] | None = None,
        strength: float = 1.0, **options: Unpack[CallOptions],
    ) -> tuple[Edits, Iterator[Generation]]:  # fmt: skip
        """The edits of `edit` and its batches as in `runs`; `Edits.pasted` finishes each image."""
        if not isinstance(self.modality, Editable):
            raise ConfigError(f"edit: this is a model of {self.modality.name}, not of pictures")
        number = call_number(options.pop("num_samples", 1), options)
        options["seed"] = seeds = row_seeds(call_seed(options), number)
        edits = self.modality.edited(
            picture, mask, given=given or {}, strength=strength, seeds=seeds
        )
        conditions = self.conditions(given or "", num_samples=number)
        return edits, self.runs(edits.canvases, conditions=conditions, **options)

    def revise(
        self, text: str, *, keep: Sequence[tuple[int, int]] = (), strength: float | None = None,
        rounds: int | None = None, **options: Unpack[CallOptions],
    ) -> list[Generated]:  # fmt: skip
        """`num_samples` versions of a finished text, by a sampler that takes tokens back.

        `keep` are ranges of its characters, (first, stop): a token that has one of them stays.
        `rounds` are the calls one after another, 20 by default, and `strength` is the share of the
        other tokens that is hidden at first, 0.3: for "remdm", the default sampler, and "psi" (of
        noise that also writes random tokens) the time of their `start`, for "path_planning" one
        less `kept`. "gibbs" and "edit" begin with the text as it stands, until their own end.

        Raises ConfigError for a model that is not one of text, a range outside the text, and a
        strength or rounds that the sampler has no use for.
        """
        runs = self.revisions(text, keep=keep, strength=strength, rounds=rounds, **options)
        return [sample for run in runs for sample in run.finished()]

    def revise_picture(
        self, picture: object, mask: object = None, *, given: Mapping[str, object] | None = None,
        strength: float | None = None, rounds: int | None = None, **options: Unpack[CallOptions],
    ) -> list[Generated]:  # fmt: skip
        """`num_samples` versions of an image, revised as in `revise` where `mask` is true.

        `mask` and `given` are those of `edit`: the tokens that the mask touches begin as the codec
        gives them, and not one pixel outside it changes.

        Raises ConfigError and DataError as `edit` and `revise` do.
        """
        if not isinstance(self.modality, Editable):
            raise ConfigError(f"revise: this is a model of {self.modality.name}, not of pictures")
        options.update(revising_options(self, options, strength=strength, rounds=rounds))
        number = call_number(options.pop("num_samples", 1), options)
        options["seed"] = seeds = row_seeds(call_seed(options), number)
        # With nothing of it hidden, and with all that may change.
        whole, edits = (
            self.modality.edited(picture, mask, given=given or {}, strength=share, seeds=seeds)
            for share in (0.0, 1.0)
        )
        fixed = [[token != self.space.mask_id for token in row] for row in edits.canvases]
        conditions = self.conditions(given or "", num_samples=number)
        runs = self.runs(whole.canvases, conditions=conditions, given=fixed, **options)
        made = [(sample, sample.image) for run in runs for sample in run.finished()]
        return [replace(sample, output=edits.pasted(image)) for sample, image in made if image]

    def revisions(
        self, text: str, *, keep: Sequence[tuple[int, int]] = (), strength: float | None = None,
        rounds: int | None = None, **options: Unpack[CallOptions],
    ) -> Iterator[Generation]:  # fmt: skip
        """The batches of `revise`, as in `runs`."""
        if not isinstance(self.modality, EndsText):
            raise ConfigError(f"revise: this is a model of {self.modality.name}, not of text")
        for first, stop in keep:
            if not 0 <= first < stop <= len(text):
                raise ConfigError(f"keep {first}:{stop}: the text has characters 0:{len(text)}")
        options.update(revising_options(self, options, strength=strength, rounds=rounds))
        number = call_number(options.pop("num_samples", 1), options)
        ids, given, end = self.modality.encode(text), [], 0
        for piece in self.modality.pieces(ids, whole=True):
            begin, end = end, end + len(piece or "")
            given.append(any(begin < stop and first < max(end, begin + 1) for first, stop in keep))
        return self.runs(repeated([ids], number), given=[given] * number, **options)

    def canvases(
        self, prompts: Prompt | Iterable[Prompt] = "", *, num_samples: int = 1,
        length: int | None = None, max_new_tokens: int | None = None, grow: bool = False,
    ) -> list[list[int]]:  # fmt: skip
        """The canvas of each prompt, `num_samples` times in a row; see `generate`.

        One that is to `grow` is as long as it may become.
        """
        made = [
            canvas_of(self, prompt, length=length, max_new_tokens=max_new_tokens, grow=grow)
            for prompt in listed(prompts)
        ]
        return repeated(made, num_samples)

    def conditions(
        self, prompts: Prompt | Iterable[Prompt] = "", *, num_samples: int = 1
    ) -> list[Mapping[str, int | Tensor]]:
        """The condition of each prompt beside its canvas, `num_samples` times in a row."""
        if not isinstance(self.modality, Conditional):
            return [{}] * (num_samples * len(listed(prompts)))
        return repeated(list(map(self.modality.condition, listed(prompts))), num_samples)

    def templates(self, templates: str | Sequence[str], *, num_samples: int = 1) -> list[list[int]]:
        """The canvas of each template with gaps, `num_samples` times in a row."""
        asked = [templates] if isinstance(templates, str) else templates
        return repeated(list(map(self.modality.template, asked)), num_samples)

    def runs(
        self, canvases: Sequence[Sequence[int]], *,
        conditions: Sequence[Mapping[str, int | Tensor]] | None = None,
        given: Sequence[Sequence[bool]] | None = None, **options: Unpack[CallOptions],
    ) -> Iterator[Generation]:  # fmt: skip
        """Batches of canvases, each to be iterated over; the options are those of `generate`.

        Row 0 has the seed itself and row r a seed derived from it, so that any row can be
        generated again alone. `conditions` are those of each row; `given` says of each token
        whether it stays, by default all that are not masks. Invalid options are refused before
        the first batch.
        """
        return generations(self, canvases, conditions, options, given)

    def score(
        self, items: object, *, estimator: str | None = None, draws: int = 64, seed: int = 0,
        batch_size: int = 32,
    ) -> Bound:  # fmt: skip
        """The bound on -log p of each item, in nats, with its standard error, both (N,).

        `items` is one or several. An item is what the modality encodes: a text, an image (PIL, an
        array or a path), or a mapping of all parts and of the label where that is a condition;
        without a label the bound is the unconditional one. An item longer than the window is
        scored in windows side by side. `estimator` is as in `nll_bound`, by default "any_order",
        or "time" for a denoiser that uses the time.
        """
        asked = items_of(self.modality, items)
        rows = windows(self, asked)
        bound = bound_of_rows(
            self, rows, estimator=estimator, draws=draws, seed=seed, batch_size=batch_size
        )
        return of_items(bound, rows.owner, len(asked))

    def features(
        self, items: object, *, at: Tensor | None = None, mask_ratio: float = 0.0,
        layer: int | None = None, seed: int = 0, batch_size: int = 32,
    ) -> Tensor:  # fmt: skip
        """Features (N, D) float32 of items: the mean over their positions; see `features`.

        An item is what the modality encodes, as in `score`, or a mapping of the parts that it
        gives; what it does not give is hidden and in no mean. Tokens (N, L) int64 do as well; with
        `at` (N, L) bool, theirs at these positions alone, row-major.
        """
        if isinstance(items, Tensor) and items.dtype == torch.int64:
            if at is not None:
                return features_at(self, items, at=at, layer=layer)
            rows: Tensor | list[list[int]] = items
        elif at is not None:
            raise ConfigError("at: only tokens (N, L) int64 have positions to choose from")
        else:
            rows = encoded(self, items_of(self.modality, items))
        return features(
            self, rows, mask_ratio=mask_ratio, layer=layer, seed=seed, batch_size=batch_size
        )

    def save(self, folder: str | Path) -> None:
        """Write the model so that `load(folder)` gives it back; the folder must not exist."""
        save_model(
            Path(folder), self.denoiser, modality=self.modality, space=self.space,
            schedule=self.schedule, window=self.window, never_generated=self.never_generated,
            stated=self.stated, process=self.process,
        )  # fmt: skip
