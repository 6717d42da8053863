"""Options of some samplers that have a flag: as by `-o`, and refused by every other sampler."""

from __future__ import annotations

import inspect
import json

import pytest

from mdiff.cli import run
from mdiff.errors import ConfigError
from mdiff.find import find, names
from mdiff.sampling import bind

# A flag, a sampler that takes it, a value, and one out of range.
FLAGS = [
    ("eta", "remdm", "0.4", "-1"), ("threshold", "confidence", "0.003", "2"),
    ("threshold", "edit", "0.003", "-1"), ("edit_threshold", "edit", "0.001", "-1"),
    ("nats", "budget", "60", "-1"), ("drafts", "speculative", "3", "0"),
]  # fmt: skip
each_flag = pytest.mark.parametrize(("name", "sampler", "value", "wrong"), FLAGS)


def flag(name):
    return "--" + name.replace("_", "-")


def said(words, capsys, code=0):
    """What a command that ends with this code wrote to stdout, or to stderr where it is refused."""
    assert run(words) == code, capsys.readouterr().err
    shown = capsys.readouterr()
    return shown.err if code else shown.out


@each_flag
def test_a_flag_is_the_option_of_the_sampler(name, sampler, value, wrong, model, capsys):
    words = ["generate", model, "--length", "12", "--json", "--sampler", sampler]
    by_flag, by_pair = (
        json.loads(said([*words, *more], capsys))
        for more in ([flag(name), value], ["-o", f"{name}={value}"])
    )
    assert by_flag["text"] == by_pair["text"]
    assert by_flag["writing"] == by_pair["writing"]
    plain = json.loads(said(words, capsys))
    changed = [by_flag[key] != plain[key] for key in ("text", "calls", "writing")]
    assert any(changed)


@each_flag
def test_a_value_out_of_range_is_one_line(name, sampler, value, wrong, model, capsys):
    for each in (wrong, "nan", "x"):
        words = ["generate", model, "--length", "8", "--sampler", sampler, flag(name), each]
        assert said(words, capsys, code=2).count("\n") <= 2
    both = ["generate", model, "--sampler", sampler, flag(name), value, "-o", f"{name}={value}"]
    assert f"option {name}: given by its flag too" in said(both, capsys, code=2)


@pytest.mark.parametrize(("name", "value"), sorted({(flag[0], flag[2]) for flag in FLAGS}))
def test_every_other_sampler_refuses_it_and_names_those_that_take_it(name, value, model, capsys):
    takes = {n: inspect.signature(find("samplers", n)).parameters for n in names("samplers")}
    takers = [sampler for sampler, parameters in takes.items() if name in parameters]
    assert {sampler for flag, sampler, *_ in FLAGS if flag == name} <= {*takers}
    for sampler in sorted({*takes} - {*takers}):
        with pytest.raises(ConfigError) as refused:
            bind(sampler, {name: float(value)})
        error = str(refused.value)
        assert f"{sampler} does not take '{name}'; {', '.join(takers)} do" in error
        assert "\n" not in error
    words = ["generate", model, flag(name), value]
    assert f"first_hitting does not take '{name}'" in said(words, capsys, code=2)


def test_the_flags_are_those_of_pictures_and_of_revisions_too(tmp_path, model, capsys):
    draft = tmp_path / "draft.txt"
    draft.write_text("a finished text")
    words = ["revise", model, str(draft), "--json"]
    by_flag, by_pair = (
        json.loads(said([*words, *more], capsys))["text"]
        for more in (["--sampler", "edit", "--edit-threshold", "0.001"],
                     ["--sampler", "edit", "-o", "edit_threshold=0.001"])
    )  # fmt: skip
    assert by_flag == by_pair
    error = said([*words, "--nats", "1"], capsys, code=2)
    assert "remdm does not take 'nats'; budget does" in error
    error = said(["generate", "builtin:emoji", "--drafts", "2"], capsys, code=2)
    assert "does not take 'drafts'; speculative does" in error
