"""The arguments of a call: a loaded model, prompts, the options of sampling, and seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, TypeVar

import torch
from torch import Tensor

from mdiff.denoiser import Denoiser, HasDevice, HasParameters, block_length_of
from mdiff.errors import ConfigError
from mdiff.files import GenerationConfig
from mdiff.modalities import EndsText, HasParts, Modality
from mdiff.modalities.text import fitting
from mdiff.process import Masking, Process
from mdiff.sampling import Sampler, bind
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace, continued

# Windows longer than this are not filled by default: then ANSWER tokens follow the prompt, or at
# most GROWN where the canvas grows until it ends.
LONG_WINDOW, ANSWER, GROWN = 1024, 256, 4096
# Of a window, what a conversation leaves for the answer where nobody says.
LEAST_ANSWER = 16
# The key of a chat that lets its oldest turns be left out; more tokens than any window has.
DROP, MOST = "drop_oldest", 2**40
# The sampler of a model whose noise also writes random tokens.
NOISY = "ancestral"

Row = TypeVar("Row")
# A prompt is a text, or a mapping of what is given by name, such as {"label": "sneaker"}.
Prompt = str | Mapping[str, object]
# A number, one a row (rows,) int64, or a generator that yields one.
Seed = int | Tensor | torch.Generator


@dataclass(frozen=True)
class Model:
    """The parts of a loaded model.

    `window` is the length in tokens that it was trained with, None if unknown; `sampler` the
    sampler that is used where none is named. `never_generated` are ids of `space` that are scored
    but, being no text, are not generated; `stated` is its generation_config.json, whose options are
    used where a call gives none. `process` is the noise that it was trained on where that also
    writes random tokens; None is hiding by `schedule`.
    """

    denoiser: Denoiser
    space: TokenSpace
    modality: Modality
    schedule: Schedule = Linear()  # noqa: RUF009
    window: int | None = None
    sampler: str | Sampler = "first_hitting"
    never_generated: tuple[int, ...] = ()
    stated: GenerationConfig = GenerationConfig()  # noqa: RUF009
    process: Process | None = None

    @property
    def generated_space(self) -> TokenSpace:
        """The space to generate in: what ends a text is drawn, also where it is special."""
        ends = self.modality.end_ids if isinstance(self.modality, EndsText) else ()
        never = tuple(token for token in self.never_generated if token not in ends)
        return replace(self.space, never=(*self.space.never, *never)) if never else self.space

    @property
    def grows(self) -> bool:
        """Whether its canvases can grow by blocks until they end."""
        ends = isinstance(self.modality, EndsText) and bool(self.modality.end_ids)
        return ends and block_length_of(self.denoiser) is not None

    def own_options(self, options: "SamplingOptions") -> str | Sampler:
        """The sampler where none is named; sets the options that the model's training decides."""
        if self.noise is not None:
            options.setdefault("process", self.noise)
            return NOISY
        if self.denoiser.uses_time:
            # Its times keep the meaning that they had in training.
            options.setdefault("schedule", self.schedule)
        return self.sampler

    @property
    def noise(self) -> Process | None:
        """The process where it also writes random tokens."""
        return None if isinstance(self.process, Masking) else self.process

    @property
    def estimator(self) -> str:
        """The estimator of its bound, see `nll_bound`."""
        uses_time = self.denoiser.uses_time or self.noise is not None
        return "time" if uses_time else "any_order"

    @property
    def device(self) -> torch.device:
        """The device of the denoiser's inputs; the CPU for one without parameters."""
        if isinstance(self.denoiser, HasDevice) and self.denoiser.main_device is not None:
            return self.denoiser.main_device
        if not isinstance(self.denoiser, HasParameters):
            return torch.device("cpu")
        first = next(iter(self.denoiser.parameters()), None)
        return torch.device("cpu") if first is None else first.device


class SamplingOptions(TypedDict, total=False):
    """Options of `Pipeline.generate` beside its named arguments.

    First those that every sampler takes, then those of some samplers (the files in `samplers/`
    state which takes which, and what it means), then those of a call.
    """

    schedule: str | Schedule
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None

    steps: int | None
    counts: str | Tensor | Sequence[int]
    order: str | Tensor | Sequence[int]
    drafts: int
    accept: str
    per_call: int
    idle_calls: bool
    grid: tuple[int, int] | None
    roll: bool
    score: str
    measure: str
    noise: float | Tensor | tuple[float, float]
    threshold: float | None
    factor: float | None
    frechet: float | None
    kl: float | None
    corrector: int
    inner: str | Sampler
    block_length: int
    sub_block_length: int | None
    context: int | None
    stop: int | None
    rule: str
    eta: float | None
    start: float | None
    kappa: float
    kept: float
    edit_threshold: float
    keep_threshold: float
    most: int
    share: float
    floor: int
    least: int
    rounds_after: int
    sweeps: float
    nats: float | None
    nats_per_call: float | None
    process: Process | None

    # Rows that go through the model together.
    batch_size: int
    # As in `denoiser.guided`; `guidance_interval` is its `interval`.
    guidance_scale: float | None
    guidance_schedule: str
    guidance_interval: tuple[float, float] | None
    # How the length is found, up to the canvas's: "blocks", of block models, or "daedal".
    grow: str | None
    # Where an id that ends a text is drawn: "cut" the text there, "keep" all, or "suppress" the id.
    end: str
    # Whether the output begins with the prompt; by default so, but for a chat.
    echo: bool

    # Old names of `num_samples`, `negative_prompt` and `prompt`, which go on working.
    n: int
    negative: Prompt | None
    prompts: Prompt | Sequence[Prompt]


class CallOptions(SamplingOptions, total=False):
    """Options of `stream`, `infill`, `edit` and `runs`; see `Pipeline.generate`."""

    num_samples: int
    seed: Seed | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    negative_prompt: Prompt | None
    sampler: str | Sampler | None


def listed(items: Prompt | Iterable[Row]) -> list[Prompt | Row]:
    """The prompts or items as a list: a text or a mapping is one of them."""
    return [items] if isinstance(items, str | Mapping) else list(items)


def repeated(rows: Sequence[Row], num_samples: int) -> list[Row]:
    """Each row `num_samples` times in a row; ConfigError for none, or a number below 1."""
    if num_samples < 1:
        raise ConfigError(f"num_samples={num_samples}: need at least 1")
    if not rows:
        raise ConfigError("nothing to generate: the list of prompts is empty")
    return [row for row in rows for _ in range(num_samples)]


def canvas_of(
    model: Model, prompt: Prompt, *, length: int | None, max_new_tokens: int | None,
    grow: bool = False,
) -> list[int]:  # fmt: skip
    """The canvas of a prompt: `length` tokens in all, or `max_new_tokens` after the prompt.

    With neither what the model's files state or its window or, where it is longer than
    LONG_WINDOW, ANSWER tokens after the prompt; GROWN where it is to `grow`. Raises ConfigError or
    DataError where that cannot be.
    """
    if length is not None and max_new_tokens is not None:
        raise ConfigError("length and max_new_tokens: give one of them")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: need at least 1")
    window, answer = model.window, model.stated.max_new_tokens
    by_default = length is None and max_new_tokens is None
    if isinstance(prompt, Mapping) and "chat" in prompt and (by_default or DROP in prompt):
        most = min(length or MOST, window or MOST)
        room = max_new_tokens or min(LEAST_ANSWER, most // 4)
        if room >= most:
            raise ConfigError(f"max_new_tokens={room}: the window of this model has {most} tokens")
        prompt = fitting(model.modality, prompt, most - room)
    if by_default and answer is None:
        if window is None and model.stated.max_length is None:
            raise ConfigError("length is missing, and this model has no window to fill")
        length = window if window is not None and window <= LONG_WINDOW else None
    if length is not None:
        return model.modality.canvas(prompt, length)
    given = model.modality.canvas(prompt)
    size = len(given) + (max_new_tokens or answer or (GROWN if grow else ANSWER))
    if max_new_tokens is None:
        limits = [size, window, model.stated.max_length]
        size = max(min(each for each in limits if each is not None), len(given) + 1)
    elif isinstance(model.modality, HasParts):
        raise ConfigError(f"max_new_tokens: a canvas of this model has {len(given)} tokens")
    return given if len(given) == size else continued(given, size, mask_id=model.space.mask_id)


def call_prompts(prompt: Prompt | Iterable[Prompt], options: SamplingOptions) -> list[Prompt]:
    """The prompts of a call, by the argument's name or by its old one."""
    if "prompts" not in options:
        return listed(prompt)
    if prompt != "":
        raise ConfigError("prompt and prompts are the same: give one of them")
    return listed(options.pop("prompts"))


def call_number(num_samples: int, options: SamplingOptions) -> int:
    """The number of samples of a call, by the argument's name or by its old one."""
    if "n" not in options:
        return num_samples
    if num_samples != 1:
        raise ConfigError("num_samples and n are the same: give one of them")
    return options.pop("n")


def call_seed(options: CallOptions) -> Seed | Sequence[torch.Generator]:
    """The seed, taken out of the options of a call; ConfigError for `seed` and `generator`."""
    seed, generator = options.pop("seed", None), options.pop("generator", None)
    if seed is not None and generator is not None:
        raise ConfigError("seed and generator: give one of them")
    if generator is not None:
        return generator
    return 0 if seed is None else seed


def revising_options(
    model: Model, options: CallOptions, *, strength: float | None, rounds: int | None
) -> CallOptions:
    """The options of `Pipeline.revise` as those of its sampler.

    Raises ConfigError for a number out of range or one that the sampler has no option for.
    """
    if strength is not None and not 0 < strength <= 1:
        raise ConfigError(f"strength={strength}: expected a share above 0 and at most 1")
    both = [(strength, "strength", "start"), (strength, "strength", "kept"),
            (rounds, "rounds", "steps")]  # fmt: skip
    for value, name, other in both:
        if value is not None and other in options:
            raise ConfigError(f"{name} and {other}: give one of them")
    sampler = options.get("sampler") or ("remdm" if model.noise is None else "psi")
    bound, found = bind(sampler, {}), CallOptions(sampler=sampler)
    if bound.takes("start"):
        steps = options.get("steps")
        found["steps"] = 20 if steps is None else steps
        if strength is not None or options.get("rule") != "loop":
            found["start"] = options.get("start", 0.3) if strength is None else strength
    elif bound.takes("kept") and strength is not None:
        found["kept"] = 1 - strength
    elif strength is not None:
        raise ConfigError(f"strength={strength}: {sampler} begins with the text as it stands")
    if rounds is not None:
        if not bound.takes("steps"):
            raise ConfigError(f"rounds={rounds}: {sampler} takes no steps; gibbs takes sweeps")
        found["steps"] = rounds
    return found


def check_sampler(options: Mapping[str, object]) -> None:
    """Raise ConfigError for an unknown sampler or for an option that it does not take."""
    own = {name: value for name, value in options.items() if not name.startswith("guidance_")}
    bind(str(own.pop("sampler", None) or "first_hitting"), own)
