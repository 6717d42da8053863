"""Disks that are full or closed, data that is gone, workers that die: nothing saved is lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from pathlib import Path

import processes
import pytest
import toy_medium
from safetensors import SafetensorError
from toy_training import QUIET, recipe, same, tensors, training

import mdiff.files.atomic as atomic
import mdiff.training.checkpoint as checkpoint
from mdiff.cli import explained, run
from mdiff.errors import DataError
from mdiff.files.atomic import latest, steps, verify
from mdiff.training.loop import train

HERE = Path(__file__).parent


def goes_on(out, whole, last):
    """The run in `out` is at `last`, and resuming it ends as the uninterrupted one did."""
    assert steps(out)[-1] == last
    verify(latest(out))
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]
    assert same(tensors(whole), tensors(train(recipe(), out, **QUIET)))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("function", ["save_file", "write_json", "_fsync"])
def test_a_disk_that_refuses_a_save_leaves_the_one_before(tmp_path, monkeypatch, code, function):
    whole = train(recipe(), tmp_path / "whole", **QUIET)
    out = tmp_path / "run"
    train(recipe(steps=3), out, **QUIET)

    def refuse(*given, **options):
        raise OSError(code, os.strerror(code), "x")

    owner = checkpoint if function == "save_file" else atomic
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, refuse)
        with pytest.raises(OSError, match="x") as caught:
            train(recipe(), out, **QUIET)
    assert explained(caught.value)[0] == (2 if code == errno.EROFS else 6)
    goes_on(out, whole, 3)


def limited(out):
    """Train while no file may grow above 1,500 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
    train(recipe(), out, **QUIET)


def test_files_that_may_not_grow_leave_the_checkpoint_before(tmp_path):
    whole = train(recipe(), tmp_path / "whole", **QUIET)
    out = tmp_path / "run"
    train(recipe(steps=3), out, **QUIET)

    with processes.forked(limited, str(out)) as done:
        _, errors = done.communicate()
    assert done.returncode != 0
    # As the system says it, whether Python wrote or safetensors.
    assert "OSError: [Errno 27] File too large" in errors
    goes_on(out, whole, 3)


def test_a_full_disk_is_recognised_in_the_error_of_safetensors(tmp_path):
    words = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(OSError, match="No space left") as caught, atomic.staged(tmp_path / "x"):
        raise SafetensorError(words)
    assert explained(caught.value)[0] == 6
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_that_has_vanished_is_named_and_nothing_is_written(tmp_path, capsys):
    lines = (
        f"data: {{source: {tmp_path}/gone.txt, length: 16}}\nmodality: {{name: text}}\n"
        "model: {name: transformer, width: 8, depth: 1, heads: 2}\n"
        "train: {steps: 2, batch_size: 2, save_every: 1}\n"
    )
    (tmp_path / "recipe.yaml").write_text(lines)
    (tmp_path / "gone.txt").write_text("to be or not to be " * 40)
    command = ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
    assert run(command) == 0
    (tmp_path / "gone.txt").unlink()
    assert run([*command, "--set", "train.steps=3"]) == 3
    assert "gone.txt: no such file" in capsys.readouterr().err
    assert steps(tmp_path / "run") == [1, 2]


class DyingRows(toy_medium.ToyRows):
    """Rows whose reader, where it is another process than the trainer, is killed at row 13."""

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.trainer = os.getpid()

    def batch(self, rows, epoch):
        if os.getpid() != self.trainer and (rows == 13).any():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(rows, epoch)


def dying_marks():
    class Dying(toy_medium.Marks):
        def examples(self, data, *, length, split):
            return DyingRows(20, length, ragged=True, poison=None)

    return Dying()


def test_a_killed_loader_is_named_and_the_run_resumes_without(tmp_path):
    whole = train(recipe(), tmp_path / "whole", **QUIET)
    out = tmp_path / "run"
    settings = {"save_every": 1, "modality__name": "test_faults:dying_marks"}
    train(recipe(**settings, steps=1), out, **QUIET)
    with pytest.raises(DataError, match="a process that prepares rows died"):
        train(recipe(**settings, workers=1), out, **QUIET)
    verify(latest(out))
    resumed = train(recipe(**settings), out, **QUIET)
    assert same(tensors(whole), tensors(resumed))


def test_a_second_process_on_a_run_is_refused_by_the_command_line(tmp_path, capsys):
    out = tmp_path / "run"
    with atomic.locked(out), training(out, {}) as child:
        _, errors = child.communicate()
    assert child.returncode == 1
    assert f"is being written by process {os.getpid()}" in errors
    assert steps(out) == []


OPTIMISED = """
import json, sys
from pathlib import Path
import mdiff
from mdiff import TokenSpace, sample
from mdiff.files.atomic import verify
from mdiff.denoiser import from_logits
from mdiff.errors import MdiffError
from mdiff.files.untrusted import parse_json
import torch
ends = []
for check in (
    lambda: mdiff.load(sys.argv[1]),
    lambda: verify(Path(sys.argv[1])),
    lambda: parse_json(b'{"a": 1, "a": 2}', origin="x"),
    lambda: TokenSpace(0, mask_id=0),
    lambda: TokenSpace(4, mask_id=4).check(torch.tensor([[9]])),
    lambda: mdiff.schedule.named_schedule("lineer"),
):
    try:
        check()
        ends.append("passed")
    except MdiffError as error:
        ends.append(type(error).__name__)
space = TokenSpace(5, mask_id=5)
toy = from_logits(lambda tokens: torch.zeros(*tokens.shape, 5))
done = sample(toy, torch.full((2, 6), 5), space=space, seed=1)
print(json.dumps({"optimised": not __debug__, "ends": ends, "tokens": done.tokens.tolist()}))
"""


def test_checks_that_matter_hold_under_optimised_python(tmp_path):
    (tmp_path / "broken").mkdir()
    found = []
    for flag in ([], ["-O"]):
        child = processes.python(*flag, "-c", OPTIMISED, tmp_path / "broken", check=True)
        found.append(json.loads(child.stdout))
    assert [each.pop("optimised") for each in found] == [False, True]
    assert found[0] == found[1]
    assert "passed" not in found[1]["ends"]
