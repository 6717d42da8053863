"""Pictures by `mdiff generate`, `demo`, `inspect` and `doctor`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from picture_commands import (
    KEYS,
    LABELS,
    QUICK,
    SIDE,
    Captured,
    array,
    kept,
)
from PIL import Image
from text_commands import lines

from mdiff.cli import demo, run
from mdiff.cli.doctor import environment, picture_checks
from mdiff.modalities.image.codec import save_codec
from mdiff.modalities.image.inpainting import GREY
from mdiff.pipeline.loading import load


def test_a_grid_is_written_row_by_row_and_enlarged_by_squares(
    grey: str, here: Path, capsys: Captured
) -> None:
    words = ["generate", grey, "--label", "Sneaker", "--n", "5", "--guidance-scale", "2"]
    words += [*QUICK, "--guidance-schedule", "linear"]
    assert run([*words, "--out", "each"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "each\n"
    assert "5 samples" in captured.err
    assert run([*words, "--out", "grid.png", "--scale-up", "3"]) == 0
    assert sorted(path.name for path in (here / "each").iterdir()) == [
        f"00{number}.png" for number in range(5)
    ]
    grid = array(here / "grid.png")
    plain = grid[::3, ::3]
    assert np.array_equal(plain.repeat(3, 0).repeat(3, 1), grid)
    for number in range(5):
        row, column = divmod(number, 3)
        top, left = 2 + row * (SIDE + 2), 2 + column * (SIDE + 2)
        own = array(here / "each" / f"00{number}.png")
        assert own.shape == (SIDE, SIDE)
        assert np.array_equal(plain[top : top + SIDE, left : left + SIDE], own)


def test_several_requests_have_a_row_of_the_grid_each(grey: str, here: Path) -> None:
    words = ["generate", grey, "--label", "t-shirt", "--label", "sneaker", "--n", "5", *QUICK]
    assert run([*words, "--out", "grid.png", "--scale-up", "1", "--trace", "how.gif"]) == 0
    assert array(here / "grid.png").shape == (2 * (SIDE + 2) + 2, 5 * (SIDE + 2) + 2)
    with Image.open(here / "how.gif") as film:
        assert film.size == (5 * (SIDE + 2) + 2, 2 * (SIDE + 2) + 2)


def test_json_is_one_object_a_sample_that_its_seed_gives_again(
    grey: str, here: Path, capsys: Captured
) -> None:
    words = ["generate", grey, "--label", "t-shirt", "--label", "ankle boot", "--json", *QUICK]
    assert run([*words, "--n", "2", "--out", "out"]) == 0
    found = lines(capsys)
    assert [row["label"] for row in found] == ["t-shirt"] * 2 + ["ankle boot"] * 2
    assert all(set(row) == KEYS | {"file", "label"} for row in found)
    assert [Path(row["file"]).is_file() for row in found] == [True] * 4
    again = ["generate", grey, "--label", "ankle boot", *QUICK, "--json"]
    again += ["--seed", str(found[2]["seed"])]
    assert run([*again, "--out", "again"]) == 0
    assert lines(capsys)[0]["tokens"] == found[2]["tokens"]
    assert np.array_equal(array(here / found[2]["file"]), array(here / "again" / "000.png"))


def test_without_out_a_new_file_is_named_after_the_model(
    grey: str, here: Path, capsys: Captured
) -> None:
    for expected in ("grey.png", "grey-2.png"):
        assert run(["generate", grey, *QUICK]) == 0
        captured = capsys.readouterr()
        assert captured.out == f"{expected}\n"
        assert f"the grid goes to {expected}" in captured.err
        assert (here / expected).is_file()


def test_a_picture_that_is_given_is_put_into_words(
    joint: str, face: Path, capsys: Captured
) -> None:
    assert run(["generate", joint, "--image", str(face), "--label", "sneaker"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert list(face.parent.iterdir()) == [face]
    assert run(["generate", joint, "--image", str(face), "--n", "2", "--json"]) == 0
    for row in lines(capsys):
        assert set(row) == KEYS | {"text", "label", "caption", "picture"}
        assert row["label"] in LABELS
        assert row["text"] == f"{row['label']}: {row['caption']}"


def test_a_file_of_requests_gives_what_its_lines_say(
    joint: str, face: Path, here: Path, capsys: Captured
) -> None:
    rows = [{"label": "sneaker", "prompt": "a bee"}, {"image": str(face)}, {}]
    (here / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["generate", joint, "--input", "in.jsonl", "--out", "made", "--json"]
    assert run([*words, *QUICK]) == 0
    first, second, _ = lines(capsys)
    assert (first["label"], first["caption"], first["calls"]) == ("sneaker", "a bee", 3)
    assert second["picture"] == str(face)
    assert len(list((here / "made").iterdir())) == 3


def test_the_demo_draws_pictures_and_regenerates_a_part_of_one(
    joint: str, here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SAMPLER", "halton")
    monkeypatch.setattr(demo, "OPTIONS", {"steps": 3})
    monkeypatch.setattr(demo, "SHOWN", "a cat")
    made = demo.drawn(kept(joint), joint, 0, here / "demo.png")
    assert [record.kind for record in made] == ["grid"] * (demo.COUNT + demo.VARIANTS)
    assert capsys.readouterr().out.count("samples") == 2
    cell = demo.SCALE * (SIDE + 2)
    grid = array(here / "demo.png")
    assert grid.shape == (3 * cell + 6, 10 * cell + 6, 3)
    # The last row: one picture, the same with its lower half covered, and the variants of that.
    plain = grid[:: demo.SCALE, :: demo.SCALE][2 + 2 * (SIDE + 2) :][:SIDE]
    whole, covered, *rest = (plain[:, left : left + SIDE] for left in range(2, 100, SIDE + 2))
    assert (covered[SIDE // 2 :] == GREY).all()
    for each in (covered, *rest):
        assert np.array_equal(each[: SIDE // 2], whole[: SIDE // 2])


def test_the_demo_says_which_model_is_missing(
    here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "PICTURES", "builtin:nothing")
    monkeypatch.setattr(demo, "written", lambda *_: [])
    assert run(["demo", "--pictures", "builtin:nothing", "--out", "x.html"]) == 0
    captured = capsys.readouterr()
    assert "builtin:nothing is not in this installation" in captured.err
    assert captured.out == f"{here / 'x.html'}\n"


def test_inspect_shows_the_codec_and_the_parts(joint: str, here: Path, capsys: Captured) -> None:
    assert run(["inspect", joint]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"codec +vq, 16 ids, 2 a position of 2 x 2 pixels", shown)
    assert re.search(r"part image +32 tokens, ids 0 to 15\n", shown)
    assert re.search(r"labels +a part: t-shirt, sneaker, ankle boot", shown)
    assert "codec.codebook" in shown
    codec = load(joint).modality.codec
    (here / "codec").mkdir()
    save_codec(codec, here / "codec")
    assert run(["inspect", "codec", "--json"]) == 0
    (found,) = lines(capsys)
    assert (found["tokenizer"], found["stride"]) == ("vq", 2)


def test_doctor_checks_pictures_and_names_the_models() -> None:
    assert all(check["passed"] for check in picture_checks())
    assert "builtin:shakespeare" in environment()["models"]


def test_a_long_job_says_how_far_it_is(
    grey: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdiff.cli.images.generate.REPORT_EVERY", 0.0)
    words = ["generate", grey, "--label", "sneaker", "--n", "4", *QUICK]
    assert run([*words, "--out", str(tmp_path / "grid.png")]) == 0
    said = re.findall(r"(\d+) made, (\d+) more (\d+) percent filled in", capsys.readouterr().err)
    assert [(made, more) for made, more, _ in said] == [("0", "4")] * 3
    assert said[-1][2] == "100"
