"""Run under a launcher: a training whose processes write down what each of them does.

`watched_run.py SETTINGS OUT RESUME OUT RESUME ...` leaves OUT-RANK.json of each run: for each step
the rows, epochs and ids within the batch that the process trained on, and their times; and the
paths that it made, wrote, moved or removed below OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import toy_medium
from accelerate import Accelerator, PartialState
from toy_training import recipe

from mdiff.training.loop import train
from mdiff.training.step import LossOf, Stepper

# Events of sys.audit that change a directory; an open counts where it may write.
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.symlink")


def watch_rows(steps):
    """Note in `steps` what each step trains on."""
    read = {}
    batch_of, step_of, times_of = toy_medium.ToyRows.batch, Stepper.step, LossOf.times

    def batch(self, rows, epoch):
        made = batch_of(self, rows, epoch)
        read[id(made)] = (made, rows.tolist(), epoch.tolist())
        return made

    def step(self, number, rows, *, stopping):
        steps.append({"rows": [], "epochs": [], "samples": [], "timed": [], "times": []})
        for sample, made in rows:
            _, numbers, epochs = read[id(made)]
            steps[-1]["rows"] += numbers
            steps[-1]["epochs"] += epochs
            steps[-1]["samples"] += sample.tolist()
        return step_of(self, number, rows, stopping=stopping)

    def times(self, sample, *, seed):
        found = times_of(self, sample, seed=seed)
        steps[-1]["timed"] += sample.tolist()
        steps[-1]["times"] += found.tolist()
        return found

    toy_medium.ToyRows.batch, Stepper.step, LossOf.times = batch, step, times


def watch_files(out, changed):
    """Note in `changed` every path below `out` that this process changes."""

    def hear(event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
        if (writes or event in CHANGES) and str(arguments[0]).startswith(out):
            changed.append(str(arguments[0]))

    sys.addaudithook(hear)


def main(settings, *runs):
    # One group of processes serves all runs.
    Accelerator.end_training = lambda self: None
    originals = toy_medium.ToyRows.batch, Stepper.step, LossOf.times
    for out, resume in zip(runs[::2], runs[1::2]):
        steps, changed = [], []
        watch_rows(steps)
        watch_files(f"{out}/", changed)
        train(recipe(**json.loads(settings)), out, resume=resume, report=lambda line: None)
        toy_medium.ToyRows.batch, Stepper.step, LossOf.times = originals
        notes = json.dumps({"steps": steps, "changed": changed})
        Path(f"{out}-{PartialState().process_index}.json").write_text(notes)


if __name__ == "__main__":
    main(*sys.argv[1:])
