"""What tests of commands on text share."""

from __future__ import annotations

import json
from typing import Any

import pytest

WINDOW = 64


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]
