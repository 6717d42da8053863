"""Sweeps of the toy recipe, and a medium whose rows may end the worker that reads them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

from toy_medium import Marks
from volume_runs import content

from mdiff.pipeline.batch.division import Division
from mdiff.sweeps.grid import planned
from mdiff.sweeps.job import run_sweep
from mdiff.sweeps.summary import Result

RECIPE = """\
data: {length: 6, count: 20, validation: 0.1}
modality: {name: "sweep_runs:deadly_marks"}
model: {name: "toy_medium:backbone", dropout: 0.2}
optim: {name: muon, lr: 0.02, warmup_steps: 2}
train: {steps: 2, batch_size: 8, save_every: 100, ema: 0.9, validate_rows: 8}
log: {every: 8}
"""
GRID = ("model.width=4,8",)


class DeadlyMarks(Marks):
    """Marks; data with `deadly` kills the worker that reads its rows."""

    def examples(self, data, *, length, split):
        found = super().examples(data, length=length, split=split)
        if data.get("deadly"):
            plain = found.batch

            def batch(rows, epoch):
                if multiprocessing.parent_process() is not None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(rows, epoch)

            found.batch = batch
        return found


def deadly_marks():
    return DeadlyMarks()


def written_recipe(folder, *, more=""):
    path = Path(folder) / "recipe.yaml"
    path.write_text(RECIPE + more)
    return path


def begin(recipe, grid, out, *, overrides=(), seeds=2, fit=False, samples=2, **division):
    """One run of a sweep from the start; the lines that it reports."""
    said = []
    plan = planned(
        Path(recipe), grid, overrides=overrides, seeds=seeds, fit=fit, num_samples=samples
    )
    found = run_sweep(plan, Path(out), division=Division(**division), report=said.append)
    return found, said


def found_in(out):
    """What a sweep leaves but checkpoints: the collected files and the results of the runs."""
    return {name: held for name, held in content(out).items() if "/run-" not in name} | {
        name: held for name, held in content(out).items() if name.count("/") == 1
    }


def read(out):
    return json.loads((out / "sweep.json").read_text())


def results_of(plan, bits, errors=()):
    errors = errors or [0.1] * len(plan.runs)
    return [Result(bits=b, stderr=e) for b, e in zip(bits, errors)]


def marks_of(out):
    """What tells that a sweep goes on: checkpoints and results."""
    return {*out.glob("runs/*.json"), *out.glob("runs/*/step-*")}


def text_recipe(folder):
    path = folder / "text.yaml"
    path.write_text(
        f"data: {{source: {folder / 'doc.txt'}, length: 8, validation: 0.3}}\n"
        "modality: {name: text, tokenizer: byte}\n"
        "model: {name: transformer, width: 4, depth: 1, heads: 1}\n"
        "train: {steps: 1, batch_size: 2, validate_rows: 2}\n"
    )
    return path
