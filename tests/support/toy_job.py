"""A job whose shards are files of words, each of which may do something to its maker."""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

from mdiff.errors import DataError
from mdiff.files.atomic import replace_file, sweep
from mdiff.pipeline.batch.jobs import Job

# Long against the start of a worker, short against a test.
TIMEOUT = 2.0


@dataclass(frozen=True)
class ToyShard:
    """A file of words, each of which may do something to its maker."""

    number: int
    words: tuple[str, ...]
    path: Path

    def __str__(self):
        return f"toy {self.number}"

    def is_complete(self):
        return self.path.exists()

    def clear(self):
        sweep(self.path.parent, f"{self.path.name}.")

    def part(self):
        return self

    def without(self, item, how):
        words = tuple(word for word in self.words if word != item)
        return None if item == "hopeless" else replace(self, words=words)


def make(shard, heartbeat):
    """Write the words; each call leaves a line in the journal beside the folder."""
    with (shard.path.parent.parent / "journal").open("a") as journal:
        journal.write(f"{shard.number}\n")
    half = shard.path.parent / f".{shard.path.name}.{os.getpid()}.tmp"
    half.write_text("half")
    for word in shard.words:
        if word != "unreported":
            heartbeat(word)
        mishap(word, shard.path.parent.parent / f"once {shard.number} {word}")
    half.unlink()
    replace_file(shard.path, [" ".join(shard.words).encode()])


def mishap(word, mark):
    """The effect of a word; "once" words have it on the first maker alone."""
    kind, _, often = word.partition(" ")
    if often == "once":
        if mark.exists():
            return
        mark.touch()
    if kind in ("kill", "hopeless", "unreported"):
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
    """Opens `make`, or fails to."""

    fails: str = ""

    def open(self, worker):
        mishap(self.fails, Path())
        return make


def job(out, *shards, fails=""):
    out.mkdir(exist_ok=True)
    made = [ToyShard(i, tuple(words), out / f"{i}.txt") for i, words in enumerate(shards)]
    return Job(made, make, ToyMaker(fails), out)


def there(out):
    return {path.name: path.read_text() for path in out.iterdir() if path.name != ".lock"}


def journal(out):
    return sorted(map(int, (out.parent / "journal").read_text().split()))
