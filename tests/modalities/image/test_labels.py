"""Labels: names to numbers and back, from any source, and what no label can be."""

from __future__ import annotations

import json
import random
import unicodedata

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mdiff.errors import ConfigError, DataError
from mdiff.modalities.image.codecs.levels import levels
from mdiff.modalities.image.data.images import Pictures, read_pictures
from mdiff.modalities.image.labels import MOST_LABELS, Labels, checked, numbered
from mdiff.modalities.image.modality import image

NFD = unicodedata.normalize("NFD", "Café")


def data(names, labels=None):
    labels = list(range(len(names))) if labels is None else labels
    pixels = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    return Pictures(pixels, [str(i) for i in range(len(labels))], torch.tensor(labels), list(names))


def modality(**options):
    return image(codec=levels(), size=(8, 8), **({"label": "condition"} | options))


def arrays(path, y):
    np.savez(path / "y.npz", x=np.zeros((len(y), 8, 8), np.uint8), y=y)
    return {"source": str(path / "y.npz"), "holdout": 0.0}


@pytest.mark.parametrize(
    ("names", "asked", "number"),
    [
        (["Cat", "dog"], "CAT", 0), (["cat", "dog"], 1, 1), (["cat", "dog"], np.int64(1), 1),
        (["cat", "dog"], np.str_("Dog"), 1), ([NFD, "tea"], "CAFÉ", 0), (["café"], NFD, 0),
        (["0", "1", "10", "2"], 2, 3), (["0", "1", "10", "2"], "2", 3), (["3", "7"], 7, 1),
        (["3", "7"], "07", 1), (["00", "01", "02"], 1, 1), (["00", "01"], "1", 1),
        (["no", "yes"], "No", 0), (["1.0", "x"], "1.0", 0), (["-1", "x"], "-1", 0),
        (["İstanbul", "x"], "İSTANBUL", 0), (["straße"], "Straße", 0), (["a"], 0, 0),
        (["²", "x"], "²", 0), (["٣", "x"], 1, 1),
    ],
)  # fmt: skip
def test_a_label_is_found_by_its_name_or_number(names, asked, number):
    assert Labels.learnt(names).number(asked) == number
    assert Labels.of(names).number(asked) == number


@pytest.mark.parametrize(
    "asked",
    [-1, 2, 2**40, 2**70, True, None, 1.0, np.float32(1), "2", "dgo", "", [0], {"a": 1},
     torch.tensor(1), np.bool_(True), b"cat", "1", "\ud800"],
)  # fmt: skip
def test_what_is_no_label_of_a_model_is_refused(asked):
    with pytest.raises(DataError):
        Labels.of(["cat", "dog"]).number(asked)


def test_where_all_names_are_digits_a_number_is_a_name_alone():
    model = Labels(("5", "7"))
    assert [model.number(label) for label in (5, "7")] == [0, 1]
    for position in (0, 1):
        with pytest.raises(DataError, match=f"unknown label {position}"):
            model.number(position)


def test_an_unknown_label_names_the_nearest():
    with pytest.raises(DataError, match="unknown label 'dgo'; did you mean 'dog'"):
        Labels.of(["cat", "dog"]).number("dgo")


@pytest.mark.parametrize(
    "names",
    [["Cat", "cat"], [NFD, unicodedata.normalize("NFC", NFD)], ["01", "1"], ["0", "00"],
     ["É", "e\u0301"], ["x", "DOG", "y", "dog"]],
)  # fmt: skip
def test_names_that_are_one_label_are_refused_before_training_with_both(tmp_path, names):
    with pytest.raises(DataError, match="are one name") as caught:
        modality().examples(data(names, [0, 1] if len(names) == 2 else None))
    both = sorted(names, key=lambda name: name in ("x", "y"))[:2]
    assert all(ascii(name) in str(caught.value) for name in both)


def test_folders_that_differ_in_case_alone_are_refused(tmp_path):
    for name in ("Cat", "cat"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    with pytest.raises(DataError, match="labels 'Cat' and 'cat' are one name"):
        modality().examples({"source": str(tmp_path), "holdout": 0.0})
    assert len(modality(label="none").examples({"source": str(tmp_path), "holdout": 0.0})) == 2


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("[yes, no]", "labels\\[0\\] = True"), ("[cat, null]", "labels\\[1\\] = None"),
        ("[1.5, 2]", "labels\\[0\\] = 1.5"), ("cat", "expected a list"), ("[]", "at least one"),
        ("[cat, Cat]", "different names"), ("[1, '1']", "different names"), ("{a: 1}", "a list"),
        ("[2020-01-01]", "labels\\[0\\]"), ("[[a]]", "labels\\[0\\]"), ("[-1]", "0 or more"),
        ("[.inf]", "labels\\[0\\] = inf"), ("7", "expected a list"),
    ],
)  # fmt: skip
def test_options_that_are_no_names_are_refused(written, said):
    with pytest.raises(ConfigError, match=said):
        modality(labels=yaml.safe_load(written))


def test_numbers_in_options_are_names():
    assert modality(labels=[0, 1, 10]).labels == ["0", "1", "10"]
    assert modality(labels=("a", "b")).labels == ["a", "b"]


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (np.array([-1, 0, 1]), r"y\[0\] = -1: expected 0 or more"),
        (np.array([0, 1, 2**40]), r"y\[2\] = 1099511627776: expected less than 65,536"),
        (np.array([0, 2**63], np.uint64), r"y\[1\] = 9223372036854775808"),
        (np.array([0, MOST_LABELS]), r"y\[1\] = 65536"),
        (np.array([0, 1, 60_000]), "3 of the 60,001 labels up to it occur"),
        (np.array([0.0, 1.0]), "expected whole numbers"), (np.array([True, False]), "whole"),
        (np.array(["a", "b"]), "whole"), (np.array([-(2**63)]), "0 or more"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"label": "part"}, {"labels": ["a", "b", "c"]}])
def test_numbers_outside_of_what_a_label_may_be_are_refused(tmp_path, y, said, options):
    with pytest.raises(DataError, match=said):
        modality(**options).examples(arrays(tmp_path, y))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint32, np.int64, np.uint64])
def test_numbers_of_any_type_are_labels(tmp_path, dtype, caplog):
    made = modality()
    rows = made.examples(arrays(tmp_path, np.array([1, 3, 1], dtype)))
    assert rows.cond["label"].tolist() == [1, 3, 1]
    assert made.labels == ["0", "1", "2", "3"]
    assert "2 of 4 labels have no picture and are not trained: 0, 2" in caplog.text


@pytest.mark.parametrize("label", [True, 1.0, -1, 2**40, ["a"], {"a": 1}])
def test_labels_of_metadata_are_names_or_numbers(tmp_path, label):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    row = {"file_name": "a.png", "label": label}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"a.png: label = "):
        read_pictures(str(tmp_path), channels=1)
    assert len(read_pictures(str(tmp_path / "a.png"), channels=1)) == 1


@pytest.mark.parametrize(
    ("model", "names", "labels", "own"),
    [
        (["n0", "n1", "n2", "n3"], ["3", "1"], [0, 1, 0], [3, 1, 3]),
        (["n0", "n1", "n2"], ["0", "1", "2"], [2, 0], [2, 0]),
        (["0", "1", "10", "2"], ["1", "2", "10"], [0, 1, 2], [1, 3, 2]),
        (["3", "7"], [str(i) for i in range(8)], [3, 7, 3], [0, 1, 0]),
        (["03", "07"], ["3", "7"], [1, 0], [1, 0]), (["b", "a"], ["A", "B"], [0, 1], [1, 0]),
        ([NFD], ["CAFÉ"], [0], [0]),
    ],
)  # fmt: skip
def test_labels_of_data_are_the_models_by_name_or_by_what_digits_say(model, names, labels, own):
    rows = modality(labels=model).examples(data(names, labels), split="all")
    assert rows.cond["label"].tolist() == own


@pytest.mark.parametrize(
    ("model", "names", "labels"),
    [
        (["a", "b"], ["0", "2"], [0, 1]), (["a", "b"], ["a", "c"], [0, 1]),
        (["3", "7"], ["3", "4"], [0, 1]), (["a", "1"], ["1", "0"], [0, 1]),
        (["a"], ["a"], [1]), (["a"], ["a"], [-1]), (["a", "b"], ["a", "-1"], [0, 1]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("split", ["all", "train"])
def test_labels_that_the_model_lacks_are_refused(model, names, labels, split):
    with pytest.raises(DataError):
        modality(labels=model).examples(data(names, labels), split=split)


def test_pictures_without_labels_are_refused_in_words_that_help():
    plain = Pictures(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), ["0", "1"])
    with pytest.raises(DataError, match=r"no labels.*metadata.jsonl"):
        modality(labels=["a"]).examples(plain)


def test_names_that_are_digits_are_in_the_order_of_numbers():
    names = [str(i) for i in range(12)]
    assert numbered(names[::-1], names)[1] == names
    assert numbered(["10", "9", "x"], ["0", "1", "2"])[1] == ["10", "9", "x"]


def test_a_saved_model_reads_back_what_it_was_saved_with(tmp_path):
    made = modality()
    made.examples(data(["Été", "10", "no"]), split="all")
    made.save(tmp_path)
    settings = json.loads((tmp_path / "modality.json").read_text())
    settings.pop("name")
    assert image(**settings, folder=tmp_path).labels == made.labels == ["été", "10", "no"]


ALPHABET = ["a", "A", "é", "e\u0301", "ß", "İ", "0", "1", "9", "-", ".", " ", "日", "²", "ǅ", "K"]


@pytest.mark.slow
def test_what_save_writes_load_takes_for_two_thousand_sets_of_names():
    refused = 0
    for number in range(2000):
        random_ = random.Random(number)
        letters = random_.choice([ALPHABET, ["0", "1", "2"], ["a", "A"], ["é", "e\u0301", "E"]])
        names = sorted({
            "".join(random_.choices(letters, k=random_.randint(1, 4))) for _ in range(6)
        })  # fmt: skip
        made = modality()
        keys = [int(n) for n in names] if all(n.isascii() and n.isdigit() for n in names) else [
            unicodedata.normalize("NFC", unicodedata.normalize("NFC", n).lower()) for n in names
        ]  # fmt: skip
        if len(set(keys)) < len(names):
            with pytest.raises(DataError, match="are one name"):
                made.examples(data(names), split="all")
            refused += 1
            continue
        rows = made.examples(data(names), split="all")
        settings = json.loads(json.dumps(made.config()))
        settings.pop("name")
        again = image(**settings)
        assert again.labels == made.labels
        for i, name in enumerate(names):
            assert again.label_id(name) == rows.cond["label"][i], (number, name)
        assert torch.equal(
            again.examples(data(names), split="all").cond["label"], rows.cond["label"]
        )
    assert 100 < refused < 1900


def test_the_checks_of_one_label():
    assert checked("x", "y") == "x"
    assert checked(np.uint8(3), "y") == 3
    with pytest.raises(DataError, match="x = 65536: expected less than 65,536"):
        checked(MOST_LABELS, "x")


def test_numbers_are_labels_up_to_their_bounds():
    assert checked(MOST_LABELS - 1, "x") == MOST_LABELS - 1
    # A tenth of a thousand numbers, and one fewer.
    enough = [*range(99), 999]
    assert len(numbered(enough, [str(i) for i in enough])[1]) == 1000
    with pytest.raises(DataError, match="99 of the 1,000 labels"):
        numbered(enough[1:], [str(i) for i in enough[1:]])
    names = Labels.of(["cat", "dog"])
    assert names.number(1) == 1
    with pytest.raises(DataError, match="unknown label 2"):
        names.number(2)
