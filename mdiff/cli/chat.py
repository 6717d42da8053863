"""`mdiff chat`: a conversation in the terminal, or on a pipe a turn for each line."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mdiff.cli.options import Loading, Model, Pairs, Seed, Steps, Temperature, sampling_options
from mdiff.cli.views.console import message, result, writable
from mdiff.cli.views.samples import figures
from mdiff.errors import CheckpointError, ConfigError, DataError, MdiffError, nearest

if TYPE_CHECKING:
    from mdiff.pipeline import CallOptions, Pipeline

PROMPT = "> "
# A first message, to check what it would need.
HELLO: dict[str, object] = {"role": "user", "content": "hello"}
NOTHING = "stopped: nothing was written"
# Where neither the call nor the model's files say.
SAMPLER, BLOCK_LENGTH = "confidence", 32
# Of another answer, where the draw would give the same again.
ANOTHER_TEMPERATURE = 0.7
COMMANDS = {
    "/regenerate": "another answer to the last message",
    "/length": "N: at most so many tokens an answer; without N, as long as it takes",
    "/save": "FILE: write the conversation as JSON, for --messages",
    "/quit": "end; so does the end of the input",
    "/help": "these lines",
}


@dataclass(frozen=True)
class Answering:
    """How answers are drawn."""

    sampler: Annotated[str | None, "A name from samplers/; default: confidence."] = None
    steps: Steps = None
    temperature: Temperature = None
    threshold: Annotated[float | None, "Of confidence: tokens this likely are all revealed."] = None
    block_length: Annotated[int | None, "Tokens of a block; default: the model's, or 32."] = None
    grow: Annotated[str | None, "daedal: find the length of an answer first."] = None
    option: Pairs = None
    seed: Seed = 0

    def options(self, pipeline: Pipeline) -> CallOptions:
        """The options of a call, with those of a chat where neither it nor the files say."""
        from mdiff.denoiser import block_length_of

        rest = {k: v for k, v in vars(self).items() if k not in ("option", "seed", "sampler")}
        options = sampling_options(self.option, **rest)
        options |= {"sampler": self.sampler or SAMPLER, "seed": self.seed}
        stated = pipeline.stated.beside({})
        if pipeline.grows:
            options.setdefault("grow", "blocks")
        elif "block_length" not in stated and block_length_of(pipeline.denoiser) is None:
            options.setdefault("block_length", BLOCK_LENGTH)
        if "temperature" not in stated:
            options.setdefault("temperature", 0.0)
        return options


def chat(
    model: Model,
    *,
    system: Annotated[str | None, "What the model is to be, or to heed."] = None,
    messages: Annotated[Path | None, "A conversation to go on with, as /save writes it."] = None,
    max_new_tokens: Annotated[int | None, "At most so many tokens an answer."] = None,
    drop_oldest: Annotated[
        bool, "Leave out the oldest turns of a conversation longer than the window."
    ] = False,
    answering: Answering,
    loading: Loading,
) -> None:
    """Talk with a model: a message a line; /help shows commands, Ctrl-C ends an answer."""
    from mdiff.modalities.text import Text

    prompt: dict[str, object] = {"chat": []} if messages is None else _read(messages)
    pipeline = loading.load(model)
    if not isinstance(pipeline.modality, Text):
        kind = pipeline.modality.name
        raise ConfigError(f"chat: {model} is a model of {kind}, without a tokenizer of text")
    prompt |= {"drop_oldest": drop_oldest}
    terminal = sys.stdin is not None and sys.stdin.isatty()
    talk = Conversation(pipeline, answering, max_new_tokens, prompt, terminal=terminal)
    if system is not None:
        others = (one for one in talk.said if one.get("role") != "system")
        talk.said = [{"role": "system", "content": system}, *others]
    # Before anybody types: a model without a template, options that it does not take.
    talk.check()
    if terminal:
        message(f"{model}: type a message; /help shows commands")
    if talk.ends_with("user"):
        talk.answer(talk.said)
    for line in _lines(terminal):
        try:
            if talk.quits(line):
                break
        except (MdiffError, OSError) as error:
            if not terminal:
                raise
            message(f"error: {error}")


def _read(path: Path) -> dict[str, object]:
    """The conversation of a file: a list of messages, or an object with it and tools."""
    from mdiff.files import parse_json
    from mdiff.modalities.text import read_text

    written = read_text(path).strip()
    written = f'{{"chat": {written}}}' if written.startswith("[") else written
    try:
        found = parse_json(written.encode(), origin=str(path))
    except CheckpointError as error:
        raise DataError(str(error)) from None
    said = found.get("chat")
    if not isinstance(said, list) or not all(isinstance(one, dict) for one in said):
        raise DataError(f"{path}: expected a list of messages, each with a role and a content")
    return found


def _lines(terminal: bool) -> Iterator[str]:
    """The lines of the standard input; what is not UTF-8 in them is refused as it is read."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    with suppress(ImportError):
        import readline  # noqa: F401
    while sys.stdin is not None:
        if terminal and sys.stdout.isatty():
            try:
                line = f"{input(PROMPT)}\n"
            except EOFError:
                line = ""
        else:
            print(PROMPT if terminal else "", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
        if not line:
            break
        yield line.rstrip("\r\n")


class Conversation:
    """A conversation with a model: what was said so far, and how answers are drawn."""

    def __init__(
        self, pipeline: Pipeline, answering: Answering, most: int | None, prompt: dict[str, Any], *,
        terminal: bool,
    ) -> None:  # fmt: skip
        self.pipeline, self.answering, self.most = pipeline, answering, most
        self.prompt, self.terminal, self.number, self.again = prompt, terminal, 0, False
        self.said: list[dict[str, object]] = prompt["chat"]

    def ends_with(self, role: str) -> bool:
        """Whether the last message is of this role."""
        return bool(self.said) and self.said[-1].get("role") == role

    def check(self) -> None:
        """Raise what an answer would, by one of a single token."""
        self._canvases(self.said if self.ends_with("user") else [*self.said, HELLO])
        short = self.pipeline.canvases({"chat": [HELLO]}, max_new_tokens=1)
        for run in self.pipeline.runs(short, **self._options()):
            run.finished()

    def quits(self, line: str) -> bool:
        """Obey a command or answer a message; True for the command that ends."""
        command, _, rest = line.expandtabs(1).partition(" ")
        rest = rest.strip()
        if command == "/help":
            message("\n".join(f"{name:<12} {what}" for name, what in COMMANDS.items()))
        elif command == "/length":
            self._set_length(rest)
        elif command == "/save":
            self._save(rest)
        elif command == "/regenerate":
            if not self.ends_with("assistant"):
                raise ConfigError("/regenerate: there is no answer yet")
            self.again = True
            self.answer(self.said[:-1])
        elif command.startswith("/") and command[1:].isalpha() and command != "/quit":
            raise ConfigError(f"no command {command[:40]}; {nearest(command[:40], COMMANDS)}")
        elif line.strip() and command != "/quit":
            self.again = False
            self.answer([*self.said, {"role": "user", "content": line}])
        return command == "/quit"

    def _set_length(self, words: str) -> None:
        if words and not (words.isdecimal() and len(words) < 8 and int(words)):
            raise ConfigError(f"/length {words[:40]}: expected a whole number, 1 to 9999999")
        self.most = int(words) if words else None
        message(f"answers of at most {words} tokens" if words else "answers as long as it takes")

    def _save(self, name: str) -> None:
        from mdiff.files import replace_file

        if not name:
            raise ConfigError("/save: expected a file name")
        # A ~ of nobody stays as it is; Path.expanduser raises.
        path = Path(os.path.expanduser(name))
        writable(path)
        kept = {**self.prompt, "chat": self.said}
        del kept["drop_oldest"]
        replace_file(path, [json.dumps(kept, indent=1).encode(), b"\n"])
        message(f"wrote {path}")

    def _options(self) -> CallOptions:
        options = self.answering.options(self.pipeline)
        drawn = {**self.pipeline.stated.beside(options), **options}
        if self.again and drawn.get("temperature") == 0:
            options["temperature"] = ANOTHER_TEMPERATURE
            message(f"temperature {ANOTHER_TEMPERATURE}: at 0 it would be the same answer")
        return options | {"seed": self.answering.seed + self.number, "echo": False}

    def _canvases(self, said: list[dict[str, object]]) -> list[list[int]]:
        return self.pipeline.canvases(
            self.prompt | {"chat": said}, max_new_tokens=self.most,
            grow=bool(self.pipeline.grows or self.answering.grow),
        )  # fmt: skip

    def answer(self, said: list[dict[str, object]]) -> None:
        """Answer the last message and print the answer; what fails changes nothing.

        In a terminal Ctrl-C ends the answer: what is written of it by then stays.
        """
        from mdiff.cli.views.live import watched

        canvases, run, written, line = self._canvases(said), None, "", NOTHING
        try:
            for run in self.pipeline.runs(canvases, **self._options()):
                for _ in watched(run) if sys.stderr.isatty() else run:
                    pass
                (sample,) = run.finished()
                written, line = str(sample), figures(sample)
        except KeyboardInterrupt:
            if not self.terminal:
                raise
            if run is not None and (written := str(run.output(0))):
                line = "stopped"
        self.number += 1
        if line != NOTHING:
            self.said = [*said, {"role": "assistant", "content": written}]
            result(written)
        message(f"({line})")
