"""Hostile JSON and safetensors files end in a CheckpointError before anything is loaded."""

from __future__ import annotations

import contextlib
import json
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mdiff.errors import CheckpointError
from mdiff.files.untrusted import inside, parse_json, read_json, read_tensors


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a/../b", "a\\b", "a\0b"])
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
        (_tensor_file(GOOD, b"\0" * 7), "altered.*end of the file is at byte 7, expected 8"),
        (_tensor_file(GOOD, b"\0" * 9), "altered.*end of the file is at byte 9, expected 8"),
        (_tensor_file(GOOD, b"\0" * 8, length=2**62), "truncated"),
        (_tensor_file({"w": GOOD["w"] | {"shape": [2**40, 2**40]}}, b"\0" * 8), "'w'.*needs"),
        (_tensor_file({"w": GOOD["w"] | {"shape": [3]}}, b"\0" * 8),
         r"'w' of shape \[3\] needs 12 bytes, the header gives it 8"),
        (_tensor_file({"w": GOOD["w"] | {"shape": [9] * 65}}, b"\0" * 8), "'w'.*not valid"),
        (_tensor_file({"w": GOOD["w"] | {"shape": [-2, -1]}}, b"\0" * 8), "'w'.*not valid"),
        (_tensor_file({"w": GOOD["w"] | {"shape": [True, 2]}}, b"\0" * 8), "'w'.*not valid"),
        (_tensor_file({"w": GOOD["w"] | {"dtype": "F3"}}, b"\0" * 8), "'w'.*'F3'.*not valid"),
        (_tensor_file({"w": GOOD["w"], "v": GOOD["w"]}, b"\0" * 8), "'w' is at byte 0, .*overlaps"),
        (_tensor_file({"w": GOOD["w"] | {"data_offsets": [8, 16]}}, b"\0" * 16),
         "'w' is at byte 8, expected 0: .*hole"),
        (_tensor_file({"w": 3}, b""), "'w' = 3 is not valid"),
        (_tensor_file({"__metadata__": {"a": 1}}, b""), "expected a string"),
        (_tensor_file(b'{"w": 1, "w": 2}'), "twice"),
        (b"PK\x03\x04" + b"\0" * 64, "only safetensors"),
        (b"\x80\x02}q\x00." + b"\0" * 64, "only safetensors"),
    ],
)  # fmt: skip
def test_hostile_tensor_files_are_refused(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(path)


def test_files_of_too_many_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mdiff.files.untrusted.MAX_TENSORS", 2)
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(1) for name in "ab"}, path)
    assert read_tensors(path).keys() == {"a", "b"}
    save_file({name: torch.zeros(1) for name in "abc"}, path)
    with pytest.raises(CheckpointError, match="3 tensors: at most 2"):
        read_tensors(path)


def test_a_header_is_read_up_to_its_bound_and_no_further(tmp_path, monkeypatch):
    content = _tensor_file(GOOD, b"\0" * 8)
    size = len(content) - 16
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    monkeypatch.setattr("mdiff.files.untrusted.MAX_HEADER_BYTES", size)
    assert read_tensors(path).keys() == {"w"}
    monkeypatch.setattr("mdiff.files.untrusted.MAX_HEADER_BYTES", size - 1)
    with pytest.raises(CheckpointError, match=f"a header of {size} bytes: at most {size - 1}"):
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


@pytest.mark.parametrize("text", [b'{"a": 1, "b": 2, "b": 3}', b'{"c": {"b": 1, "a": 2, "b": 1}}'])
def test_of_keys_that_occur_twice_the_right_one_is_named(text):
    with pytest.raises(CheckpointError, match="the key 'b' occurs twice"):
        parse_json(text, origin="x")


def test_json_is_read_up_to_its_bounds_and_no_further(tmp_path):
    nested = [b'{"a": ' + b"[" * more + b"]" * more + b"}" for more in (63, 64)]
    assert parse_json(nested[0], origin="x")
    with pytest.raises(CheckpointError, match="nested deeper than 64"):
        parse_json(nested[1], origin="x")
    path = tmp_path / "x.json"
    path.write_bytes(nested[0])
    assert read_json(path, max_bytes=len(nested[0]))
    with pytest.raises(CheckpointError, match="at most"):
        read_json(path, max_bytes=len(nested[0]) - 1)
