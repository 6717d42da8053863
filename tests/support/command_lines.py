"""Commands on tiny models, the files that each must leave, and standard streams that fail."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from hashed import GOLDEN
from PIL import Image

import mdiff
from mdiff.backbones.transformer import transformer
from mdiff.modalities.image.modality import image
from mdiff.modalities.text.modality import text
from mdiff.pipeline.pipeline import Pipeline

WINDOW = 24
STORY = "Once upon a time, a naïve cat sang 漢字. " * 12
RECIPE = """\
data: {source: story.txt, length: 16, holdout: 0.1}
modality: {name: text, tokenizer: byte}
model: {name: transformer, width: 8, depth: 1, heads: 2}
train: {steps: 3, batch_size: 2, save_every: 2, keep: null}
log: {every: 1}
"""
# What a standard stream is, by name: of a pipe without a reader, of a full disk, in an encoding
# that lacks most characters, and closed.
STREAMS = ("gone", "full", "ascii", "closed")


@dataclass(frozen=True)
class Command:
    """Words of a command line, the files that it must leave, and how each is read."""

    words: list[str]
    files: dict[str, Callable[[Path], object]] = field(default_factory=dict)
    prints: bool = True


def models(folder: Path) -> None:
    """In `folder`: models `text` and `pictures`, and what the commands read."""
    torch.manual_seed(0)
    words = text()
    net = transformer(vocab_size=256, width=8, depth=1, heads=2, max_length=WINDOW)
    Pipeline(net.eval(), words.space, words, window=WINDOW).save(folder / "text")
    codec = {"name": "levels", "levels": 4, "step": 60}
    made = image(codec=codec, size=[8, 8], label="condition", labels=["t-shirt", "sneaker"])
    net = transformer(
        vocab_size=made.space.vocab_size, mask_id=made.space.mask_id, layout=made.layout,
        classes=made.classes, width=8, depth=1, heads=2,
    )  # fmt: skip
    Pipeline(net.eval(), made.space, made, window=made.length).save(folder / "pictures")
    (folder / "story.txt").write_text(STORY, encoding="utf-8")
    (folder / "tiny.yaml").write_text(RECIPE)
    requests = [{"prompt": "To be"}, {"prompt": "é"}, {"infill": "a[MASK:3]b"}]
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, requests)))
    shutil.copy(GOLDEN / "halton_transformer" / "config.json", folder)
    shutil.copy(GOLDEN / "halton_transformer" / "model.safetensors", folder / "last.safetensors")
    for name in ("one", "two"):
        Image.new("L", (8, 8), 120).save(folder / f"{name}.png")


def opens(path: Path) -> object:
    with Image.open(path) as picture:
        picture.load()
    return picture


def is_page(path: Path) -> object:
    page = path.read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")
    return page


def of_lines(count: int) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(rows) == count
        return rows

    return read


def loads(path: Path) -> object:
    return mdiff.load(path)


def tokenizes(path: Path) -> object:
    made = text(tokenizer=str(path))
    assert made.decode(made.encode("a cat")) == "a cat"
    return made


COMMANDS = {
    "generate": Command(
        ["generate", "text", "--n", "3", "--length", "12", "--trace", "page.html", "--stream"],
        {"page.html": is_page},
    ),
    "generate json": Command(["generate", "text", "--n", "2", "--length", "12", "--json"]),
    "generate pictures": Command(
        ["generate", "pictures", "--label", "sneaker", "--n", "2", "--out", "grid.png",
         "--trace", "film.gif", "--steps", "2", "--sampler", "confidence"],
        {"grid.png": opens, "film.gif": opens},
    ),
    "generate input": Command(
        ["generate", "text", "--input", "requests.jsonl", "--out", "volume", "--length", "12"],
        {"volume/results.jsonl": of_lines(3)},
    ),
    "edit": Command(
        ["edit", "pictures", "one.png", "--mask", "2:6,2:6", "--label", "sneaker", "--out",
         "edited.png"],
        {"edited.png": opens},
    ),
    "train": Command(
        ["train", "tiny.yaml", "--out", "run"],
        {"run": loads, "run/step-000002": loads, "run/step-000003": loads,
         "run/log.jsonl": of_lines(3)},
    ),
    "eval": Command(["eval", "text", "--data", "story.txt", "--draws", "2", "--samples", "1"]),
    "tokenizer train": Command(
        ["tokenizer", "train", "story.txt", "--out", "bpe", "--vocab-size", "280"],
        {"bpe": tokenizes},
    ),
    "tokenizer train pictures": Command(
        ["tokenizer", "train", "one.png", "two.png", "--out", "codec", "--kind", "levels",
         "--holdout", "0", "--channels", "1"],
        {"codec": mdiff.load_codec},
    ),
    "tokenizer encode": Command(["tokenizer", "encode", "byte", "naïve 漢字", "--json"]),
    "tokenizer decode": Command(["tokenizer", "decode", "byte", "195", "169"]),
    "tokenizer inspect": Command(["tokenizer", "inspect", "byte"]),
    "inspect": Command(["inspect", "text"]),
    "convert": Command(["convert", "last.safetensors", "converted"], {"converted": loads}),
    "doctor": Command(["doctor"]),
    "bench": Command(
        ["bench", "--quick", "--only", "overhead", "--out", "bench.json"],
        {"bench.json": lambda path: json.loads(path.read_text())},
    ),
    "demo": Command(["demo"], {"demo.html": is_page, "demo.png": opens}),
}  # fmt: skip


@contextmanager
def stream(kind: str, folder: Path) -> Iterator[TextIO | None]:
    """A stream of this kind, as Python opens one at its start; None is closed."""
    if kind == "closed":
        yield None
        return
    if kind == "gone":
        read, write = os.pipe()
        os.close(read)
        opened = os.fdopen(write, "w", encoding="utf-8")
    elif kind == "full":
        opened = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    else:
        opened = (folder / "printed").open("w", encoding="ascii")
    try:
        yield opened
    finally:
        with suppress(OSError):
            opened.close()


def left_by(command: Command, folder: Path) -> dict[str, object]:
    """What is read of the files that the command must leave."""
    return {name: read(folder / name) for name, read in command.files.items()}
