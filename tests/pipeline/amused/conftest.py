"""The golden aMUSEd, loaded once, and a copy of its files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from amused_goldens import FOLDER

import mdiff
from mdiff.pipeline.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return mdiff.load(FOLDER)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(FOLDER, tmp_path / "amused")
