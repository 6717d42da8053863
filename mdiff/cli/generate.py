"""`mdiff generate`: samples from prompts, templates or a file of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import mdiff.cli.options as ask
from mdiff.cli.images.generate import Wanted, generate_pictures, shows_pictures
from mdiff.cli.images.requests import combined, requests_of
from mdiff.cli.offline import device_of, generate_at_volume
from mdiff.cli.text import generate_text, requests_of_file, text_requests
from mdiff.errors import ConfigError

if TYPE_CHECKING:
    from mdiff.pipeline import Pipeline

# The flags of worker processes.
POOL = ("workers", "timeout")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of `mdiff generate` but for the options of sampling."""

    model: str
    prompt: list[str] | None
    infill: list[str] | None
    chat: list[str] | None
    label: list[str] | None
    image: list[Path] | None
    resize: bool
    input_file: Path | None
    num_samples: int
    length: int | None
    max_new_tokens: int | None
    out: Path | None
    scale_up: int | None
    device: str | None
    dtype: str | None
    mask_id: int | None
    tokenizer: str | None
    stream: bool
    trace: Path | None
    as_json: bool
    workers: int | None
    timeout: float | None

    @property
    def volume(self) -> bool:
        """Whether the folder of results may hold a part of them already: see `cli/offline`."""
        return self.out is not None and self.input_file is not None

    def check(self) -> None:
        """Raise ConfigError for flags that exclude each other."""
        if self.volume and self.tokenizer is not None:
            raise ConfigError(
                "--tokenizer: with --input and --out, put its files beside the weights"
            )
        texts = {"--prompt": self.prompt, "--infill": self.infill, "--chat": self.chat}
        sizes = {"--length": self.length, "--max-new-tokens": self.max_new_tokens}
        pictures = {"--label": self.label or self.image, "--infill": self.infill}
        source = {"--input": self.input_file}
        for exclusive in (texts | source, {"--infill": self.infill} | sizes, pictures | source):
            ask.refuse_both(exclusive)
        if not self.volume:
            self._refuse("needs --input FILE and --out FOLDER, of a model of text", *POOL)

    def load(self) -> tuple[str, Pipeline]:
        """The model and its name: at volume the folder, since a run may get newer checkpoints."""
        from mdiff.files import locate
        from mdiff.pipeline import load

        name, device = self.model, self.device
        if self.volume:
            plans_only = (self.workers or 1) > 1 or self.timeout is not None
            name, device = str(locate(name).folder), device_of(device, plans_only=plans_only)
        pipeline = load(
            name, device=device, dtype=self.dtype, mask_id=self.mask_id, tokenizer=self.tokenizer
        )
        return name, pipeline

    def refuse_text(self, name: str) -> None:
        """Raise ConfigError for flags that a model of pictures does not take."""
        of_text = ("infill", "chat", "length", "max_new_tokens", "stream", *POOL)
        self._refuse(f"is for models of text; {name} is one of pictures", *of_text)

    def refuse_pictures(self, name: str, medium: str) -> None:
        """Raise ConfigError for flags that a model of text, or of ids, does not take."""
        of_pictures = ("label", "image", "resize", "scale_up")
        self._refuse(f"is for models of pictures; {name} is one of {medium}", *of_pictures)
        if self.volume:
            self._refuse("does not go with --input and --out", "stream", "trace")
        else:
            self._refuse(f"is for models of pictures; one of {medium} takes it with --input", "out")

    def _refuse(self, why: str, *names: str) -> None:
        """Raise ConfigError for the first of these flags that was given."""
        given = vars(self)
        for name in names:
            if given[name] is not None and given[name] is not False:
                raise ConfigError(f"--{name.replace('_', '-')} {why}")


def generate(
    model: ask.Model,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; of a picture, its caption.")
    ] = None,
    infill: Annotated[
        list[str] | None, typer.Option(help='Text with gaps: "The [MASK:8] of [MASK:3] night".')
    ] = None,
    chat: Annotated[
        list[str] | None, typer.Option(help="A user's message, for the model's chat template.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Label of a picture, of the model's names.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture to describe: its label or caption.")
    ] = None,
    resize: ask.Resize = False,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="JSONL: a prompt or chat (and length), an infill, or a label and image a line.",
        ),
    ] = None,
    num_samples: ask.NumSamples = 1,
    length: Annotated[
        int | None, typer.Option(help="Tokens of the canvas, prompt included.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens after the prompt, instead of --length.")
    ] = None,
    out: ask.Out = None,
    scale_up: ask.ScaleUp = None,
    sampler: ask.OwnSampler = None,
    steps: ask.Steps = None,
    temperature: ask.Temperature = None,
    top_k: ask.TopK = None,
    top_p: ask.TopP = None,
    min_p: ask.MinP = None,
    threshold: ask.Threshold = None,
    block_length: Annotated[int | None, typer.Option(help="Tokens of a block.")] = None,
    order: Annotated[str | None, typer.Option(help="Order of the reveals.")] = None,
    option: ask.Pairs = None,
    guidance_scale: ask.GuidanceScale = None,
    negative_prompt: ask.NegativePrompt = None,
    guidance_schedule: ask.GuidanceSchedule = None,
    guidance_interval: ask.GuidanceInterval = None,
    end: Annotated[
        str, typer.Option(help="End of text: cut there, keep what follows, or suppress it.")
    ] = "cut",
    seed: ask.Seed = 0,
    batch_size: ask.BatchSize = 32,
    device: ask.Device = None,
    dtype: ask.Dtype = None,
    mask_id: ask.MaskId = None,
    tokenizer: ask.TokenizerName = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show the canvas as it fills.")] = False,
    trace: ask.Trace = None,
    as_json: ask.AsJson = False,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that generate for --input and a folder --out, of text."),
    ] = None,
    timeout: ask.Timeout = None,
) -> None:
    """Generate samples: text to stdout, pictures to files; figures go to stderr."""
    options = ask.sampling_options(
        option, steps=steps, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        threshold=threshold, block_length=block_length, order=order,
    )  # fmt: skip
    options |= ask.guidance_options(guidance_scale, guidance_schedule, guidance_interval)
    options |= ask.call_options(sampler, seed, batch_size)
    options["end"] = end
    if negative_prompt is not None:
        options["negative_prompt"] = negative_prompt if chat is None else {"chat": negative_prompt}
    flags = Flags(
        model=model, prompt=prompt, infill=infill, chat=chat, label=label, image=image,
        resize=resize, input_file=input_file, num_samples=num_samples, length=length,
        max_new_tokens=max_new_tokens, out=out, scale_up=scale_up, device=device, dtype=dtype,
        mask_id=mask_id, tokenizer=tokenizer, stream=stream, trace=trace, as_json=as_json,
        workers=workers, timeout=timeout,
    )  # fmt: skip
    wanted = Wanted(
        None if flags.volume else out, scale_up, trace, as_json, ask.title_of(model, sampler)
    )
    flags.check()
    name, pipeline = flags.load()
    if shows_pictures(pipeline):
        flags.refuse_text(name)
        asked = combined(label, prompt, image) if input_file is None else requests_of(input_file)
        generate_pictures(
            pipeline, asked, model=name, num_samples=num_samples, wanted=replace(wanted, out=out),
            resize=resize, options=options,
        )  # fmt: skip
        return
    flags.refuse_pictures(name, pipeline.modality.name)
    if input_file is not None and out is not None:
        generate_at_volume(
            pipeline, input_file, out, model=name, num_samples=num_samples, length=length,
            max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size, options=options,
            dtype=dtype, device=device, mask_id=mask_id, timeout=timeout, as_json=as_json,
            workers=1 if workers is None else workers,
        )  # fmt: skip
        return
    if wanted.is_film:
        raise ConfigError(f"--trace {trace}: a GIF shows pictures; name a page such as trace.html")
    requests = text_requests(prompt, infill, chat)
    generate_text(
        pipeline, requests if input_file is None else requests_of_file(input_file),
        num_samples=num_samples, length=length, max_new_tokens=max_new_tokens, live=stream,
        trace=trace, title=wanted.title, as_json=as_json, options=options,
    )  # fmt: skip
