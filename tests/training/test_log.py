"""Training logs: every step in log.jsonl, and numbers of console lines by accelerate's trackers."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch.utils
from accelerate.tracking import GeneralTracker
from toy_training import QUIET, log, recipe

from mdiff.errors import BackendError, ConfigError, DataError
from mdiff.files.atomic import step_path
from mdiff.training import log as training_log
from mdiff.training.loop import train
from mdiff.training.recipe import Log

SHOWN = {"loss", "bits_per_mark", "lr", "grad_norm", "tokens_per_second"}


class Notes(GeneralTracker):
    """A tracker that keeps what it gets, and prints as some do."""

    name = "notes"
    requires_logging_directory = True
    made: list = []  # noqa: RUF012

    def __init__(self, run_name, logging_dir):
        super().__init__()
        self.given, self.calls = (run_name, logging_dir), []
        self.made.append(self)

    @property
    def tracker(self):
        return self.calls

    def start(self):
        print("started")
        self.calls.append("start")

    def store_init_configuration(self, values):
        self.calls.append(values)

    def log(self, values, step=None):
        print(values)
        self.calls.append((step, values))

    def finish(self):
        print("finished")
        self.calls.append("finish")


@pytest.fixture
def notes(monkeypatch):
    monkeypatch.setattr(Notes, "made", [])
    return Notes.made


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Stand-ins of tensorboard and trackio, and the calls that they get."""
    calls = []

    def noted(name):
        return lambda *values, **named: calls.append((name, values, named))

    def writer(directory, **options):
        calls.append(("writer", (directory,), options))
        names = ("add_hparams", "add_scalar", "flush", "close")
        return SimpleNamespace(**{name: noted(name) for name in names})

    def init(**options):
        calls.append(("init", (), options))
        return SimpleNamespace(log=noted("log"), finish=noted("finish"))

    board, trackio = ModuleType("tensorboard"), ModuleType("trackio")
    board.SummaryWriter, trackio.init = writer, init
    trackio.config = SimpleNamespace(update=noted("config"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(torch.utils, "tensorboard", board, raising=False)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setattr(training_log, "find_spec", lambda name: object())
    return calls


def of(calls, name):
    return [(values, named) for called, values, named in calls if called == name]


def test_a_tracker_gets_the_numbers_of_console_lines_and_stdout_nothing(tmp_path, notes, capsys):
    train(recipe(), tmp_path / "plain", **QUIET)
    settings = {"log__trackers": ["test_log:Notes"]}
    lines = []
    train(recipe(**settings), tmp_path / "run", report=lines.append)
    (tracker,) = notes
    assert tracker.given == ("run", tmp_path / "run")
    begin, values, *logged, end = tracker.calls
    assert (begin, end) == ("start", "finish")
    assert values["optim.lr"] == 0.02
    assert values["log.trackers"] == "['test_log:Notes']"
    assert all(isinstance(v, (bool, str, int, float, type(None))) for v in values.values())
    assert [step for step, _ in logged] == [1, 3, 6, 8]
    assert [line.split("/")[0] for line in lines] == [f"step {step}" for step, _ in logged]
    assert all(numbers.keys() == SHOWN for _, numbers in logged)
    records = log(tmp_path / "run")
    assert [numbers["lr"] for _, numbers in logged] == [records[n - 1]["lr"] for n in (1, 3, 6, 8)]
    mean = sum(record["loss"] for record in records[3:6]) / 3
    assert logged[2][1]["loss"] == pytest.approx(mean)
    assert records == log(tmp_path / "plain")
    assert capsys.readouterr().out == ""


def test_a_resumed_run_stores_its_settings_once(tmp_path, notes):
    settings = {"log__trackers": ["test_log:Notes"]}
    train(recipe(steps=3, **settings), tmp_path, **QUIET)
    train(recipe(steps=6, **settings), tmp_path, **QUIET)
    first, second = (tracker.calls for tracker in notes)
    assert [step for step, _ in first[2:-1]] == [1, 3]
    assert [step for step, _ in second[1:-1]] == [4, 6]


def test_a_run_that_fails_finishes_its_trackers(tmp_path, notes):
    settings = {"log__trackers": ["test_log:Notes"], "data__poison": 13}
    with pytest.raises(DataError, match="not finite"):
        train(recipe(**settings), tmp_path, **QUIET)
    assert notes[0].calls[-1] == "finish"


@pytest.mark.parametrize("named", [{"tensorboard": True}, {"trackers": ["tensorboard"]}])
def test_tensorboard_lies_in_the_run_and_a_resumed_run_replaces_its_steps(
    tmp_path, stand_ins, named
):
    settings = {f"log__{key}": value for key, value in named.items()}
    train(recipe(**settings), tmp_path, **QUIET)
    ((folder,), options), *_ = of(stand_ins, "writer")
    assert (folder, options) == (str(tmp_path / "tensorboard"), {"purge_step": 1})
    scalars = of(stand_ins, "add_scalar")
    assert {named["global_step"] for _, named in scalars} == {1, 3, 6, 8}
    assert {values[0] for values, _ in scalars} == SHOWN
    assert len(of(stand_ins, "close")) == 1
    stand_ins.clear()
    source = step_path(tmp_path, 6)
    train(recipe(**settings), tmp_path / "again", resume=str(source), **QUIET)
    assert of(stand_ins, "writer")[0][1] == {"purge_step": 7}


def test_trackio_has_a_project_of_runs_side_by_side_and_goes_on_with_one(tmp_path, stand_ins):
    out = tmp_path / "sweep" / "width-64"
    train(recipe(log__trackers=["trackio"]), out, **QUIET)
    assert of(stand_ins, "init") == [
        ((), {"project": "sweep", "name": "width-64", "resume": "allow"})
    ]
    assert [named["step"] for _, named in of(stand_ins, "log")] == [1, 3, 6, 8]
    assert len(of(stand_ins, "config")) == len(of(stand_ins, "finish")) == 1


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(
    tmp_path, monkeypatch, name
):
    monkeypatch.setattr(training_log, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=f"{name} is not installed: pip install {name}") as error:
        train(recipe(log__trackers=[name]), tmp_path / "run", **QUIET)
    assert error.value.exit_code == 5
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "unknown tracker 'tensorbord'; did you mean 'tensorboard'"),
        ("", "unknown tracker ''; known: tensorboard, trackio"),
        ("test_log:Nothing", "'test_log:Nothing' cannot be imported"),
        ("no.module:Notes", "'no.module:Notes' cannot be imported"),
        ("test_log:SHOWN", "is not a class of accelerate's trackers"),
        ("collections:Counter", "is not a class of accelerate's trackers"),
    ],
)
def test_what_is_no_tracker_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        training_log.tracker_classes(Log(trackers=[name]))
