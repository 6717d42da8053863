"""What launchers, job scripts and notebooks leave in the environment."""

from __future__ import annotations

import os

import pytest
from accelerate.state import AcceleratorState

from mdiff.errors import BackendError, ConfigError, MdiffError
from mdiff.training.processes import started

PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "PMI_", "MPI_", "OMPI_", "MV2_", "ACCEL")


@pytest.fixture
def launched(monkeypatch):
    """Sets the environment of a launcher in a process that has joined none."""

    def set_to(**given):
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    for name in list(os.environ):
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)
    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield set_to
    AcceleratorState._reset_state(reset_partial_state=True)
    # accelerate writes what it has found of a launcher.
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "MASTER_PORT": "29500", "LOCAL_RANK": "0"},
        {"LOCAL_RANK": "0"},
        {"LOCAL_RANK": "-1", "WORLD_SIZE": "1"},
        {"RANK": "0"},
        {"LOCAL_RANK": "first"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": ""},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "1", "PMI_RANK": "0", "LOCAL_RANK": "0"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"},
        {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "29500"},
    ],
)
def test_one_process_is_one_process(given, launched):
    launched(**given)
    before = dict(os.environ)
    made = started()
    assert made.num_processes == 1
    assert made.is_main_process
    assert {name: os.environ.get(name) for name in given} == {n: before[n] for n in given}


@pytest.mark.parametrize(
    ("given", "lacking"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}, "lacks MASTER_ADDR"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "WORLD_SIZE=2"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "MASTER_ADDR"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "first", "MASTER_ADDR": "127.0.0.1"}, "first"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "x"),
    ],
)
def test_processes_that_cannot_meet_are_a_backend_error_that_says_why(given, lacking, launched):
    launched(**given)
    with pytest.raises(BackendError, match=lacking) as caught:
        started()
    assert isinstance(caught.value, MdiffError)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    "given", [{"WORLD_SIZE": "two"}, {"RANK": ""}, {"RANK": "3", "WORLD_SIZE": "2"}]
)
def test_ranks_that_are_invalid_are_refused(given, launched):
    launched(**given)
    with pytest.raises(ConfigError, match="RANK"):
        started()
