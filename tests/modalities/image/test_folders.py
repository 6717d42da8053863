"""What people's folders look like: links, hidden files, endings, cases, digits, depths, damage."""

from __future__ import annotations

import io
import json
import os
import random
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mdiff.modalities.image.data.walk as walking
from mdiff.errors import DataError
from mdiff.modalities.image.codecs.levels import levels
from mdiff.modalities.image.data.examples import says_a_side
from mdiff.modalities.image.data.images import read_pictures, split_index
from mdiff.modalities.image.data.walk import walk
from mdiff.modalities.image.modality import image

ALL = {"holdout": 0.0}
PICTURE = b""


def make(folder, names, content=None):
    """Files of these names: a small picture each, "NAME -> TARGET" a link, "NAME/" a folder."""
    for name in names:
        link, _, target = name.partition(" -> ")
        path = folder / link
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target if target.startswith("/") else folder / target)
        elif name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(picture() if content is None else content)
    return folder


def picture():
    global PICTURE
    if not PICTURE:
        file = io.BytesIO()
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, "PNG")
        PICTURE = file.getvalue()
    return PICTURE


def modality(**options):
    return image(codec=levels(), size=(8, 8), **({"label": "condition"} | options))


def labels_of(folder, **options):
    found = read_pictures({"source": str(folder), **options}, channels=1)
    return Counter(found.label_names[i] for i in found.labels.tolist())


# What is read, and what is left out.

FOLDERS = {
    "a class that is a link": (
        ["real/0.png", "set/a/0.png", "set/b -> real"],
        {"a": 1, "b": 1}, "",
    ),
    "a picture that is a link": (
        ["real/0.png", "set/a/0.png -> real/0.png"],
        {"a": 1}, "",
    ),
    "two links to one class": (
        ["real/0.png", "set/a -> real", "set/b -> real"],
        {"a": 1, "b": 1}, "",
    ),
    "a link to a class beside": (
        ["set/a/0.png", "set/b -> set/a"],
        {"a": 1, "b": 1}, "",
    ),
    "a link in a circle": (
        ["set/a/0.png", "set/a/again -> set"],
        {"a": 1}, "1 links in a circle",
    ),
    "a link to itself": (
        ["set/a/0.png", "set/a/me -> set/a/me"],
        {"a": 1}, "1 no files",
    ),
    "a broken link": (
        ["set/a/0.png", "set/a/1.png -> gone.png"],
        {"a": 1}, "1 no files",
    ),
    "a notebook's copies": (
        ["set/a/0.png", "set/.ipynb_checkpoints/0-checkpoint.png"],
        {"a": 1}, "1 hidden",
    ),
    "copies inside a class": (
        ["set/a/0.png", "set/a/.ipynb_checkpoints/0.png"],
        {"a": 1}, "1 hidden",
    ),
    "macOS's second halves": (
        ["set/a/0.png", "set/a/._0.png", "set/__MACOSX/a/._0.png"],
        {"a": 1}, "2 hidden",
    ),
    "thumbnails of a server": (
        ["set/a/0.png", "set/a/@eaDir/0.png/SMALL.jpg"],
        {"a": 1}, "1 hidden",
    ),
    "files of no ending": (
        ["set/a/0.png", "set/a/LICENSE"],
        {"a": 1}, "1 without an ending",
    ),
    "notes beside": (
        ["set/a/0.png", "set/readme.txt", "set/a/b.txt", "set/c.json"],
        {"a": 1}, "3 files left out: 2 .txt, 1 .json",
    ),
    "an empty class": (
        ["set/a/0.png", "set/b/"],
        {"a": 1}, "no picture in b",
    ),
    "a class of another format": (
        ["set/a/0.png", "set/b/0.heic", "set/b/1.heic"],
        {"a": 1}, "2 files left out: 2 .heic; no picture in b",
    ),
    "endings in capitals": (
        ["set/a/0.PNG", "set/a/1.Jpg", "set/a/2.TIFF"],
        {"a": 3}, "",
    ),
    "every ending": (
        ["set/a/0.png", "set/a/0.jpeg", "set/a/0.jpe", "set/a/0.jfif", "set/a/0.webp",
        "set/a/0.gif", "set/a/0.bmp", "set/a/0.dib", "set/a/0.tif", "set/a/0.ppm", "set/a/0.pgm",
        "set/a/0.avif", "set/a/0.mpo", "set/a/0.apng"],
        {"a": 14}, "",
    ),
    "depths": (
        ["set/a/0.png", "set/a/2024/05/1.png", "set/b/x/y/z/0.png"],
        {"a": 2, "b": 1}, "",
    ),
    "names with spaces, dots, umlauts": (
        ["set/grün 1.0/a b.png", "set/日本/ñ.x.png"],
        {"grün 1.0": 1, "日本": 1}, "",
    ),
    "digits": (
        ["set/10/0.png", "set/9/0.png", "set/2/0.png"],
        {"2": 1, "9": 1, "10": 1}, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_is_read_as_its_owner_means_it(tmp_path, caplog, kind):
    names, expected, said = FOLDERS[kind]
    make(tmp_path, names)
    assert labels_of(tmp_path / "set") == expected
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(said)
    assert said in "".join(lines)


def test_the_source_itself_may_be_hidden_or_a_link(tmp_path):
    make(tmp_path, [".data/a/0.png", "link -> .data"])
    assert labels_of(tmp_path / ".data") == labels_of(tmp_path / "link") == {"a": 1}


def test_a_folder_without_a_picture_says_what_is_in_it(tmp_path):
    make(tmp_path, ["a/0.heic", "a/.hidden.png"])
    with pytest.raises(DataError, match=r"2 files left out: 1 .heic, 1 hidden; no picture in a"):
        read_pictures(str(tmp_path), channels=1)


def test_a_folder_that_may_not_be_opened_is_named(tmp_path, monkeypatch, caplog):
    make(tmp_path, ["a/0.png", "b/0.png"])
    real = os.scandir

    def scandir(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert labels_of(tmp_path) == {"a": 1}
    assert "1 unreadable; no picture in b" in caplog.text


def test_links_that_lead_to_each_other_come_to_an_end(tmp_path, monkeypatch):
    make(tmp_path, [f"{a}/0.png" for a in range(7)])
    for a in range(7):
        make(tmp_path, [f"{a}/to{b} -> {b}" for b in range(7) if a != b])
    monkeypatch.setattr(walking, "MOST_AGAIN", 1000)
    with pytest.raises(DataError, match="over 1,000 times"):
        walk(tmp_path, [".png"])


def test_pictures_that_metadata_does_not_name_are_counted(tmp_path, caplog):
    make(tmp_path, ["a.png", "b.png", "c.png", "real/d.png"])
    (tmp_path / "e.png").symlink_to("real/d.png")
    rows = [{"file_name": name, "label": 1} for name in ("a.png", "e.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert labels_of(tmp_path) == {"1": 2}
    assert "3 files of pictures beside it are not in it" in caplog.text


def test_a_picture_without_a_label_among_labelled_ones_is_named(tmp_path):
    make(tmp_path, ["a/0.png", "b.png"])
    with pytest.raises(DataError, match=r"a/0.png has a label and b.png has none"):
        read_pictures(str(tmp_path), channels=1)


@pytest.mark.parametrize("caption", [["a", "b"], 7, 1.5, True, {"en": "a"}])
def test_a_caption_is_a_string_where_captions_are_read(tmp_path, caption):
    make(tmp_path, ["a.png"])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": caption}))
    with pytest.raises(DataError, match=r"a.png: caption .* expected a string"):
        read_pictures({"source": str(tmp_path), "captions": "data"}, channels=1)
    assert len(read_pictures(str(tmp_path), channels=1)) == 1


def test_an_idx_file_of_a_dot_has_its_labels_beside_it(tmp_path):
    head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (2, 8, 8))
    (tmp_path / "train-images.idx3-ubyte").write_bytes(head + bytes(128))
    head = bytes([0, 0, 8, 1]) + (2).to_bytes(4, "big")
    (tmp_path / "train-labels.idx1-ubyte").write_bytes(head + bytes([1, 0]))
    assert labels_of(tmp_path / "train-images.idx3-ubyte") == {"1": 1, "0": 1}


# The cut.


def counts(made, folder, split, **options):
    rows = made.examples({"source": str(folder), **options}, split=split)
    return np.bincount(rows.cond["label"], minlength=made.classes).tolist()


def test_every_class_of_a_folder_has_pictures_to_train_on(tmp_path):
    make(tmp_path, [f"class{c}/{i}.png" for c in range(10) for i in range(6)])
    made = modality()
    trained, held = (counts(made, tmp_path, split) for split in ("train", "holdout"))
    assert all(count in (5, 6) for count in trained)
    assert sum(held) == 6
    assert sum(count > 0 for count in held) > 1


def test_labels_in_runs_are_cut_within_each_and_mixed_ones_by_order():
    mixed = torch.tensor([i * 7 % 10 for i in range(100)])
    ordered = mixed.sort().values
    assert split_index(100, "holdout", 0.1, 0.0, mixed).tolist() == list(range(90, 100))
    assert mixed[split_index(100, "holdout", 0.1, 0.0, mixed)].unique().numel() == 10
    assert ordered[split_index(100, "holdout", 0.1, 0.0, ordered)].unique().numel() == 10
    assert split_index(100, "holdout", 0.1, 0.0).tolist() == list(range(90, 100))


@pytest.mark.parametrize("sizes", [[1, 1, 98], [50, 1, 49], [2, 3, 5], [1] * 9 + [91], [100]])
@pytest.mark.parametrize("holdout", [0.0, 0.1, 0.5, 0.16666])
@pytest.mark.parametrize("validation", [0.0, 0.1])
def test_splits_of_labels_share_nothing_and_leave_no_label_untrained(sizes, holdout, validation):
    labels = torch.tensor([c for c, size in enumerate(sizes) for _ in range(size)])
    parts = {
        split: split_index(len(labels), split, holdout, validation, labels).tolist()
        for split in ("train", "validation", "holdout")
    }
    assert sorted(i for part in parts.values() for i in part) == list(range(len(labels)))
    kept = int(len(labels) * (1 - holdout))
    assert len(parts["holdout"]) == len(labels) - kept
    assert len(parts["train"]) == int(kept * (1 - validation))
    assert all(part == sorted(part) for part in parts.values())
    if len(parts["train"]) >= len(sizes):
        assert len(labels[parts["train"]].unique()) == len(sizes)


def test_a_label_without_a_picture_to_train_on_is_refused_or_named(tmp_path, caplog):
    make(tmp_path, ["a/0.png", "b/0.png"])
    with pytest.raises(DataError, match=r"label 'b' has no picture to train on: holdout=0.1"):
        modality().examples(str(tmp_path))
    modality(labels=["a", "b", "c", "d"]).examples({"source": str(tmp_path), **ALL})
    assert "2 of 4 labels have no picture and are not trained: c, d" in caplog.text


# Sides.


@pytest.mark.parametrize(
    ("caption", "sided"),
    [
        ("Left arrow", True), ("RIGHT ARROW", True), ("leftwards black arrow", True),
        ("anticlockwise arrows", True), ("a right-hand glove", True), ("turn_left", True),
        ("LeftArrow", True), ("leftmost", True), ("a bright lamp", False), ("cleft chin", False),
        ("upright piano", False), ("copyright", False), ("lefty's", True), ("theft", False),
        ("", False), ("an arrow pointing (right)", True), ("wright", False), ("frightened", False),
    ],
)  # fmt: skip
def test_what_words_call_left_or_right_is_not_flipped(caption, sided):
    assert says_a_side(caption) == sided


def test_labels_that_are_sides_are_not_flipped(tmp_path):
    make(tmp_path, ["left/0.png", "right/0.png", "up/0.png"])
    rows = modality().examples({"source": str(tmp_path), "flip": True, **ALL})
    assert [len(row.unique(dim=0)) for row in rows.tokens] == [1, 1, 2]


# Generated folders.


def generated(random_, folder):
    """A folder with links, hidden files and all kinds of names, and what it holds by label."""
    classes = random_.sample(
        ["cat", "Dog", "10", "9", "002", "no", "null", "été", "ete", "a b", "x.y", "日本", "-1",
         "1.0"],
        random_.randint(1, 5),
    )  # fmt: skip
    expected: Counter[str] = Counter()
    names, left_out = [], 0
    for label in classes:
        kind = random_.choice(["plain", "link", "nested"])
        base = {"plain": f"set/{label}", "link": f"real/{label}", "nested": f"set/{label}/deep/er"}
        for i in range(random_.randint(1, 3)):
            ending = random_.choice([".png", ".PNG", ".jpg", ".tif", ".webp", ".jfif", ".gif"])
            names.append(f"{base[kind]}/{i}{ending}")
            expected[label] += 1
        if kind == "link":
            names.append(f"set/{label} -> real/{label}")
        for clutter in random_.sample(
            [".DS_Store", "._0.png", "x.txt", "Thumbs.db", "__MACOSX/0.png", ".git/0.png"],
            random_.randint(0, 3),
        ):
            names.append(f"{base[kind]}/{clutter}")
            left_out += 1
    make(folder, names)
    return expected, left_out


@pytest.mark.slow
def test_two_thousand_generated_folders_are_read_in_full(tmp_path):
    for number in range(2000):
        random_ = random.Random(number)
        folder = tmp_path / str(number)
        expected, left_out = generated(random_, folder)
        found = walk(folder / "set", [".png", ".jpg", ".tif", ".webp", ".jfif", ".gif"])
        assert found.left_out.total() == left_out, number
        assert labels_of(folder / "set") == expected, number
        made = modality()
        rows = made.examples({"source": str(folder / "set"), **ALL})
        drawn = Counter(made.labels[i] for i in rows.cond["label"].tolist())
        assert drawn == {name.lower(): count for name, count in expected.items()}, number
        again = image(**{k: v for k, v in made.config().items() if k != "name"})
        assert again.labels == made.labels
        cut = {"source": str(folder / "set"), "holdout": random_.choice([0.1, 0.3])}
        with nullcontext() if sum(expected.values()) > 9 else suppress(DataError):
            trained = modality().examples(cut).cond["label"]
            assert len(trained.unique()) == len(expected), number
