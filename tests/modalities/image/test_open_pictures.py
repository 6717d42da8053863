"""Pictures and masks as files: orientation, clear parts, depths, other formats, damage."""

from __future__ import annotations

import functools
import io
import json
import random
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mdiff.cli.images.edit import region_of
from mdiff.errors import DataError
from mdiff.modalities.image.data.images import read_pictures
from mdiff.modalities.image.data.pixels import as_array, decoded, open_mask, open_picture
from mdiff.modalities.image.data.readers import from_dataset
from mdiff.modalities.image.data.source import PictureSource
from mdiff.modalities.image.inpainting import pixel_mask

# Every format that Pillow writes of these pixels without another program.
WRITTEN = [
    "PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "DDS", "SPIDER", "IM",
    "BLP", "EPS", "ICO", "ICNS", "TGA", "PCX", "SGI", "JPEG2000", "MSP", "XBM",
]  # fmt: skip
READ = WRITTEN[:10]
MODE = {"SPIDER": "F", "BLP": "P", "MSP": "1", "XBM": "1", "GIF": "P", "PCX": "P"}
STARTED: list[str] = []
WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty")


def watch_programs():
    """Have every start of another program written to STARTED, from now on."""
    if not STARTED:
        STARTED.append("watched")
        sys.addaudithook(lambda event, _: STARTED.append(event) if event in WATCHED else None)
    del STARTED[1:]


def noise(height=8, width=16, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def content(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


@functools.cache
def written(form):
    picture = Image.fromarray(noise(32, 32)).convert(MODE.get(form, "RGB"))
    options = {"save_all": True, "append_images": [picture]} if form in ("MPO", "TIFF") else {}
    return content(picture, form, **options)


@pytest.mark.parametrize("form", WRITTEN)
def test_formats_are_known_by_content_and_others_are_refused(form):
    if form in READ:
        assert as_array(decoded(written(form), "x.png"), channels=3).shape == (32, 32, 3)
    else:
        with pytest.raises(DataError, match=r"x\.png is not a picture that can be read: expected"):
            decoded(written(form), "x.png")


def test_a_picture_of_another_name_starts_no_program(tmp_path, monkeypatch):
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\necho >> {tmp_path}/ran\nexit 1\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    head = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "x.png").write_text(head)
    watch_programs()
    with pytest.raises(DataError, match="not a picture"):
        open_picture(tmp_path / "x.png")
    assert not (tmp_path / "ran").exists()
    assert STARTED == ["watched"]


# Orientation.

LOOKS = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: a[:, ::-1].swapaxes(0, 1),
}  # fmt: skip


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", LOOKS)
def test_a_photograph_is_read_upright(form, orientation):
    array, exif = noise(), Image.Exif()
    exif[0x0112] = orientation
    options = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}.get(form, {"quality": 100})
    # Squares of 8 x 8, which JPEG keeps as they are.
    array = noise(2, 4).repeat(8, 0).repeat(8, 1) if form in ("JPEG", "MPO", "AVIF") else array
    plain = as_array(decoded(content(Image.fromarray(array), form, **options), "x"), channels=3)
    turned = content(Image.fromarray(array), form, exif=exif, **options)
    assert np.array_equal(as_array(decoded(turned, "x"), channels=3), LOOKS[orientation](plain))


@pytest.mark.parametrize("start", [b"", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff",
                                   b"II*\0\x08\0\0\0", b"x" * 40])  # fmt: skip
def test_damage_beside_the_pixels_is_no_damage_to_them(start):
    array, exif = noise(), b"Exif\0\0" + start
    assert np.array_equal(
        as_array(decoded(content(Image.fromarray(array), "PNG", exif=exif), "x"), channels=3), array
    )


def test_a_photograph_is_upright_in_a_folder_and_as_a_mask(tmp_path):
    array, exif = np.zeros((8, 16, 3), np.uint8), Image.Exif()
    array[:, :8], exif[0x0112] = 255, 6
    Image.fromarray(array).save(tmp_path / "0.png", exif=exif)
    found = read_pictures(str(tmp_path), channels=3)
    assert found.pixels.shape == (1, 3, 16, 8)
    mask = region_of(None, tmp_path / "0.png", None, size=(16, 8))
    assert mask[:8].all()
    assert not mask[8:].any()


# Depths and modes.


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(form, channels):
    deep = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    array = as_array(decoded(content(Image.fromarray(deep), form), "x"), channels=channels)
    assert array.shape == (16, 16, channels)
    assert np.array_equal(array[..., -1], np.arange(256).reshape(16, 16))


def test_a_clear_grey_of_sixteen_bits_is_on_white():
    deep = np.array([[0, 65535], [300, 32768]], np.uint16)
    raw = content(Image.fromarray(deep), "PNG", transparency=300)
    assert as_array(decoded(raw, "x"), channels=1)[..., 0].tolist() == [[0, 255], [255, 128]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBX", "RGBa",
                                  "CMYK", "YCbCr", "HSV", "I;16", "I;16B"])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_of_bits_is_a_picture(mode, channels):
    assert as_array(Image.new(mode, (3, 2)), channels=channels).shape == (2, 3, channels)


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_modes_that_say_no_range_are_refused(mode):
    with pytest.raises(DataError, match=f"mode {mode}: expected 8 or 16 bits"):
        as_array(Image.new(mode, (3, 2)), channels=1)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_of_an_animation_the_first_picture_is_read(form):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("white", "black"))
    raw = content(first, form, save_all=True, append_images=[second])
    assert as_array(decoded(raw, "x"), channels=3).min() > 250


# Values of callers.


@pytest.mark.parametrize(
    "given",
    [
        torch.zeros(8, 8, dtype=torch.bfloat16), torch.zeros(8, 8, requires_grad=True),
        torch.zeros(8, 8, dtype=torch.uint8, device="meta"), torch.zeros(8, 8, dtype=torch.bool),
        torch.zeros(8, 8).to_sparse(), torch.zeros(3, 8, 8, dtype=torch.uint8), [[1], [2, 3]],
        np.zeros((8, 8)), np.zeros((8, 8), object), np.zeros((0, 8), np.uint8), None, "x", 3, {},
        np.zeros((8, 8), np.float16), torch.zeros(8, 8, dtype=torch.complex64), [None],
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused(given):
    with pytest.raises(DataError, match="the picture"):
        as_array(given, channels=1)


def test_tensors_arrays_and_pictures_of_bytes_are_the_same():
    array = noise(channels=1)[..., 0]
    for given in (array, torch.from_numpy(array), Image.fromarray(array), array[..., None],
                  np.asfortranarray(array), array.tolist and np.array(array)):  # fmt: skip
        assert np.array_equal(as_array(given, channels=1)[..., 0], array)


def test_a_picture_of_a_caller_that_cannot_be_decoded_is_refused():
    whole = content(Image.fromarray(noise(64, 64)), "PNG")
    with pytest.raises(DataError, match="cannot be read"):
        as_array(Image.open(io.BytesIO(whole[:-600])), channels=3)


def test_a_data_set_is_opened_like_files_and_goes_on_past_a_bad_one():
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    exif = Image.Exif()
    exif[0x0112] = 6
    raws = [content(Image.fromarray(noise()), "PNG", exif=exif), b"hello", written("SGI")]
    rows = Dataset.from_dict({"image": [{"bytes": raw, "path": None} for raw in raws]},
                             features=Features({"image": {"bytes": Value("binary"),
                                                          "path": Value("string")}}))  # fmt: skip
    items = list(from_dataset(rows.cast_column("image", ImageFeature()),
                              PictureSource(source="x"), name="x"))  # fmt: skip
    assert as_array(items[0].array, channels=3).shape == (16, 8, 3)
    for item in items[1:]:
        with pytest.raises(DataError, match=f"{item.name} is not a picture"):
            _ = item.array


# Masks.


def strokes(mode, white, clear=False):
    """Strokes of 8 x 8 pixels on a ground of 32 x 32."""
    canvas = np.zeros((32, 32, 4), np.uint8)
    canvas[..., 3] = 0 if clear else 255
    canvas[8:16, 8:16] = (255, 255, 255, 255) if white else (0, 0, 0, 255)
    return Image.fromarray(canvas).convert(mode)


MASKS = {
    "white on black": strokes("L", True), "white on nothing": strokes("RGBA", True, clear=True),
    "grey and alpha": strokes("LA", True, clear=True), "colours": strokes("RGB", True),
    "one bit": strokes("1", True), "a palette": strokes("P", True), "CMYK": strokes("CMYK", True),
    "opaque alpha": strokes("RGBA", True),
    "16 bits": Image.fromarray(np.asarray(strokes("L", True)).astype(np.uint16) * 257),
}  # fmt: skip


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_of_any_program_is_what_is_white(tmp_path, kind, form):
    picture = MASKS[kind]
    if (form == "WEBP" and picture.mode == "I;16") or (form == "PNG" and picture.mode == "CMYK"):
        picture = MASKS["white on black"]
    picture.save(tmp_path / "x", form, **({"lossless": True} if form == "WEBP" else {}))
    mask = region_of(None, tmp_path / "x", None, size=(32, 32))
    assert int(mask.sum()) == 64
    assert mask[8:16, 8:16].all()


def test_a_palette_with_a_clear_colour_is_black_there(tmp_path):
    strokes("P", True).save(tmp_path / "x.png", transparency=0)
    assert open_mask(tmp_path / "x.png").sum() == 64
    strokes("P", True).save(tmp_path / "x.gif", transparency=0)
    assert open_mask(tmp_path / "x.gif").sum() == 64


@pytest.mark.parametrize("soft", [32, 96, 160, 224])
def test_a_soft_stroke_counts_where_more_than_half_covers(tmp_path, soft):
    canvas = np.zeros((32, 32, 4), np.uint8)
    canvas[8:16, 8:16] = (255, 255, 255, soft)
    canvas[10:12, 10:12, 3] = 255
    Image.fromarray(canvas).save(tmp_path / "x.png")
    assert open_mask(tmp_path / "x.png").sum() == (64 if soft > 127 else 4)


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (strokes("RGBA", False, clear=True), "empty.*0 of 255; its clear parts are taken as black"),
        (Image.new("RGBA", (32, 32)), "empty"), (Image.new("L", (32, 32)), "0 of 255"),
        (Image.fromarray(np.eye(32, dtype=np.uint8)), "brightest pixel is 1 of 255"),
        (Image.new("1", (32, 32)), "empty"), (Image.new("F", (32, 32)), "mode F"),
    ],
)  # fmt: skip
def test_a_mask_without_white_is_refused_in_words(tmp_path, picture, said):
    picture.save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=said):
        region_of(None, tmp_path / "x.tif", None, size=(32, 32))


def test_a_picture_with_a_hole_is_no_mask(tmp_path):
    array = noise(32, 32, 4)
    array[..., 3] = 255
    array[8:16, 8:16] = 0
    Image.fromarray(array).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="a coloured picture with clear parts"):
        open_mask(tmp_path / "x.png")


def test_the_mask_of_a_resized_picture_is_cropped_and_scaled_like_it(tmp_path):
    big = np.zeros((64, 96), np.uint8)
    big[16:32, 32:48] = 255
    Image.fromarray(big).save(tmp_path / "mask.png")
    Image.fromarray(noise(64, 96)).save(tmp_path / "big.png")
    mask = region_of(None, tmp_path / "mask.png", None, size=(32, 32),
                     pictures=[tmp_path / "big.png", tmp_path / "gone.png"])  # fmt: skip
    assert mask[8:16, 8:16].all()
    assert int(mask.sum()) == 64
    with pytest.raises(DataError, match="--resize crops and scales a picture with its mask"):
        region_of(None, tmp_path / "mask.png", None, size=(32, 32))
    Image.fromarray(noise(64, 64)).save(tmp_path / "other.png")
    with pytest.raises(DataError, match=r"other.png has 64 x 64: expected a mask"):
        region_of(None, tmp_path / "mask.png", None, size=(32, 32),
                  pictures=[tmp_path / "big.png", tmp_path / "other.png"])  # fmt: skip


@pytest.mark.parametrize("mask", [[[True], [True, False]], np.zeros((4, 6)), 7, {"a": 1},
                                  torch.ones(4, 6), torch.ones(4, 6, dtype=torch.bfloat16),
                                  torch.ones(4, 6, dtype=torch.bool, device="meta")])  # fmt: skip
def test_values_that_are_no_mask_are_refused(mask):
    with pytest.raises(DataError, match="mask"):
        pixel_mask(mask, (4, 6))


# Damage.


def damaged(raw, random_):
    """The content with one of the ways in which files go bad."""
    raw = bytearray(raw)
    how = random_.randrange(5)
    if how == 0:
        return bytes(raw[: random_.randrange(len(raw))])
    if how == 1:
        at = random_.randrange(len(raw))
        return bytes(raw[:at] + raw[at + random_.randint(1, 64) :])
    if how == 2:
        at = random_.randrange(len(raw))
        return bytes(raw[:at] + random_.randbytes(random_.randint(1, 64)) + raw[at:])
    # The head says sizes and offsets: half of the changes are there.
    span = min(len(raw), 128) if how == 3 else len(raw)
    for _ in range(random_.randint(1, 8)):
        raw[random_.randrange(span)] = random_.choice(
            [0, 1, 0x7F, 0x80, 0xFF, random_.randrange(256)]
        )
    return bytes(raw)


def load_or_refuse(forms, each):
    """How many of `each` damaged files a format were loaded; any other error is raised."""
    watch_programs()
    loaded, unnamed = 0, []
    for form in forms:
        raw = written(form)
        for number in range(each):
            bad = damaged(raw, random.Random(f"{form} {number}"))
            try:
                as_array(decoded(bad, "x.png"), channels=3)
                loaded += 1
            except DataError as error:
                if not str(error).startswith("x.png"):
                    unnamed.append((form, number, str(error)))
    assert unnamed == []
    assert STARTED == ["watched"]
    return loaded


@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_of_every_format_are_loaded_or_refused():
    assert 0 < load_or_refuse(WRITTEN, 20) < 20 * len(WRITTEN)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_forty_two_thousand_damaged_pictures_are_loaded_or_refused():
    load_or_refuse(WRITTEN, 42_000 // len(WRITTEN) + 1)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\0", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0\x08\0\0\0", b"BM" * 9,
        b"P6 8 8 255\n", b"P6 99999 99999 255\n", b"RIFF\0\0\0\0WEBPVP8 ", b"P7\n",
        b"\0\0\0\x1cftypavif" + bytes(40),
        b"DDS " + struct.pack("<7I", 124, 0x1007, 8, 8, 0, 0, 0) + bytes(44)
        + struct.pack("<8I", 32, 0, 0, 0, 0, 0, 0, 0) + bytes(320),
    ],
)  # fmt: skip
def test_files_of_a_head_alone_are_refused(tmp_path, raw):
    (tmp_path / "x.jpg").write_bytes(raw)
    with pytest.raises(DataError, match=r"x\.jpg"):
        open_picture(tmp_path / "x.jpg")


def test_what_a_decoder_raises_is_a_data_error_but_for_memory(monkeypatch):
    raw = content(Image.fromarray(noise()), "PNG")
    for error, expected in (
        (RuntimeError("bad"), DataError), (KeyError("x"), DataError), (RecursionError(), DataError),
        (AssertionError(), DataError), (MemoryError(), MemoryError),
    ):  # fmt: skip

        def load(self, error=error):
            raise error

        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
        with pytest.raises(expected):
            decoded(raw, "x")


def test_a_bad_file_among_good_ones_is_a_problem_of_its_own(tmp_path):
    for form in ("PNG", "AVIF", "TIFF", "DDS"):
        (tmp_path / f"{form}.jpg").write_bytes(written(form))
    (tmp_path / "cut.avif").write_bytes(written("AVIF")[:-200])
    found = read_pictures({"source": str(tmp_path)}, channels=3, strict=False)
    assert found.names == ["AVIF.jpg", "PNG.jpg", "TIFF.jpg"]
    assert len(found.problems) == 2
    assert json.dumps(found.problems)
