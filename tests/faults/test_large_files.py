"""Strings of 100 MB and small files that could become large end soon, and in little memory."""

from __future__ import annotations

import json
from pathlib import Path

import processes
import pytest
from figures import check

LARGE = Path(__file__).parent / "large.py"
# One kind for each reader: JSON, safetensors, YAML, JSONL with text and gzip, a tokenizer.
FEW = ("text model", "recipe", "documents", "pretrained tokenizer")


def ends(tmp_path, *kinds):
    """How each file ended; the child says so itself where it was taken down."""
    progress = tmp_path / "progress.jsonl"
    processes.python(LARGE, progress, tmp_path / "work", *kinds, check=True)
    return [json.loads(line) for line in progress.read_text().splitlines()]


def test_strings_of_100_megabytes_end_in_a_load_or_a_documented_error(tmp_path):
    done = ends(tmp_path, *FEW)
    assert len(done) > 10
    check(done, "strings of 100 MB, short")


@pytest.mark.faults
def test_strings_of_100_megabytes_and_bombs_end_in_a_load_or_a_documented_error(tmp_path):
    done = ends(tmp_path)
    check([row for row in done if row["kind"] != "bomb"], "strings of 100 MB")
    check([row for row in done if row["kind"] == "bomb"], "bombs")
