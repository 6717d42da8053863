"""`mdiff edit`: what is kept to the pixel, and what is regenerated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from picture_commands import (
    KEYS,
    QUICK,
    SIDE,
    Captured,
    array,
    in_greys,
)
from PIL import Image
from text_commands import lines

from mdiff.cli import run
from mdiff.cli.images.edit import region_of
from mdiff.errors import DataError, MdiffError
from mdiff.modalities.image.inpainting import box_mask

VARIANTS = 3


@pytest.mark.parametrize("model", ["grey", "joint"])
@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["--mask", "2:5,1:7"], np.s_[2:5, 1:7]),
        (["--mask-file", "mask.png"], np.s_[3:4, 3:8]),
        (["--mask", "0:8,0:3", "--strength", "0.5"], np.s_[0:8, 0:3]),
    ],
)
def test_not_one_pixel_outside_the_mask_changes(
    model: str, words: list[str], changed: Any, face: Path, request: pytest.FixtureRequest
) -> None:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[3:4, 3:8] = 255
    Image.fromarray(mask).save("mask.png")
    if model == "grey":
        in_greys(face)
    more = ["--n", str(VARIANTS), "--out", "out", *QUICK]
    assert run(["edit", request.getfixturevalue(model), str(face), *words, *more]) == 0
    free = np.zeros((SIDE, SIDE), bool)
    free[changed] = True
    made = [array(path) for path in sorted(Path("out").iterdir())]
    assert len(made) == VARIANTS
    for variant in made:
        assert np.array_equal(variant[~free], array(face)[~free])
    assert any(not np.array_equal(variant[free], array(face)[free]) for variant in made)


def test_what_is_kept_stays_and_all_around_it_is_regenerated(joint: str, face: Path) -> None:
    words = ["edit", joint, str(face), "--keep", "2:6,2:6", "--n", "2", "--out", "out", *QUICK]
    assert run([*words, "--prompt", "a cat", "--label", "sneaker"]) == 0
    for path in Path("out").iterdir():
        made = array(path)
        assert np.array_equal(made[2:6, 2:6], array(face)[2:6, 2:6])
        assert not np.array_equal(made[:2], array(face)[:2])


def test_strength_is_the_share_of_regenerated_tokens(
    grey: str, face: Path, capsys: Captured
) -> None:
    Image.fromarray(np.full((SIDE, SIDE), 120, np.uint8)).save(face)
    for strength, calls in (("0", 0), ("0.25", SIDE * SIDE // 4)):
        words = ["edit", grey, str(face), "--strength", strength, "--out", f"{strength}.png"]
        assert run([*words, "--json"]) == 0
        (row,) = lines(capsys)
        assert row["calls"] == calls
        assert set(row) == KEYS | {"file", "picture"}
    assert set(array(Path("0.png")).flat) == {120}


def test_clear_parts_are_composed_on_white(joint: str, here: Path) -> None:
    clear = np.zeros((SIDE, SIDE, 4), np.uint8)
    clear[4:] = (255, 0, 0, 255)
    Image.fromarray(clear).save("clear.png")
    assert run(["edit", joint, "clear.png", "--mask", "3:5,3:5", "--out", "out", *QUICK]) == 0
    made = array(here / "out" / "000.png")
    assert made[0, 0].tolist() == [255, 255, 255]
    assert made[7, 7].tolist() == [255, 0, 0]


def test_another_size_is_scaled_where_that_is_asked_for(
    joint: str, here: Path, capsys: Captured
) -> None:
    Image.new("RGB", (40, 20), (9, 200, 30)).save("wide.png")
    words = ["edit", joint, "wide.png", "--mask", "0:2,0:2", "--out", "out", *QUICK]
    assert run(words) == 3
    assert "20 x 40 pixels" in capsys.readouterr().err
    assert run([*words, "--resize"]) == 0
    assert array(here / "out" / "000.png")[4, 4].tolist() == [9, 200, 30]


def test_a_batch_goes_on_past_bad_files_and_names_them_at_the_end(
    joint: str, face: Path, capsys: Captured
) -> None:
    Path("cut.png").write_bytes(face.read_bytes()[:60])
    words = ["edit", joint, "cut.png", str(face), "gone.png", str(face), "--mask", "0:4,0:4"]
    assert run([*words, *QUICK, "--n", "2", "--out", "out"]) == 3
    captured = capsys.readouterr()
    assert captured.out == "out\n"
    assert len(list(Path("out").iterdir())) == 4
    assert captured.err.count("left out: ") == 2
    last = captured.err.splitlines()[-1]
    assert re.match(r"error: 2 of 4 pictures were left out; the first: cut.png", last)


@given(st.text(st.sampled_from("0123456789:,- x"), max_size=12))
def test_any_box_is_its_slice_or_an_error(box: str) -> None:
    try:
        made = box_mask(box, (5, 7))
    except MdiffError:
        return
    rows, columns = (slice(*map(int, side.split(":"))) for side in box.split(","))
    expected = torch.zeros(5, 7, dtype=torch.bool)
    expected[rows, columns] = True
    assert torch.equal(made, expected)
    assert bool(made.any())


@given(*[st.integers(0, 7)] * 4)
def test_a_box_inside_is_regenerated_and_what_is_kept_is_the_rest(
    top: int, bottom: int, left: int, right: int
) -> None:
    box = f"{top}:{bottom},{left}:{right}"
    if not (top < bottom and left < right):
        with pytest.raises(DataError):
            region_of(box, None, None, size=(7, 7))
        return
    made = region_of(box, None, None, size=(7, 7))
    assert int(made.sum()) == (bottom - top) * (right - left)
    if not bool(made.all()):
        assert torch.equal(region_of(None, None, box, size=(7, 7)), ~made)
