"""Checkpoints are written atomically and compared with their manifest; one process writes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from mdiff.errors import CheckpointError
from mdiff.files.atomic import (
    complete,
    latest,
    locked,
    replace_file,
    staged,
    step_path,
    sweep,
    verify,
)


@pytest.fixture
def checkpoint(tmp_path):
    path = step_path(tmp_path, 40)
    with staged(path) as folder:
        save_file({"w": torch.arange(6.0)}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"a": 1}')
        (folder / "inner").mkdir()
        (folder / "inner" / "notes.txt").write_text("x")
    return path


def test_a_finished_checkpoint_lists_every_file_with_size_and_digest(checkpoint):
    files = verify(checkpoint)["files"]
    assert sorted(files) == ["config.json", "inner/notes.txt", "model.safetensors"]
    assert files["config.json"]["size"] == 8
    assert latest(checkpoint.parent) == checkpoint
    assert [p.name for p in checkpoint.parent.iterdir()] == ["step-000040"]


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    def write():
        with staged(tmp_path / "step-000001") as folder:
            (folder / "half").write_text("x")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_never_overwritten(checkpoint):
    with pytest.raises(CheckpointError, match="exists already"), staged(checkpoint):
        pass
    verify(checkpoint)


def test_what_a_killed_writer_left_is_not_a_checkpoint_and_is_swept(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from mdiff.files.atomic import staged\n"
        "with staged(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x'); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "step-000001")], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    assert latest(tmp_path) is None
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _append(path):
    path.write_bytes(path.read_bytes() + b" ")


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "config.json is missing"),
        (lambda p: (p / "extra.txt").write_text("x"), "extra.txt is not in the manifest"),
        (lambda p: _append(p / "config.json"), "has 9 bytes, the manifest says 8"),
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        (lambda p: (p / "link").symlink_to("/etc"), "link is not in the manifest"),
        (lambda p: (p / "manifest.json").write_text("{"), "not JSON"),
        (lambda p: (p / "manifest.json").write_text('{"format": 2, "files": {}}'), "format 1"),
    ],
)
def test_an_incomplete_checkpoint_is_refused_and_is_not_the_latest(checkpoint, harm, message):
    harm(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        verify(checkpoint)
    assert not complete(checkpoint)
    assert latest(checkpoint.parent) is None


def test_an_altered_byte_is_found_though_the_size_is_right(checkpoint):
    _flip(checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="altered"):
        verify(checkpoint)


def test_a_file_replaced_by_a_link_to_itself_elsewhere_is_refused(checkpoint, tmp_path):
    elsewhere = tmp_path / "elsewhere.json"
    (checkpoint / "config.json").rename(elsewhere)
    (checkpoint / "config.json").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"leaves|not a plain file"):
        verify(checkpoint)


def test_the_latest_step_is_the_largest_number_with_all_its_files(tmp_path):
    for step in (999999, 1000000, 20):
        with staged(step_path(tmp_path, step)) as folder:
            (folder / "a").write_text("a")
    assert latest(tmp_path).name == "step-1000000"
    (tmp_path / "step-1000000" / "a").write_text("")
    assert latest(tmp_path).name == "step-999999"
    assert latest(tmp_path / "nowhere") is None


HOLD = (
    "import sys, time; from pathlib import Path; from mdiff.files.atomic import locked\n"
    "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)\n"
)


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"process {holder.pid}"), locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with locked(tmp_path):
            pass


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    ready, tell_ready = os.pipe()
    done, tell_done = os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            os.write(tell_ready, b"x")
            os.read(done, 1)
            os._exit(0)
        os.read(ready, 1)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.write(tell_done, b"x")
        os.waitpid(child, 0)
        for handle in (ready, tell_ready, done, tell_done):
            os.close(handle)


def test_a_file_is_replaced_atomically(tmp_path):
    def pieces():
        yield b"half"
        raise OSError(errno.ENOSPC, "full")

    path = tmp_path / "file"
    replace_file(path, [b"be", b"fore"])
    with pytest.raises(OSError, match="full"):
        replace_file(path, pieces())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"before"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
