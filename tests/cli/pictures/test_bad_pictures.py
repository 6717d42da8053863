"""Pictures and options that do not fit: one line, the exit code, no traceback."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from picture_commands import (
    QUICK,
    SIDE,
    Captured,
    array,
    in_greys,
)
from PIL import Image
from text_commands import refused

from mdiff.cli import run


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
