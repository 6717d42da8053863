"""Mutated files of every kind end in a valid load or a documented error, soon and small."""

from __future__ import annotations

import json
from pathlib import Path

import processes
import pytest
from figures import check

BATCH = Path(__file__).parent / "batch.py"
# Without an answer for so long the child hangs where Python cannot interrupt it.
TIMEOUT_SECONDS = 580


def trials(tmp_path, first, stop):
    """What became of each trial; one that took the process down is in there as a crash."""
    done = []
    while first < stop:
        progress = tmp_path / f"{first}.jsonl"
        child = processes.python(
            BATCH, first, stop, progress, tmp_path / "w", timeout=TIMEOUT_SECONDS
        )
        rows = [json.loads(line) for line in progress.read_text().splitlines()]
        done += [row for row in rows if "kind" in row]
        if child.returncode == 0:
            break
        number = rows[-1]["number"]
        ended = f"undocumented end {child.returncode}: {child.stderr[-500:]}"
        done.append({"number": number, "kind": "?", "seconds": 0.0, "bytes": 0, "ended": ended})
        first = number + 1
    return done


def test_200_mutated_files_end_in_a_load_or_a_documented_error(tmp_path):
    done = trials(tmp_path, 0, 200)
    assert len(done) == 200
    assert len({row["kind"] for row in done}) > 25
    check(done, "mutated files, short")


@pytest.mark.faults
@pytest.mark.parametrize("part", range(10))
def test_10000_mutated_files_end_in_a_load_or_a_documented_error(tmp_path, part):
    done = trials(tmp_path, 1000 * part, 1000 * (part + 1))
    assert len(done) == 1000
    check(done, f"mutated files {part}")
