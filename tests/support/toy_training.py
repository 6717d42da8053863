"""The toy recipe that tests train, and how its checkpoints are compared."""

from __future__ import annotations

import json

import torch

from mdiff.files.untrusted import read_tensors
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


LAUNCH = (
    "import json, sys; sys.path.insert(0, sys.argv[1])\n"
    "from toy_training import recipe; from mdiff.training.loop import train\n"
    "if __name__ == '__main__':\n"
    "    train(recipe(**json.loads(sys.argv[3])), sys.argv[2])\n"
)
