"""Shards that are files of words, each of which may do something to its maker."""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from mdiff.errors import DataError
from mdiff.files.atomic import replace_file, sweep
from mdiff.pipeline.batch.division import Division
from mdiff.pipeline.batch.runner import make_all

# Long against the start of a worker, short against a test.
TIMEOUT = 2.0


@dataclass(frozen=True)
class ToyShard:
    """A file of words; "a+b" are two words that are made together."""

    number: int
    words: tuple[str, ...]
    path: Path

    def __str__(self):
        return f"toy {self.number}"

    @property
    def count(self):
        return len(self.words)

    def is_complete(self):
        return self.path.exists()

    def clear(self):
        sweep(self.path.parent, f"{self.path.name}.")

    def item(self, number):
        return self.words[number], str(self.path)

    def split(self, item):
        words = item[0].split("+")
        return [(word, item[1]) for word in words] if len(words) > 1 else ()

    def failure(self, item, how):
        return None if item[0] == "hopeless" else f"({how})"

    def write(self, results):
        replace_file(self.path, [" ".join(results).encode()])


def make(item):
    """The words; each call leaves a line in the journal beside the folder."""
    words, path = item
    with (Path(path).parent.parent / "journal").open("a") as journal:
        journal.write(f"{Path(path).stem} {words}\n")
    for word in words.split("+"):
        mishap(word, Path(path).parent.parent / f"once {Path(path).stem} {word}")
    return words.replace("+", " ")


def mishap(word, mark):
    """The effect of a word; "once" words have it on the first maker alone."""
    kind, _, often = word.partition(" ")
    if often == "once":
        if mark.exists():
            return
        mark.touch()
    if kind in ("kill", "hopeless"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "leave":
        os._exit(7)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "hang":
        time.sleep(1000)
    elif kind == "slow":
        time.sleep(TIMEOUT / 6)
    elif kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")
    elif kind == "refuse":
        raise DataError("no such word")
    elif kind == "odd":
        raise RuntimeError("odd")


@dataclass(frozen=True)
class ToyMaker:
    """Opens `make`, or fails to; `busy` is a file that gets the process id of each worker."""

    fails: str = ""
    pids: str = os.devnull
    gpus: int = 0

    def open(self, worker):
        with open(self.pids, "a") as file:
            file.write(f"{os.getpid()} {worker}\n")
        mishap(self.fails, Path(self.pids).with_suffix(".once"))
        return make


def toys(out, *shards):
    """The shards of lists of words."""
    out.mkdir(exist_ok=True)
    return [ToyShard(i, tuple(words), out / f"{i}.txt") for i, words in enumerate(shards)]


def run(out, *shards, fails="", pids=os.devnull, report=lambda line: None, **division):
    """How many of the shards were made by this call."""
    maker = ToyMaker(fails, str(pids))
    return make_all(toys(out, *shards), make, maker, Division(**division), report=report)


def there(out):
    return {path.name: path.read_text() for path in out.iterdir()}


def journal(out):
    """Each attempt at an item: its shard and its words."""
    return sorted((out.parent / "journal").read_text().splitlines())
