"""Films and pages of how pictures came about, and their parts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_commands import (
    QUICK,
    SIDE,
    Captured,
    array,
)
from PIL import Image
from text_commands import lines

from mdiff.cli import run
from mdiff.cli.images.requests import combined
from mdiff.cli.options import Drawing
from mdiff.cli.views.gif import FRAMES, Reel, write_gif
from mdiff.cli.views.grid import fitting_scale, grid_of, write_pictures
from mdiff.cli.views.trace import Grid, Record, page
from mdiff.errors import ConfigError
from mdiff.modalities.image.inpainting import GREY


def test_a_film_starts_hidden_ends_finished_and_holds_its_last_frame(grey: str, here: Path) -> None:
    words = ["generate", grey, "--n", "4", "--trace", "how.gif", "--scale-up", "2"]
    words += ["--sampler", "halton", "--steps", "12"]
    assert run([*words, "--out", "grid.png", "--batch-size", "3"]) == 0
    final = array(here / "grid.png")
    with Image.open(here / "how.gif") as film:
        assert 10 < film.n_frames <= FRAMES
        assert film.info["loop"] == 0
        first = np.array(film.convert("L"))
        # The positions of four pictures, and white around them.
        assert set(first.flat) == {GREY, 255}
        assert (first == GREY).sum() == 4 * (2 * SIDE) ** 2
        film.seek(film.n_frames - 1)
        assert film.info["duration"] >= 2000
        assert np.abs(np.array(film.convert("L")).astype(int) - final).max() <= 2


def test_a_film_of_an_edit_shows_what_is_kept_in_every_frame(joint: str, face: Path) -> None:
    Image.new("RGB", (SIDE, SIDE), (20, 90, 200)).save(face)
    words = ["edit", joint, str(face), "--mask", "2:6,2:6", "--trace", "how.gif", *QUICK]
    assert run([*words, "--out", "grid.png", "--scale-up", "1"]) == 0
    with Image.open("how.gif") as film:
        for number in range(film.n_frames):
            film.seek(number)
            shown = np.array(film.convert("RGB")).astype(int)[2 : 2 + SIDE, 2 : 2 + SIDE]
            assert np.abs(shown[:2] - [20, 90, 200]).max() <= 2


def test_equal_frames_are_one_and_the_table_keeps_paper_and_cover(tmp_path: Path) -> None:
    noisy = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    noisy[:5], noisy[5:10] = 255, GREY
    still = Image.fromarray(noisy)
    write_gif([still, still, still.rotate(180), still], tmp_path / "x.gif", scale=1)
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames == 3
        frame = np.array(film.convert("RGB"))
    assert (frame[:5] == 255).all()
    assert (frame[5:10] == GREY).all()


def test_a_long_reel_is_thinned_evenly_and_keeps_both_ends() -> None:
    reel = Reel(torch.tensor([[0]]), lambda row, picture: picture)
    for step in range(1, 1001):
        reel.add(torch.tensor([[step]]))
    assert len(reel.kept) < 2 * FRAMES
    kept = [int(tokens) for tokens in reel.kept]
    assert len(set(np.diff(kept))) == 1
    assert (int(reel.at(0)), int(reel.at(1))) == (0, 1000)
    assert abs(int(reel.at(0.5)) - 500) <= 2 * reel.stride


class Fetches(HTMLParser):
    """Collects the tags of a page, and what it would load."""

    def __init__(self, written: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()
        self.feed(written)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [f"{tag} {key}" for key, _ in attrs if key in ("src", "href", "srcset")]


def records(written: str) -> list[dict[str, Any]]:
    data = re.search(r'<script id="data"[^>]*>(.*?)</script>', written, flags=re.S)
    assert data is not None
    found: list[dict[str, Any]] = json.loads(data[1])
    return found


def test_a_page_holds_the_pictures_their_order_and_their_words(
    joint: str, here: Path, capsys: Captured
) -> None:
    words = ["generate", joint, "--label", "sneaker", "--n", "2", "--json", "--out", "each"]
    assert run([*words, "--trace", "how.html"]) == 0
    written = (here / "how.html").read_text(encoding="utf-8")
    assert Fetches(written).found == []
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttp", written)
    for row, record in zip(lines(capsys), records(written), strict=True):
        grid = record["grid"]
        assert record["kind"] == "grid"
        assert (grid["rows"], grid["columns"], grid["width"]) == (4, 4, SIDE)
        assert grid["source"].startswith("data:image/png;base64,")
        assert len(grid["step"]) == len(grid["log_prob"]) == 16
        # 32 codes of the picture and 6 of the caption, one a call; the label was given.
        assert record["steps"] == row["calls"] == 38
        assert row["writing"]["times"] == [1] * 32 + [0] + [1] * 6
        assert sum(row["writing"]["log_prob"]) == pytest.approx(row["log_prob"], abs=1e-3)
        assert record["step"][:2] == [0, 0]
        assert "".join(record["pieces"]) == f"sneaker\n{row['caption']}"


def test_words_about_a_picture_never_become_markup() -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    grid = Grid("data:image/png;base64,AA==", 1, 1, 1, 1, [1], [-1.0])
    written = page([Record("grid", [evil], [1], [-1.0], 1, evil, grid)], title=evil)
    parser = Fetches(written)
    assert "img" not in parser.tags
    assert parser.found == []
    assert records(written)[0]["pieces"] == [evil]


def test_a_grid_is_enlarged_while_it_fits(tmp_path: Path) -> None:
    small, large = Image.new("L", (8, 8)), Image.new("L", (900, 8))
    assert fitting_scale(small) == 8
    assert fitting_scale(grid_of([Image.new("L", (100, 100))] * 4)) == 3
    assert fitting_scale(large) == 1
    paths = write_pictures([small] * 2, tmp_path / "x.png", scale=None)
    assert array(paths[0]).shape == (12 * 8, 22 * 8)
    for scale in (None, 1, 3):
        (path,) = write_pictures([small], tmp_path / "x.png", scale=scale)
        assert array(path).shape == (8 * (scale or 1), 8 * (scale or 1))


def test_options_given_once_go_with_all_others() -> None:
    assert combined(["a", "b"], ["x"], None) == [
        {"label": "a", "caption": "x"},
        {"label": "b", "caption": "x"},
    ]
    assert combined(None, None, None) == combined(None, [""], None) == [{}]
    with pytest.raises(ConfigError, match="equally often"):
        combined(["a", "b"], ["x", "y", "z"], None)


def test_an_interval_of_guidance_needs_no_schedule_named() -> None:
    given = Drawing(guidance_scale=2.0, guidance_interval="0.2,0.8")
    plain = Drawing().options()
    interval = {"guidance_interval": (0.2, 0.8)}
    assert given.options() == plain | interval | {
        "guidance_scale": 2.0, "guidance_schedule": "interval",
    }  # fmt: skip
    assert not any(name.startswith("guidance") for name in plain)
    # One that is named stays, by its flag or by -o.
    named = {"guidance_schedule": "linear"}
    for words in (named, {"option": ["guidance_schedule=linear"]}):
        assert Drawing(guidance_interval="0.2,0.8", **words).options() == plain | interval | named
