"""Checkpoints are written atomically, and hostile files end in a CheckpointError."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
from mdiff.files.untrusted import inside, parse_json, read_json, read_tensors


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


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a\\b", "a\0b"])
def test_names_that_leave_the_directory_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="plain name inside"):
        inside(tmp_path, name)


def test_a_link_may_lead_inside_the_root_but_not_out_of_it(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x").write_text("{}")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "x").symlink_to("../blobs/x")
    with pytest.raises(CheckpointError, match="leaves"):
        inside(folder, "x")
    assert inside(folder, "x", root=tmp_path) == folder / "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' occurs twice"),
        (b"[1]", "holds a list"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a": ' + b"9" * 10000 + b"}", "not JSON"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nested deeper"),
        (b'{"a": ' + b"[" * 10**6, "nested deeper"),
        (b"", "not JSON"),
    ],
)
def test_hostile_json_is_refused(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        read_json(path)


def test_json_that_is_too_large_a_pipe_or_absent_is_refused_unread(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": "' + "x" * 100 + '"}')
    with pytest.raises(CheckpointError, match="at most 50"):
        read_json(path, max_bytes=50)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a plain file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="missing"):
        read_json(tmp_path / "absent")


def _tensor_file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"abc", "truncated"),
        (_tensor_file(GOOD, b"\0" * 7), "truncated or altered"),
        (_tensor_file(GOOD, b"\0" * 9), "truncated or altered"),
        (_tensor_file(GOOD, b"\0" * 8, length=2**62), "truncated"),
        (_tensor_file({"w": GOOD["w"] | {"shape": [2**40, 2**40]}}, b"\0" * 8), "needs"),
        (_tensor_file({"w": GOOD["w"] | {"shape": [-2, -1]}}, b"\0" * 8), "not valid"),
        (_tensor_file({"w": GOOD["w"] | {"shape": [True, 2]}}, b"\0" * 8), "not valid"),
        (_tensor_file({"w": GOOD["w"] | {"dtype": "F3"}}, b"\0" * 8), "not valid"),
        (_tensor_file({"w": GOOD["w"], "v": GOOD["w"]}, b"\0" * 8), "overlaps"),
        (_tensor_file({"w": 3}, b""), "not valid"),
        (_tensor_file(b'{"w": 1, "w": 2}'), "twice"),
        (b"PK\x03\x04" + b"\0" * 64, "only safetensors"),
        (b"\x80\x02}q\x00." + b"\0" * 64, "only safetensors"),
    ],
)
def test_hostile_tensor_files_are_refused(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(path)


def test_a_pickle_is_named_by_its_ending_too(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(_tensor_file(GOOD, b"\0" * 8))
    with pytest.raises(CheckpointError, match="only safetensors"):
        read_tensors(path)


def test_tensors_come_back_as_they_were(tmp_path):
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor([True, False]),
        "c": torch.zeros(0, 4, dtype=torch.bfloat16),
        "d": torch.tensor(3, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    back = read_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    position=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.integers(0, 10**6) | st.none()
)
def test_mutated_tensor_files_load_completely_or_not_at_all(tmp_path_factory, position, value, cut):
    path = tmp_path_factory.mktemp("mutated") / "x.safetensors"
    save_file({"w": torch.arange(5.0), "v": torch.zeros(2, 2, dtype=torch.int64)}, path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data[: cut % len(data)] if cut is not None else data)
    try:
        tensors = read_tensors(path)
    except CheckpointError:
        return
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 5 * 4 + 4 * 8


@settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,0aé\\ ', max_size=60).map(str.encode))
def test_any_bytes_are_an_object_or_a_checkpoint_error(data):
    with contextlib.suppress(CheckpointError):
        assert isinstance(parse_json(data, origin="x"), dict)


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
