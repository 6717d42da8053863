"""Examples in docstrings, in the README and in examples/ run as they are printed."""

from __future__ import annotations

import doctest
import importlib.util
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from folders import ROOT

MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in (ROOT / "mdiff").rglob("*.py")
    if path.name != "__main__.py"
)
ROOMS = [
    f"mdiff.{room}.{path.stem}"
    for room in ("kernels", "samplers")
    for path in sorted((ROOT / room).glob("*.py"))
]


@pytest.mark.parametrize("name", sorted({*MODULES, *ROOMS}))
def test_the_examples_of_docstrings_are_true(name):
    failed, _ = doctest.testmod(import_module(name))
    assert failed == 0


@pytest.mark.parametrize("page", ["README.md", "docs/images.md"])
def test_the_python_of_a_page_runs(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    for block in blocks:
        torch.manual_seed(0)
        exec(compile(block, page, "exec"), {})
    assert page != "README.md" or "To be, or" in capsys.readouterr().out


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_short_and_has_a_test():
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60
        assert path.stem in Path(__file__).read_text()


def test_the_masked_model_answers_facts_the_other_way_round():
    right = load("reversal").main(count=12, steps=200)
    assert right["masked, asked for the name"] >= 0.9
    assert right["autoregressive, asked for the name"] <= 0.5


def test_a_canvas_can_be_watched_as_it_fills_in():
    watch = load("watch")
    lines = watch.main()
    assert len(lines) > 3
    assert watch.GAP in lines[0]
    assert watch.GAP not in lines[-1]
    assert lines[-1].startswith("To be, or")


def test_digits_come_out_of_bits_as_the_label_asks(capsys):
    example = load("bits")
    black = example.main()
    assert len(capsys.readouterr().out.splitlines()) == 8
    tokens, labels = example.digits()
    known = ((tokens[..., None] & example.WORTH) > 0).flatten(1).float()
    nearest = torch.cdist(black.flatten(1).float(), known, p=1).topk(3, largest=False).indices
    assert int((labels[nearest].mode(1).values == torch.arange(10)).sum()) >= 8


@pytest.mark.slow
def test_the_whole_reversal_example_answers_ninety_percent():
    right = load("reversal").main()
    assert right["masked, asked for the name"] >= 0.9
    assert right["autoregressive, asked for the name"] <= 0.1
