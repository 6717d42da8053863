"""Runs of generation and encoding at volume in processes that start at once, to be killed.

A forkserver that has loaded the package forks them, in no thread's midst; the workers of a run
come from the same server.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import torch
from processes import server

from mdiff.backbones.transformer import transformer
from mdiff.modalities.image.codec import load_codec
from mdiff.modalities.image.data.images import Pictures
from mdiff.modalities.text.modality import text
from mdiff.pipeline.batch import encoding, engines, offline
from mdiff.pipeline.batch.division import Division
from mdiff.pipeline.batch.encoding import write_shards
from mdiff.pipeline.batch.offline import Generator, generate_offline
from mdiff.pipeline.batch.plan import Setting
from mdiff.pipeline.batch.runner import make_all
from mdiff.pipeline.loading import load
from mdiff.pipeline.pipeline import Pipeline

SETTING = Setting(seed=3, batch_size=3)
WINDOW = 48
DEADLY = "xxxxxx"


def serve_workers(address):
    """In a process of the server: have its workers from there too. Only its parent may ask
    whether the server runs.
    """
    forkserver._forkserver._forkserver_address = address
    forkserver._forkserver.ensure_running = lambda: None
    context = multiprocessing.get_context("forkserver")
    engines.multiprocessing = SimpleNamespace(get_context=lambda kind: context)


@dataclass(frozen=True)
class Recorded:
    """A maker that writes the process id of each worker into the file `pids`, a line each."""

    maker: object
    pids: str

    @property
    def gpus(self):
        return self.maker.gpus

    def open(self, worker):
        with open(self.pids, "a") as file:
            file.write(f"{os.getpid()}\n")
        return self.maker.open(worker)


def launched(task, *arguments, address, pids, **options):
    """What a process of the server does: a task, with workers of the server."""
    serve_workers(address)

    def recorded(shards, make, maker, division, **rest):
        return make_all(shards, make, Recorded(maker, pids), division, **rest)

    offline.make_all = encoding.make_all = recorded
    task(*arguments, **options)


def started(task, *arguments, pids=os.devnull, **options):
    """Such a process, running; the process ids of its workers go to the file `pids`."""
    context = server()
    forkserver.ensure_running()
    options |= {"address": forkserver._forkserver._forkserver_address, "pids": pids}
    process = context.Process(target=launched, args=(task, *arguments), kwargs=options)
    process.start()
    return process


def tiny_model(folder):
    """A model of bytes in a new folder; its name."""
    torch.manual_seed(0)
    modality = text()
    denoiser = transformer(vocab_size=256, width=16, depth=1, heads=2, max_length=WINDOW)
    Pipeline(denoiser.eval(), modality.space, modality, window=WINDOW).save(folder)
    return str(folder)


def written(path, rows):
    """Rows as a file of JSON lines; its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked():
    """60 requests of several kinds and lengths, 20 shards."""
    rows = [{"id": f"r{i}", "prompt": "ab " * (i % 4), "length": 24 + i % 7} for i in range(48)]
    rows += [{"id": i, "infill": f"{i}[MASK:9]{'z' * (i % 3)}"} for i in range(11)]
    return [*rows, {"prompt": "by its line", "length": 30, "seed": -1}]


def begin(model, requests, out, *, setting=SETTING, report=lambda line: None, **division):
    """One run of generation from the start."""
    pipeline = load(model, device="cpu")
    return generate_offline(
        pipeline, Path(requests), Path(out), model=model, setting=setting, report=report,
        division=Division(**division),
    )  # fmt: skip


def tiny_pictures(count):
    """Pictures (count, 3, 4, 4) of fixed noise, named."""
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 3, 4, 4), generator=random, dtype=torch.uint8)
    return Pictures(pixels=pixels, names=[f"no. {i}" for i in range(count)])


def encode(codec, count, out, **division):
    """One run of encoding from the start, two pictures a shard."""
    return write_shards(
        tiny_pictures(count), Path(out), codec=load_codec(codec), rows=2,
        division=Division(**division),
    )  # fmt: skip


def content(out):
    """Every byte of what a run leaves but its locks, by name."""
    files = {p.relative_to(out).as_posix(): p for p in Path(out).rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if not p.name.startswith(".lock")}


def results(out):
    """The samples of a run of generation."""
    return [json.loads(line) for line in (Path(out) / "results.jsonl").open(encoding="utf-8")]


@dataclass(frozen=True)
class DeadlyGenerator(Generator):
    """A worker's model that kills its process where a canvas starts with DEADLY."""

    def open(self, worker):
        """Load the model with a hook that kills the process."""
        make = super().open(worker)

        def kill_or_go_on(module, given):
            if (given[0][:, : len(DEADLY)] == ord("x")).all(1).any():
                os.kill(os.getpid(), signal.SIGKILL)

        make.args[0].denoiser.register_forward_pre_hook(kill_or_go_on)
        return make
