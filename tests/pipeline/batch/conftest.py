"""A model, its requests, and what one uninterrupted run makes of them."""

from __future__ import annotations

import pytest
from volume_runs import (
    asked,
    begin,
    tiny_model,
    written,
)  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def requests(tmp_path_factory):
    return written(tmp_path_factory.mktemp("in") / "in.jsonl", asked())


@pytest.fixture(scope="session")
def clean(model, requests, tmp_path_factory):
    """The folder of one uninterrupted run with one worker."""
    out = tmp_path_factory.mktemp("clean") / "out"
    begin(model, requests, out)
    return out
