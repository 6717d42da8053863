"""Masks as files and as values: strokes, clear parts, sizes."""

import numpy as np
import pytest
import torch
from PIL import Image
from written_pictures import noise

from mdiff.cli.images.edit import region_of
from mdiff.errors import DataError
from mdiff.modalities.image.data.pixels import open_mask
from mdiff.modalities.image.inpainting import pixel_mask


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
