"""The `data` section of a recipe for images."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mdiff.files import STRICT
from mdiff.modalities.text.source import DataSource

MOST_SHIFT = 8


@dataclass(config=STRICT, frozen=True)
class PictureSource(DataSource):
    """Where pictures come from, and what is made of them.

    `source`: a path or a list of paths, or "sklearn.digits", or "hub:OWNER/NAME". A path is a
    folder of pictures (its subfolders name the labels, or metadata.jsonl has lines with
    file_name, label and caption), one picture, an .npz with `x` uint8 (N, H, W[, C]) and
    perhaps `y` and `name`, an MNIST file (*-images-idx3-ubyte[.gz], its labels beside it), or
    a folder of tokens that `mdiff tokenizer encode` wrote. `resize` crops the middle and
    scales it to the codec's size; without it, another size is an error. `captions`: none,
    "data", or "unicode" for files named after code points (variants of one base then stay on
    one side of a split). `flip` and `shift` (pixels each way) add variants to the training
    split; what a caption or a label calls left or right is not flipped.

    `holdout` and `validation` are cut from the end: of each label where its pictures come one
    after another. Where there are groups they take whole groups by their digest.
    """

    image_field: str = "image"
    label_field: str = "label"
    caption_field: str = "caption"
    resize: bool = False
    captions: Literal["none", "data", "unicode"] = "none"
    flip: bool = False
    shift: Annotated[int, Field(ge=0, le=MOST_SHIFT, description=f"0 to {MOST_SHIFT} pixels")] = 0
