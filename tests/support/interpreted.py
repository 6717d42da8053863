"""Triton in its interpreter: conftest.py imports this before anything that imports Triton.

The variable counts while Triton is imported and while a kernel runs, so that it is set there and
nowhere else: other tests and the programs that they start run without it.
"""

from __future__ import annotations

import os

import pytest

NAME = "TRITON_INTERPRET"


def kernels_in_the_interpreter():
    """Import the kernels as functions of the interpreter."""
    before = os.environ.get(NAME)
    os.environ[NAME] = "1"
    try:
        from mdiff.kernels.gpu import draw as onepass_triton
        from mdiff.kernels.gpu import loss as loss_triton
        from mdiff.kernels.gpu import reveal as select_triton
    finally:
        if before is None:
            del os.environ[NAME]
        else:
            os.environ[NAME] = before
    return onepass_triton, select_triton, loss_triton


ONEPASS, SELECT, LOSS = kernels_in_the_interpreter()


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Run kernels in the interpreter during each test of the module that imports this."""
    monkeypatch.setenv(NAME, "1")
