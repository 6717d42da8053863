"""What tests of commands share."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from mdiff.cli import run

WINDOW = 64


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that a command ends with this code and one line that the pattern `message` fits."""
    assert run(words) == code, words
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err), captured.err
    assert captured.out == ""
