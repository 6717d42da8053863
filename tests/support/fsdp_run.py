"""Run under accelerate: `fsdp_run.py JOBS` trains one toy recipe after another.

JOBS is a JSON list of (out, resume, settings, deadly): a process kills itself within step
`deadly`; 0 is never. Prints, on each process, what the model was sharded by.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from accelerate import Accelerator
from toy_training import recipe

from mdiff.training.loop import train
from mdiff.training.step import Stepper


def watch(kinds, deadly):
    """Note the classes that FSDP2 made; kill this process when it has a deadly step's gradients."""
    gradients = Stepper._gradients

    def watched(self, number, rows, **options):
        found = gradients(self, number, rows, **options)
        names = {type(module).__name__ for module in self.whole.modules()}
        kinds.update(name for name in names if name.startswith("FSDP"))
        if number == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    Stepper._gradients = watched


def main(jobs):
    # One group of processes serves all runs.
    Accelerator.end_training = lambda self: None
    for out, resume, settings, deadly in json.loads(jobs):
        kinds = set()
        watch(kinds, deadly)
        train(recipe(**settings), out, resume=resume, report=lambda line: None)
        Path(out, f"kinds-{os.environ['RANK']}.json").write_text(json.dumps(sorted(kinds)))


if __name__ == "__main__":
    main(*sys.argv[1:])
