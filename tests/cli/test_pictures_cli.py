"""`mdiff generate` and `mdiff edit` on pictures: files, films, pages, and every bad input."""

from __future__ import annotations

import functools
import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mdiff.backbones.transformer import transformer
from mdiff.cli import demo, run
from mdiff.cli.doctor import environment, picture_checks
from mdiff.cli.images.edit import region_of
from mdiff.cli.images.requests import combined
from mdiff.cli.options import guidance_options
from mdiff.cli.views.gif import FRAMES, Reel, write_gif
from mdiff.cli.views.grid import fitting_scale, grid_of, write_pictures
from mdiff.cli.views.trace import Grid, Record, page
from mdiff.errors import ConfigError, DataError, MdiffError
from mdiff.modalities.image.codec import save_codec
from mdiff.modalities.image.data.images import Pictures
from mdiff.modalities.image.inpainting import GREY, box_mask
from mdiff.modalities.image.modality import image
from mdiff.pipeline.loading import load
from mdiff.pipeline.pipeline import Pipeline

Captured = pytest.CaptureFixture[str]
SIDE = 8
LABELS = ["t-shirt", "sneaker", "ankle boot"]
QUICK = ["--sampler", "halton", "--steps", "3"]
KEYS = {"tokens", "calls", "seconds", "log_prob", "entropy", "seed"}
VARIANTS = 3


def saved(modality: Any, folder: Path) -> str:
    torch.manual_seed(0)
    space = modality.space
    denoiser = transformer(
        vocab_size=space.vocab_size, mask_id=space.mask_id, layout=modality.layout,
        classes=modality.classes, width=16, depth=1, heads=2, init_std=0.3,
    )  # fmt: skip
    Pipeline(denoiser.eval(), space, modality, window=modality.length).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Grey pictures of 8 x 8 with a label as their condition."""
    codec = {"name": "levels", "levels": 4, "step": 60}
    made = image(codec=codec, size=[SIDE, SIDE], label="condition", labels=LABELS)
    return saved(made, tmp_path_factory.mktemp("models") / "grey")


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Coloured pictures of 8 x 8 in codes of 2 pixels that read beyond them, with captions."""
    torch.manual_seed(1)
    codec = {"name": "vq", "stride": 2, "codebook_size": 16, "width": 8, "splits": 2}
    made = image(
        codec=codec, size=[SIDE, SIDE], label="part", labels=LABELS,
        caption={"length": 6, "vocab_size": 260},
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, SIDE, SIDE), generator=random).to(torch.uint8)
    names = [str(number) for number in range(6)]
    labels = torch.arange(6) % 3
    said = ["a cat", "a bee", "an ant"] * 2
    made.examples(Pictures(pixels, names, labels, list(LABELS), said), split="train")
    return saved(made, tmp_path_factory.mktemp("models") / "joint")


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is read from its folder once, not by every command of this file."""
    monkeypatch.setattr("mdiff.pipeline.load", kept)


def kept(model: Any, **options: Any) -> Pipeline:
    """The model; of those by a name one for all commands."""
    return by_name(model, **options) if isinstance(model, str) else load(model, **options)


by_name = functools.cache(load)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def face(here: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(here / "face.png")
    return here / "face.png"


def in_greys(path: Path) -> None:
    """The picture in the four greys that the grey model's codec knows."""
    Image.fromarray(array(path)[..., 0] // 64 * 60).save(path)


def lines(capsys: Captured) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def array(path: Path) -> Any:
    with Image.open(path) as opened:
        return np.array(opened)


# generate


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


# edit


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


# How it came about


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


# demo, inspect, doctor


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


# Bad input: one line, the exit code, no traceback.


def refused(words: list[str], code: int, expected: str, capsys: Captured) -> None:
    assert run(words) == code, words
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert re.search(expected, captured.err), captured.err
    assert captured.out == ""


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height grey pixels, and holds almost none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gone.png", "no such file"),
        ("words.png", "not a picture"),
        ("empty.png", "not a picture"),
        ("cut.png", "cannot be read"),
        ("bomb.png", "pixels"),
        ("zero.png", "cannot be read|not a picture"),
        ("deep.tif", "mode F"),
        ("small.png", "4 x 5 pixels.*--resize"),
        ("folder.png", "no such file"),
    ],
)
@pytest.mark.parametrize("command", ["edit", "generate"])
def test_a_picture_that_is_no_good_is_one_line(
    command: str, name: str, expected: str, joint: str, here: Path, capsys: Captured
) -> None:
    Path("folder.png").mkdir()
    Path("words.png").write_text("not a picture at all")
    Path("empty.png").write_bytes(b"")
    Path("bomb.png").write_bytes(png(60_000, 60_000))
    Path("zero.png").write_bytes(png(0, 8))
    Image.new("RGB", (5, 4)).save("small.png")
    Image.fromarray(np.full((SIDE, SIDE), 0.5, np.float32)).save("deep.tif")
    whole = here / "whole.png"
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(whole)
    Path("cut.png").write_bytes(whole.read_bytes()[:-60])
    more = {"edit": [name, "--mask", "0:2,0:2"], "generate": ["--image", name]}[command]
    refused([command, joint, *more], 3, expected, capsys)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "CMYK", "YCbCr", "RGBA"])
def test_pictures_of_any_eight_bit_mode_are_taken(mode: str, joint: str, here: Path) -> None:
    name = "x.tiff" if mode in ("CMYK", "YCbCr") else "x.png"
    Image.new("L", (SIDE, SIDE), 255).convert("RGB").convert(mode).save(name)
    assert run(["edit", joint, name, "--mask", "0:2,0:2", "--out", "out", *QUICK]) == 0
    assert (array(here / "out" / "000.png")[3:] >= 254).all()


def test_a_picture_that_the_codec_cannot_take_does_not_end_the_batch(
    grey: str, face: Path, capsys: Captured
) -> None:
    in_greys(face)
    Image.new("L", (SIDE, SIDE), 61).save("odd.png")
    assert run(["edit", grey, str(face), "odd.png", "--mask", "0:1,0:1", "--out", "out"]) == 3
    assert len(list(Path("out").iterdir())) == 1
    assert "odd.png: pixel value 61" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--mask", "0:9,0:4"], 3, "inside 8 rows and 8 columns"),
        (["--mask", "4:4,0:4"], 3, "not empty"),
        (["--mask", "-1:4,0:4"], 3, "inside 8 rows"),
        (["--mask", "8:24"], 2, "expected ROWS,COLUMNS"),
        (["--mask", "a:b,c:d"], 2, "expected ROWS,COLUMNS"),
        (["--keep", "0:8,0:8"], 3, "nothing to regenerate"),
        (["--keep", "0:9,0:8"], 3, "inside 8 rows"),
        (["--mask-file", "gone.png"], 3, "no such file"),
        (["--mask-file", "small.png"], 3, "4 x 5 pixels, the pictures have 8 x 8"),
        (["--mask-file", "black.png"], 3, "the mask is empty"),
        (["--mask", "0:2,0:2", "--keep", "0:2,0:2"], 2, "give one of them"),
        (["--strength", "1.5"], 2, "strength=1.5"),
        (["--strength", "nan"], 2, "strength=nan"),
        (["--n", "0"], 2, "num_samples=0"),
        (["--label", "sneker"], 3, "did you mean 'sneaker'"),
        (["--prompt", "a caption that is much too long"], 3, "at most 6 fit"),
        (["--sampler", "haltn"], 2, "did you mean 'halton'"),
        (["--steps", "3"], 2, "does not take 'steps'"),
        (["--seed", str(2**70)], 2, "64-bit"),
        (["--out", "x.jpg"], 2, "ends in .png"),
        (["--out", "full"], 2, "exists already"),
        (["--out", "/no/where/x.png"], 2, "no directory"),
        (["--trace", "/no/where/x.gif"], 2, "no directory"),
        (["--scale-up", "0"], 2, "--scale-up 0"),
        (["--guidance-interval", "0.2"], 2, "expected LO,HI"),
        (["--guidance-scale", "2", "--guidance-interval", "0.9,0.1"], 2, "0 <= lo < hi"),
        (["--guidance-schedule", "linear"], 2, "guidance_scale"),
        (["--guidance-scale", "2", "--guidance-schedule", "linea"], 2, "did you mean 'linear'"),
    ],
)
def test_bad_options_of_edit_are_one_line(
    words: list[str], code: int, expected: str, joint: str, face: Path, capsys: Captured
) -> None:
    Image.new("L", (5, 4), 255).save("small.png")
    Image.new("L", (SIDE, SIDE)).save("black.png")
    Path("full").mkdir()
    Path("full/mine.txt").write_text("keep me")
    refused(["edit", joint, str(face), *words], code, expected, capsys)


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--label", "sneker"], 3, "did you mean 'sneaker'"),
        (["--prompt", "a cat"], 2, "--prompt: this model knows no caption"),
        (["--image", "face.png"], 2, "nothing is left to generate"),
        (["--label", "sneaker", "--label", "t-shirt", "--image", "a", "--image", "b", "--image",
          "c"], 2, "--label 2 times and --image 3 times"),
        (["--infill", "[MASK]"], 2, "--infill is for models of text"),
        (["--stream"], 2, "--stream is for models of text"),
        (["--length", "4"], 2, "--length is for models of text"),
        (["--guidance-scale", "2"], 2, "guidance_scale without a condition"),
        (["--input", "in.jsonl"], 3, "did you mean 'label'"),
        (["--n", "0"], 2, "num_samples=0"),
        (["--out", "x.gif"], 2, "ends in .png"),
    ],
)  # fmt: skip
def test_bad_options_of_generate_are_one_line(
    words: list[str], code: int, expected: str, grey: str, face: Path, capsys: Captured
) -> None:
    in_greys(face)
    Path("in.jsonl").write_text('{"lable": "sneaker"}')
    refused(["generate", grey, *words], code, expected, capsys)


def test_a_model_of_text_takes_no_pictures(here: Path, capsys: Captured) -> None:
    model = "builtin:shakespeare"
    refused(["edit", model, "x.png"], 2, "a model of text, not of pictures", capsys)
    refused(["generate", model, "--out", "x.png"], 2, "--out is for models of pictures", capsys)
    refused(["generate", model, "--trace", "x.gif"], 2, "a GIF shows pictures", capsys)


# Parts


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
    assert guidance_options(2.0, None, "0.2,0.8") == {
        "guidance_scale": 2.0, "guidance_interval": (0.2, 0.8), "guidance_schedule": "interval",
    }  # fmt: skip
    assert guidance_options(None, None, None) == {}


def test_a_long_job_says_how_far_it_is(
    grey: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdiff.cli.images.generate.REPORT_EVERY", 0.0)
    words = ["generate", grey, "--label", "sneaker", "--n", "4", *QUICK]
    assert run([*words, "--out", str(tmp_path / "grid.png")]) == 0
    said = re.findall(r"(\d+) made, (\d+) more (\d+) percent filled in", capsys.readouterr().err)
    assert [(made, more) for made, more, _ in said] == [("0", "4")] * 3
    assert said[-1][2] == "100"
