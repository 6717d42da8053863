"""The toy recipe that tests train, and how its checkpoints are compared."""

from __future__ import annotations

import json
import sys

import torch
from processes import forked, running

from mdiff.files.untrusted import read_tensors
from mdiff.training.loop import train
from mdiff.training.recipe import parse_recipe

SECTIONS = ("data", "model", "objective", "optim")
QUIET = {"report": lambda line: None}


def recipe(**values):
    """A toy recipe; keys are train's, or SECTION__KEY; `model` is a whole section."""
    content = {
        "data": {"length": 6, "count": 20, "ragged": True},
        "modality": {"name": "toy_medium:marks"},
        "model": {"name": "toy_medium:backbone", "dropout": 0.2},
        "optim": {"name": "muon", "lr": 0.02, "warmup_steps": 2},
        "train": {"steps": 8, "batch_size": 8, "save_every": 3, "keep": None, "ema": 0.9},
        "log": {"every": 3},
    }
    content["model"] = values.pop("model", content["model"])
    for key, value in values.items():
        section, _, name = key.rpartition("__")
        content.setdefault(section or "train", {})[name] = value
    return parse_recipe(content)


def tensors(path):
    return read_tensors(path / "training.safetensors") | {
        f"model/{name}": t for name, t in read_tensors(path / "model.safetensors").items()
    }


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def largest_difference(one, two):
    assert one.keys() == two.keys()
    return max(float((one[k].double() - two[k].double()).abs().max()) for k in one)


def trained(out, settings):
    """Train the toy recipe with these settings into `out`."""
    train(recipe(**settings), out)


def training(out, settings):
    """A process that does so; see `forked`."""
    return forked(trained, str(out), settings)


def launched(out, settings, *launcher, **options):
    """The same of a launcher, whose words come before the script; see `running`."""
    words = [*(launcher or [sys.executable]), __file__, out, json.dumps(settings)]
    return running(words, **options)


def wait_for_line(process, start):
    """Read what a process reports up to a line with this start."""
    for line in process.stderr:
        if line.startswith(start):
            return
    raise AssertionError(f"no line {start!r}")


if __name__ == "__main__":
    trained(sys.argv[1], json.loads(sys.argv[2]))
