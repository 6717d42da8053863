"""Strings of 100 MB and small files that could become large end soon, and in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from figures import check

LARGE = Path(__file__).parent / "large.py"
# One kind for each reader: JSON, safetensors, YAML, JSONL with text and gzip, a tokenizer.
FEW = ("text model", "recipe", "documents", "shards", "pretrained tokenizer")


def ends(tmp_path, *kinds):
    """How each file ended; the child says so itself where it was taken down."""
    progress = tmp_path / "progress.jsonl"
    child = subprocess.run(
        [sys.executable, str(LARGE), str(progress), str(tmp_path / "work"), *kinds],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    return [json.loads(line) for line in progress.read_text().splitlines()]


def test_strings_of_100_megabytes_end_in_a_load_or_a_documented_error(tmp_path):
    done = ends(tmp_path, *FEW)
    assert len(done) > 15
    check(done, "strings of 100 MB, short")


@pytest.mark.faults
def test_strings_of_100_megabytes_and_bombs_end_in_a_load_or_a_documented_error(tmp_path):
    done = ends(tmp_path)
    check([row for row in done if row["kind"] != "bomb"], "strings of 100 MB")
    check([row for row in done if row["kind"] == "bomb"], "bombs")
