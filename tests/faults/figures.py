"""Figures of the long trials: printed, and kept where MDIFF_FIGURES names a file."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter

# What a file may take: CPU seconds, and bytes of resident memory above those before.
MOST_SECONDS, MOST_BYTES = 2.0, 512 * 2**20


def record(name, figures):
    """One JSON line."""
    line = json.dumps({name: figures})
    print(line, file=sys.stderr)
    path = os.environ.get("MDIFF_FIGURES")
    if path:
        with open(path, "a") as file:
            file.write(line + "\n")


def check(done, name):
    """No undocumented end, no slow and no large one."""
    ends = Counter(row["ended"].split(":")[0] for row in done)
    record(name, {
        "trials": len(done), "ends": dict(ends),
        "most CPU seconds": max(row["seconds"] for row in done),
        "most MiB": max(row["bytes"] for row in done) / 2**20,
    })  # fmt: skip
    known = {"loaded", "CheckpointError", "ConfigError", "DataError", "BackendError"}
    wrong = [
        row
        for row in done
        if row["ended"] not in known or row["seconds"] > MOST_SECONDS or row["bytes"] > MOST_BYTES
    ]
    assert not wrong, json.dumps(wrong[:5], indent=1)
