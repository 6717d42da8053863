"""Run under accelerate with zero3.yaml: `zero_run.py OUT SETTINGS DEADLY` trains like test_train.

The process kills itself within step DEADLY; 0 is never.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from toy_training import recipe

import mdiff.training.optim
from mdiff.training.loop import train
from mdiff.training.step import Stepper


def exact(orthogonalised):
    """Muon's iteration in float64: bfloat16 makes a gradient's last bit a large one."""
    return lambda matrix: orthogonalised(matrix.double()).to(matrix.dtype)


def die_within(deadly):
    """Kill this process when it has the gradients of the `deadly`th step."""
    gradients = Stepper._gradients

    def die(self, number, rows, **options):
        found = gradients(self, number, rows, **options)
        if number == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    Stepper._gradients = die


def main(out, settings, deadly):
    mdiff.training.optim.orthogonalised = exact(mdiff.training.optim.orthogonalised)
    die_within(int(deadly))
    train(recipe(**json.loads(settings)), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
