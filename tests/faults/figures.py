"""Figures of the long trials: printed, and kept where MDIFF_FIGURES names a file."""

from __future__ import annotations

import json
import os
import sys


def record(name, figures):
    """One JSON line."""
    line = json.dumps({name: figures})
    print(line, file=sys.stderr)
    path = os.environ.get("MDIFF_FIGURES")
    if path:
        with open(path, "a") as file:
            file.write(line + "\n")
