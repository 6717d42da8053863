"""Whatever is given to a reader ends in a value or in one printable line of a documented error."""

from __future__ import annotations

import json
import struct

from hypothesis import example, given
from hypothesis import strategies as st

from mdiff.errors import MOST_CHARACTERS, MdiffError
from mdiff.files.untrusted import check_tensors, inside
from mdiff.files.yaml import parse_yaml
from mdiff.modalities.text.documents import json_lines
from mdiff.pipeline.batch.requests import read_requests

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner,
                                                                          max_size=3),
    max_leaves=8,
)  # fmt: skip
ENTRIES = st.fixed_dictionaries(
    {}, optional={"dtype": st.sampled_from(["F32", "I64", "BOOL", "f32"]) | VALUES,
                  "shape": st.lists(st.integers(-1, 2**70), max_size=3) | VALUES,
                  "data_offsets": st.lists(st.integers(-1, 2**70), max_size=3) | VALUES},
)  # fmt: skip
ASKED = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("prompt", "infill", "chat", "length", "id", "seed"), VALUES)
)


def ends(read):
    """What was read; an error is None, after a look at its message."""
    try:
        return read()
    except MdiffError as error:
        message = str(error)
        assert message.isprintable()
        assert 0 < len(message) <= MOST_CHARACTERS
        return None


@given(st.text(), st.sampled_from(MdiffError.__subclasses__()))
@example("one\ntwo\x1b[31m\ud800\u2028", MdiffError)
def test_a_message_is_one_printable_line_whatever_is_in_it(text, kind):
    message = str(kind(text))
    assert message.isprintable()
    assert len(message.splitlines()) <= 1
    assert text.isprintable() is (message == text) or len(text) > MOST_CHARACTERS


@given(header=st.dictionaries(st.text(max_size=5), ENTRIES | VALUES, max_size=4),
       data=st.binary(max_size=40))  # fmt: skip
def test_any_header_of_tensors_is_checked(tmp_path_factory, header, data):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    found = ends(lambda: check_tensors(path))
    if found is not None:
        assert sum(e["data_offsets"][1] - e["data_offsets"][0] for e in found.values()) == len(data)


@given(st.lists(ASKED.map(json.dumps) | st.text(max_size=20), max_size=6))
@example(['{"prompt": "a"}', '{"prompt": "b", "id": 1}'])
def test_every_line_of_requests_is_a_request_or_a_failure_of_its_own(lines):
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    requests, failures = read_requests(content)
    numbers = [line for line, raw in enumerate(content.split(b"\n"), start=1) if raw.strip()]
    assert sorted([r.line for r in requests] + [f.line for f in failures]) == numbers
    assert len({request.key for request in requests}) == len(requests)
    for failure in failures:
        assert json.loads(failure.json())["error"].isprintable()


@given(st.text(alphabet="ab:[]{}-?!&*|>%@`'\"#, \n\t0.~\\", max_size=60) | st.binary(max_size=60))
def test_any_text_is_a_recipe_or_an_error(text):
    ends(lambda: parse_yaml(text, origin="x"))


@given(st.text(max_size=60) | st.lists(VALUES.map(json.dumps), max_size=4).map("\n".join))
def test_any_text_is_rows_or_an_error(text):
    rows = ends(lambda: list(json_lines(text, "x")))
    assert rows is None or all(isinstance(row, dict) for row in rows)


@given(st.text(max_size=30) | st.lists(st.sampled_from(["..", ".", "a", "/", "\\", "\0", "", "é"]),
                                       max_size=6).map("/".join))  # fmt: skip
def test_no_name_leads_out_of_its_folder(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp()
    path = ends(lambda: inside(folder, name))
    assert path is None or path.resolve().is_relative_to(folder.resolve())
