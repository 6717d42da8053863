"""`mdiff revise` and `Pipeline.revise`: what stays, what may change, and wrong input."""

from __future__ import annotations

import json
import re

import pytest
import torch
from folders import ROOT

import mdiff
from mdiff.cli import run
from mdiff.errors import ConfigError

DRAFT = "ROMEO:\nO, she doth teach the torches to burn bright!\n"


@pytest.fixture(scope="module")
def model():
    return mdiff.load("builtin:shakespeare")


@pytest.mark.parametrize(("sampler", "options"), [
    ("remdm", {}), ("psi", {"steps": 6}), ("gibbs", {"sweeps": 0.3}),
    ("edit", {"temperature": 0.0}),
    ("path_planning", {"steps": 4, "kept": 0.7}), ("remdm", {"rule": "loop", "steps": 8}),
    ("blocks", {"inner": "gibbs", "block_length": 8}),
])  # fmt: skip
def test_what_is_kept_stays_and_the_rest_may_change(model, sampler, options):
    made = model.revise(DRAFT, keep=[(0, 6), (9, 12)], sampler=sampler, num_samples=2, **options)
    assert len(made) == 2
    for sample in made:
        assert str(sample).startswith("ROMEO:")
        assert model.space.mask_id not in sample.tokens
        assert len(sample.tokens) == len(model.modality.encode(DRAFT))
    if sampler != "edit":
        assert any(str(sample) != DRAFT for sample in made)
        assert made[0].tokens != made[1].tokens


def test_all_kept_is_the_text_itself_without_a_call(model):
    (same,) = model.revise(DRAFT, keep=[(0, len(DRAFT))])
    assert (str(same), same.calls) == (DRAFT, 0)


def test_a_row_is_revised_alone_as_in_its_batch(model):
    together = model.revise(DRAFT, num_samples=3, seed=5, batch_size=3)
    apart = model.revise(DRAFT, num_samples=3, seed=5, batch_size=1)
    assert [sample.tokens for sample in together] == [sample.tokens for sample in apart]
    again = model.revise(DRAFT, seed=torch.tensor([together[2].seed]))
    assert again[0].tokens == together[2].tokens


def test_ranges_outside_and_models_of_pictures_are_refused(model):
    for keep in ([(0, 10_000)], [(5, 5)], [(-1, 3)]):
        with pytest.raises(ConfigError, match="the text has characters 0:"):
            model.revise(DRAFT, keep=keep)
    with pytest.raises(ConfigError, match="not of text"):
        mdiff.load("builtin:emoji").revise(DRAFT)


def test_the_command_writes_a_file_or_prints(tmp_path, capsys):
    draft, out = tmp_path / "draft.txt", tmp_path / "better.txt"
    draft.write_text(DRAFT)
    words = ["revise", "builtin:shakespeare", str(draft), "--keep", "0:6", "--rounds", "5"]
    assert run([*words, "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert run(words) == 0
    assert capsys.readouterr().out.rstrip("\n") == out.read_text().rstrip("\n")
    trace = tmp_path / "page.html"
    assert run([*words, "--stream", "--trace", str(trace)]) == 0
    shown = capsys.readouterr()
    assert shown.out.rstrip("\n") == out.read_text().rstrip("\n")
    assert "▒" in shown.err
    (record,) = json.loads(re.search(r'id="data"[^>]*>(.*?)</script>', trace.read_text())[1])
    assert "".join(record["pieces"]) == out.read_text()
    # The page begins with the draft.
    begun = [past[0][0] if past else piece
             for past, piece in zip(record["past"], record["pieces"])]  # fmt: skip
    assert "".join(begun) == DRAFT
    assert run([*words, "--json", "--num-samples", "2"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == out.read_text()
    assert first["seed"] != second["seed"]
    writing = first["writing"]
    assert {len(values) for values in writing.values()} == {len(first["tokens"])}
    # What --keep names was never written.
    assert writing["times"][0] == writing["step"][0] == writing["log_prob"][0] == 0
    drawn = [i for i, times in enumerate(writing["times"]) if times]
    assert drawn
    assert all(writing["log_prob"][i] < 0 < writing["step"][i] for i in drawn)


@pytest.mark.parametrize(("words", "said"), [
    (["--rounds", "0"], "steps=0"), (["--strength", "2"], "above 0 and at most 1"),
    (["--sampler", "halton", "--strength", "0.5"], "as it stands"),
    (["--strength", "0"], "above 0"), (["--keep", "5:2"], "characters 0:"),
    (["--keep", "a"], "FIRST:STOP"), (["--sampler", "gibbs", "--rounds", "3"], "sweeps"),
    (["--sampler", "edit", "--strength", "0.3"], "as it stands"),
    (["--steps", "3", "--rounds", "4"], "give one of them"),
    (["--strength", "0.4", "-o", "start=0.5"], "strength and start: give one of them"),
    (["--sampler", "path_planning", "--strength", "0.4", "-o", "kept=0.5"], "strength and kept"),
    (["--rounds", "3", "-o", "steps=4"], "rounds and steps: give one of them"),
    (["--num-samples", "0"], "num_samples=0: need at least 1"), (["--steps", "0"], "steps=0"),
    (["--keep", "\u00b2:\u00b3"], "FIRST:STOP"),
    (["--trace", "x.gif"], "ends in .html"), (["--stream", "--json"], "--stream does not go"),
    (["--out", "no/such/folder.txt"], "there is no directory"), (["--out", "."], "a directory"),
    (["--out", "x.txt", "--trace", "./x.txt"], "ends in .html"),
    (["--out", "x.html", "--trace", "./x.html"], "the same file"),
    (["--out", "x.txt", "--num-samples", "2"], "--out holds one text"),
    (["--sampler", "halton"], "no token was taken back"), (["--sampler", "remdmm"], "remdm"),
])  # fmt: skip
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, words, said):
    draft = tmp_path / "draft.txt"
    draft.write_text(DRAFT)
    assert run(["revise", "builtin:shakespeare", str(draft), *words]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""
    assert shown.err.count("error:") == 1


def test_the_command_is_named_in_the_page_on_samplers():
    assert "mdiff revise builtin:shakespeare" in (ROOT / "docs" / "samplers.md").read_text()
