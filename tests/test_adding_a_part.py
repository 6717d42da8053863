"""The worked examples of docs/adding-a-part.md run as they are printed, in their rooms."""

from __future__ import annotations

import importlib
import json
import re
import sys

import mpmath
import numpy as np
import pytest
import torch
from folders import ROOT

import mdiff
from mdiff import TokenSpace, from_logits, nll_bound, sample
from mdiff.cli import run
from mdiff.find import names
from mdiff.training import load_recipe, train

PAGE = (ROOT / "docs" / "adding-a-part.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.S))
ROOMS = {
    "samplers": "mdiff.samplers",
    "mdiff/backbones": "mdiff.backbones",
    "mdiff/modalities": "mdiff.modalities",
    "mdiff/modalities/image/codecs": "mdiff.modalities.image.codecs",
}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """The files of the page, as if they lay in their rooms."""
    known = set(sys.modules)
    for name, code in BLOCKS.items():
        file = tmp_path / "parts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    for folder, package in ROOMS.items():
        room = importlib.import_module(package)
        monkeypatch.setattr(room, "__path__", [*room.__path__, str(tmp_path / "parts" / folder)])
    monkeypatch.syspath_prepend(tmp_path / "parts")
    importlib.invalidate_caches()
    yield
    for name in set(sys.modules) - known:
        if name.rpartition(".")[2] in {"odd_first", "sine_squared", "bag", "dna", "greys"}:
            del sys.modules[name]


def test_the_page_has_an_example_of_every_kind():
    assert len(BLOCKS) == 5


def test_the_sampler_reveals_odd_positions_first(parts, capsys):
    assert "odd_first" in names("samplers")
    model = from_logits(lambda tokens: torch.zeros(*tokens.shape, 5))
    space = TokenSpace(5, mask_id=5)
    states = mdiff.find.find("samplers", "odd-first")(model, torch.full((1, 4), 5), space=space)
    order = [int(state.revealed[0].nonzero()[0, 0]) for state in states]
    assert order == [1, 3, 0, 2]
    assert sample(model, torch.full((2, 4), 5), space=space, sampler="odd_first").calls.sum() == 8
    words = ["generate", "builtin:shakespeare", "--length", "6", "--sampler", "odd_first", "--json"]
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out)["calls"] == 6


def test_the_schedule_has_the_weight_of_its_curve(parts):
    schedule = importlib.import_module("sine_squared").SineSquared()
    for t in (0.1, 0.4, 0.9):
        slope = mpmath.diff(lambda x: mpmath.sin(mpmath.pi * x / 2) ** 2, t)
        assert float(schedule.weight(t)) == pytest.approx(
            float(slope) / float(schedule.mask_prob(t)), rel=1e-9
        )
        assert float(schedule.time_at(schedule.mask_prob(t))) == pytest.approx(t)
    # A uniform model costs log V a token, whatever the schedule.
    model = from_logits(lambda tokens: torch.zeros(*tokens.shape, 7, dtype=torch.float64))
    bound = nll_bound(
        model, torch.zeros(1, 5, dtype=torch.int64), space=TokenSpace(7, mask_id=7),
        schedule=schedule, estimator="time", draws=400, seed=1,
    )  # fmt: skip
    assert abs(float(bound.nats[0]) - 5 * np.log(7)) < 6 * float(bound.stderr[0])


def test_the_backbone_and_the_modality_are_trained_saved_and_loaded(parts, tmp_path, capsys):
    recipe = tmp_path / "dna.yaml"
    reads = ["ACGTACGT", "TTGGTTGG", "CCAACCAA", "GATTACAG"]
    recipe.write_text(json.dumps({
        "data": {"reads": reads, "length": 8},
        "modality": {"name": "dna"},
        "model": {"name": "bag", "width": 16},
        "train": {"steps": 4, "batch_size": 4, "save_every": 4},
    }))  # fmt: skip
    folder = train(load_recipe(recipe, []), tmp_path / "run", report=lambda line: None)
    model = mdiff.load(folder)
    made = model.generate("ACG", length=8, seed=1)[0]
    assert made.output.startswith("ACG")
    assert set(made.output) <= set("ACGT")
    assert len(made.output) == 8
    assert model.infill("AC--AC", seed=1)[0].output[:2] == "AC"
    again = tmp_path / "again"
    model.save(again)
    assert mdiff.load(again).generate("ACG", length=8, seed=1)[0].tokens == made.tokens
    assert run(["generate", str(tmp_path / "run"), "--prompt", "ACGZ", "--length", "8"]) == 3
    capsys.readouterr()


def test_the_codec_makes_a_modality_of_images(parts, tmp_path):
    from mdiff.modalities.image.modality import image

    modality = image(codec={"name": "greys"}, size=[4, 4])
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    ids = modality.encode(pixels)
    assert ids == list(range(16))
    assert np.abs(np.asarray(modality.decode(ids)).astype(int) - pixels).max() == 8
    modality.save(tmp_path)
    settings = modality.config()
    settings.pop("name")
    assert image(**settings, folder=tmp_path).encode(pixels) == ids
