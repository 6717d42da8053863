"""Pictures as files: formats, orientation, depths, and the values of callers."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from written_pictures import READ, STARTED, WRITTEN, content, noise, watch_programs, written

from mdiff.cli.images.edit import region_of
from mdiff.errors import DataError
from mdiff.modalities.image.data.images import read_pictures
from mdiff.modalities.image.data.pixels import as_array, decoded, open_picture
from mdiff.modalities.image.data.readers import from_dataset
from mdiff.modalities.image.data.source import PictureSource


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
