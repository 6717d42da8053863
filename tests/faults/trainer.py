"""Trains the toy of test_train in forks of one process, which a test may kill at any moment.

It reads a JSON line a run, {"out": ..., "settings": ...}, and answers with the fork's process
id; the fork writes "first N" at its first step and "saved N" after each save to the pipe that
the test reads, and "done" or "failed ..." at its end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]

from toy_training import recipe  # noqa: E402

import mdiff.training.loop as training  # noqa: E402


def say(line: str) -> None:
    """One write, so that lines of several processes do not mix."""
    os.write(1, f"{line}\n".encode())


def report_saves() -> None:
    """Say so when a save is complete."""
    write = training.write_checkpoint

    def written(run: Any, out: Path, number: int, *rest: Any) -> None:
        write(run, out, number, *rest)
        say(f"saved {number}")

    training.write_checkpoint = written


def report_first(line: str) -> None:
    """The first progress line is that of the first step."""
    if line.startswith("step ") and not reported:
        reported.append(line)
        say(f"first {line.split()[1].split('/')[0]}")


reported: list[str] = []


def main() -> None:
    """Serve runs until there are no more lines."""
    report_saves()
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            say(f"started {os.getpid()}")
            try:
                training.train(recipe(**asked["settings"]), asked["out"], report=report_first)
                say("done")
            except BaseException as error:
                say(f"failed {type(error).__name__}: {error}")
            os._exit(0)
        os.waitpid(child, 0)
        say("ended")


if __name__ == "__main__":
    main()
