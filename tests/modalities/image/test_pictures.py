"""Pictures read from every kind of source, and every way in which they can be bad."""

from __future__ import annotations

import gzip
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from mdiff.errors import ConfigError, DataError
from mdiff.modalities.image.data.images import read_pictures, split_index
from mdiff.modalities.image.data.pixels import as_array
from mdiff.modalities.image.data.readers import from_dataset
from mdiff.modalities.image.data.source import PictureSource
from mdiff.modalities.image.data.unicode_names import base_of, caption_of, code_points


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def folder_of(path, names, size=(6, 5), mode="RGB"):
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        array = noise(*size, 3, seed=i)
        Image.fromarray(array).convert(mode).save(path / name)
    return path


def test_a_folder_names_labels_by_its_subfolders(tmp_path):
    folder_of(tmp_path, ["cat/1.png", "cat/2.png", "ant/1.png"])
    found = read_pictures(str(tmp_path), channels=3)
    assert found.pixels.shape == (3, 3, 6, 5)
    assert found.label_names == ["ant", "cat"]
    assert found.labels.tolist() == [0, 1, 1]
    assert torch.equal(found.pixels[1].permute(1, 2, 0), torch.from_numpy(noise(6, 5, 3, seed=0)))


def test_metadata_gives_captions_and_labels(tmp_path):
    folder_of(tmp_path, ["a.png", "b.png"])
    rows = [{"file_name": "b.png", "label": "x", "caption": "two"},
            {"file_name": "a.png", "label": "y", "caption": "one"}]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_pictures({"source": str(tmp_path), "captions": "data"}, channels=3)
    assert found.captions == ["two", "one"]
    assert found.labels.tolist() == [0, 1]


def test_metadata_does_not_leave_its_folder(tmp_path):
    folder_of(tmp_path, ["a.png", "inner/b.png"])
    (tmp_path / "inner" / "metadata.jsonl").write_text('{"file_name": "../a.png"}')
    with pytest.raises(DataError, match="expected a plain name inside"):
        read_pictures(str(tmp_path / "inner"), channels=3)


def test_arrays_and_idx_files_are_read_with_their_labels(tmp_path):
    x, y = noise(4, 6, 6), np.array([3, 1, 0, 2], dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    header = struct.pack(">4B3I", 0, 0, 8, 3, 4, 6, 6)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(header + x.tobytes())
    with gzip.open(tmp_path / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">4BI", 0, 0, 8, 1, 4) + y.tobytes())
    for name in ("a.npz", "train-images-idx3-ubyte.gz"):
        found = read_pictures(str(tmp_path / name), channels=1)
        assert torch.equal(found.pixels[:, 0], torch.from_numpy(x))
        assert found.labels.tolist() == [3, 1, 0, 2]


def test_a_data_set_with_an_image_feature_gives_label_names():
    rows = Dataset.from_dict(
        {"image": [Image.fromarray(noise(4, 4, 3, seed=i)) for i in range(2)], "label": [1, 0]},
        features=Features({"image": ImageFeature(), "label": ClassLabel(names=["dog", "eel"])}),
    )
    items = list(from_dataset(rows, PictureSource(source="x"), name="x"))
    assert [item.label for item in items] == ["eel", "dog"]
    assert np.array_equal(np.array(items[0].array), noise(4, 4, 3, seed=0))


def test_the_digits_are_there_without_a_network():
    found = read_pictures("sklearn.digits", channels=1)
    assert found.pixels.shape == (1797, 1, 8, 8)
    assert set(found.pixels.unique().tolist()) == {15 * i for i in range(17)}


def test_clear_parts_are_white_and_modes_are_converted():
    clear = np.zeros((2, 2, 4), dtype=np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    array = as_array(clear, channels=3)
    assert array[0, 0].tolist() == [10, 20, 30]
    assert array[1, 1].tolist() == [255, 255, 255]
    assert as_array(Image.new("P", (3, 2)), channels=3).shape == (2, 3, 3)
    assert as_array(Image.new("1", (3, 2)), channels=1).shape == (2, 3, 1)
    assert as_array(Image.new("CMYK", (3, 2)), channels=3).shape == (2, 3, 3)


def test_mixed_sizes_are_refused_unless_they_may_be_resized(tmp_path):
    folder_of(tmp_path, ["a.png"])
    folder_of(tmp_path, ["b.png"], size=(9, 12))
    with pytest.raises(DataError, match=r"b\.png has 9 x 12 pixels, expected 6 x 5"):
        read_pictures(str(tmp_path), channels=3)
    found = read_pictures({"source": str(tmp_path), "resize": True}, channels=3, size=(4, 4))
    assert found.pixels.shape == (2, 3, 4, 4)


def bomb(path):
    """A PNG whose header claims 100,000 x 100,000 pixels."""
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_bad_files_are_named_and_nothing_is_unpacked(tmp_path):
    good = folder_of(tmp_path, ["good.png"], size=(40, 40)) / "good.png"
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:-400])
    (tmp_path / "not.png").write_bytes(b"hello")
    (tmp_path / "empty.png").write_bytes(b"")
    bomb(tmp_path / "bomb.png")
    for name, said in (
        ("cut.png", "cannot be read"), ("not.png", "not a picture"), ("empty.png", "not a picture"),
        ("bomb.png", "pixels"), ("none.png", "no such file"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said) as caught:
            read_pictures(str(tmp_path / name), channels=3)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_job_goes_on_past_bad_files_and_names_them(tmp_path):
    folder_of(tmp_path, ["a.png", "c.png"])
    (tmp_path / "b.png").write_bytes(b"hello")
    found = read_pictures(str(tmp_path), channels=3, strict=False)
    assert len(found) == 2
    assert len(found.problems) == 1
    assert "b.png" in found.problems[0]


def test_an_object_array_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="not a readable"):
        read_pictures(str(tmp_path / "a.npz"), channels=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source": "x", "holdout": 1.0}, "holdout"),
        ({"source": "x", "captions": "unicod"}, "unicode"),
        ({"source": "x", "shift": 9}, "0 to 8"),
        ({"source": "x", "flip": "yes"}, "true or false"),
        ({"source": "x", "sorce": 1}, "data.source"),
        ({}, "missing"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        PictureSource.of(options)


def test_splits_share_nothing_and_leave_nothing_out():
    for items in (50, [f"group {i % 20}" for i in range(50)]):
        parts = [
            split_index(items, split, 0.2, 0.1).tolist()
            for split in ("train", "validation", "holdout")
        ]
        assert sorted(i for part in parts for i in part) == list(range(50))
        if not isinstance(items, int):
            sides = [{items[i] for i in part} for part in parts]
            assert sum(map(len, sides)) == len(set().union(*sides))


def test_a_variant_of_a_picture_is_on_the_side_of_its_base():
    names = ["emoji_u1f44b", "emoji_u1f44b_1f3fb", "emoji_u1f44b_1f3ff"]
    assert len({base_of(name) for name in names}) == 1
    assert base_of("emoji_u1f468_200d_1f4bb") == base_of("emoji_u1f469_1f3fd_200d_1f4bb")
    assert base_of("emoji_u1f600") != base_of("emoji_u1f601")


def test_captions_are_unicode_names():
    assert caption_of("emoji_u1f600") == "grinning face"
    assert caption_of("emoji_u1f44b_1f3ff") == "waving hand sign skin type-6"
    assert caption_of("emoji_u1f1eb_1f1f7") == "flag f r"
    assert code_points("png/32/emoji_u1f468_200d_1f4bb.png") == [0x1F468, 0x200D, 0x1F4BB]
    with pytest.raises(DataError, match="does not name code points"):
        caption_of("smile.png")
