"""The recipe of a sweep of toys, and what an uninterrupted sweep leaves."""

from __future__ import annotations

import pytest
from sweep_runs import GRID, begin, written_recipe
from volume_runs import server

from mdiff.pipeline.batch import engines


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    return written_recipe(tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="session")
def clean(recipe, tmp_path_factory):
    """The folder of one uninterrupted sweep of four runs in one process, and what it found."""
    out = tmp_path_factory.mktemp("clean") / "out"
    return out, begin(recipe, GRID, out)[0]


@pytest.fixture
def fast_workers(monkeypatch):
    context = server()
    monkeypatch.setattr(engines.multiprocessing, "get_context", lambda name: context)
