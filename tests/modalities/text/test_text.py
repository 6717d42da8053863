"""The text modality: tokenizers, sources, packing and canvases."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.find import find
from mdiff.modalities.text.documents import Source, cut_documents, read_text
from mdiff.modalities.text.modality import Text, text
from mdiff.modalities.text.packing import PackedRows

STORY = "The moon was pale — and “naïve” cats sang: ünïcödé 🦉! " * 8
KINDS = ("byte", "char", "bpe")


def fitted(kind: str, *, eos: bool = False, documents: list[str] | None = None) -> Text:
    size = 300 if kind == "bpe" else None
    return text(tokenizer=kind, eos=eos, vocab_size=size).fit(documents or [STORY])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eos", [False, True])
def test_encoding_and_decoding_gives_the_text_back(kind: str, eos: bool) -> None:
    made = fitted(kind, eos=eos)
    assert made.decode(made.encode(STORY)) == STORY
    assert max(made.encode(STORY)) < made.space.vocab_size


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_bytes_and_byte_pairs_take_any_text(written: str) -> None:
    for kind in ("byte", "bpe"):
        made = TRAINED[kind]
        assert made.decode(made.encode(written)) == written
        assert "".join(piece or "" for piece in made.pieces(made.encode(written))) == written


TRAINED = {kind: fitted(kind) for kind in ("byte", "bpe")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_modality_comes_back_from_its_folder_and_settings(
    kind: str, tmp_path: Path
) -> None:
    made = fitted(kind, eos=True)
    made.save(tmp_path)
    settings = json.loads(json.dumps(made.config()))
    assert settings.pop("name") == "text"
    for again in (
        find("modalities", "text")(**settings, folder=tmp_path),
        text(tokenizer=str(tmp_path)),
    ):
        assert again.encode(STORY) == made.encode(STORY)
        assert (again.space, again.eos_id) == (made.space, made.eos_id)


def test_a_tokenizer_of_another_size_than_its_settings_is_refused(tmp_path: Path) -> None:
    fitted("bpe").save(tmp_path)
    with pytest.raises(CheckpointError, match="the tokenizer has 300 ids, the settings 301"):
        text(tokenizer="bpe", vocab_size=301, folder=tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    words = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"a b": 0}, "unk_token": "a b"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        text(tokenizer="bpe", folder=tmp_path)


def test_any_hugging_face_tokenizer_will_do(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "moon", "##s"])
    )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    made = text(tokenizer=str(tmp_path))
    assert made.encode("the moons") == [5, 6, 7]
    assert made.decode([5, 6, 7]) == "the moons"
    assert "".join(piece or "" for piece in made.pieces([5, 4, 6, 7])) == "the moons"
    assert made.space.mask_id == 4
    assert made.space.never == (0, 2)
    assert (made.eos_id, made.pad_id) == (3, 0)
    with pytest.raises(DataError, match="is not text"):
        made.canvas("the [MASK]", 8)


def test_the_end_of_text_ends_the_decoded_text() -> None:
    made = fitted("byte", eos=True)
    ids = [*made.encode("ab"), 256, *made.encode("cd")]
    assert made.decode(ids) == "ab"
    assert made.pieces(ids) == ["a", "b", "", "", ""]


def test_a_character_outside_the_alphabet_is_named() -> None:
    with pytest.raises(DataError, match=r"'z' \(U\+007A\) at character 2"):
        text(tokenizer="char", alphabet="ab").encode("abz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "bpee"}, "did you mean 'bpe'"),
        ({"tokenizer": "byte", "vocab_size": 300}, "option of tokenizer 'bpe'"),
        ({"tokenizer": "byte", "alphabet": "ab"}, "option of tokenizer 'char'"),
        ({"tokenizer": "bpe", "vocab_size": 20}, "needs 256 or more"),
        ({"tokenizer": "char", "alphabet": "aa"}, "different characters"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        text(**options)


def test_an_untrained_tokenizer_says_so() -> None:
    with pytest.raises(ConfigError, match="not trained yet"):
        _ = text(tokenizer="bpe").space


# Canvases.


def test_a_prompt_is_followed_by_masks() -> None:
    assert text().canvas("hi", 4) == [104, 105, 256, 256]
    assert text().canvas("", 2) == [256, 256]


def test_a_template_keeps_what_is_given_to_the_letter() -> None:
    canvas = text().template("The [MASK:8] of [MASK] night")
    assert [token for token in canvas if token != 256] == list(b"The  of  night")
    assert canvas.count(256) == 9


@pytest.mark.parametrize("prompt", ["a [MASK] b", "[MASK:3]"])
def test_a_mask_in_the_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(DataError, match="infill"):
        text().canvas(prompt, 40)


def test_a_prompt_longer_than_the_canvas_is_refused() -> None:
    with pytest.raises(DataError, match="5 given tokens do not fit a canvas of 3"):
        text().canvas("hello", 3)


@pytest.mark.parametrize("length", [0, -1])
def test_a_canvas_needs_a_position(length: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        text().canvas("", length)


@pytest.mark.parametrize("template", ["no gap", "[MASK:]", "[MASK:x] and [MASK:2]"])
def test_a_template_without_gaps_or_with_broken_ones_is_refused(template: str) -> None:
    with pytest.raises(DataError):
        text().template(template)


@pytest.mark.parametrize("count", ["0", "99999999999"])
def test_a_gap_of_an_absurd_size_is_refused(count: str) -> None:
    with pytest.raises(ConfigError, match="expected 1 to"):
        text().template(f"[MASK:{count}]")


# Sources.


def test_every_kind_of_file_gives_its_documents(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"text": "one"}, {"text": ""}, {"text": "two\nlines"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("zwölf".encode()))
    (tmp_path / "b.txt").write_text("\ufeffone<end>two", encoding="utf-8")
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    found = {
        "a.jsonl": ["one", "two\nlines"],
        "a.txt.gz": ["zwölf"],
        "a.parquet": ["one", "two"],
        "b.txt": ["one<end>two"],
    }
    for name, documents in found.items():
        assert Source(str(tmp_path / name)).documents() == documents
    assert Source(str(tmp_path / "b.txt"), separator="<end>").documents() == ["one", "two"]
    both = Source([str(tmp_path / "b.txt"), str(tmp_path / "a.jsonl")]).documents()
    assert both == ["one<end>two", "one", "two\nlines"]


def test_the_standard_library_is_a_source() -> None:
    assert Source("pydoc_data.topics").documents() == [topics[name] for name in sorted(topics)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty"),
        ("binary.txt", b"ab\0cd", "offset 2"),
        ("latin.txt", "caf\u00e9 au lait".encode("latin-1"), "byte 0xe9 at offset 3"),
        ("utf16.txt", "hi".encode("utf-16"), "not UTF-8"),
        ("cut.txt.gz", gzip.compress(b"hello" * 100, mtime=0)[:-9], "cannot be unpacked"),
        ("plain.txt.gz", b"hello", "cannot be unpacked"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"line 2 \(byte 14\) is not JSON"),
        ("list.jsonl", b"[1]\n", "expected an object, got list"),
        ("field.jsonl", b'{"txt": "a"}\n', "no string 'text'; did you mean 'txt'"),
        ("bad.parquet", b"PAR1", "Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_data_error_with_its_position(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        Source(str(tmp_path / name)).documents()
    assert name in str(caught.value)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("x")
    with pytest.raises(DataError, match=r"did you mean .*input\.txt"):
        read_text(tmp_path / "imput.txt")
    with pytest.raises(DataError, match="no directory"):
        read_text(tmp_path / "away" / "input.txt")
    with pytest.raises(DataError, match="is a directory"):
        read_text(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sorce": "a"}, "did you mean 'data.source'"),
        ({}, "data.source is missing"),
        ({"source": 3}, "expected a path"),
        ({"source": []}, "expected a path"),
        ({"source": "a", "holdout": 1.0}, "holdout=1.0"),
        ({"source": "a", "holdout": "x"}, "holdout='x'"),
    ],
)
def test_a_data_section_that_cannot_be_meant_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Source.of(options)


@given(
    st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=6),
    st.floats(0, 0.9),
    st.floats(0, 0.9),
)
@settings(max_examples=100, deadline=None)
def test_the_splits_are_the_text_cut_at_exact_characters(
    documents: list[str], holdout: float, validation: float
) -> None:
    whole = "".join(documents)
    parts = []
    for split in ("train", "validation", "holdout"):
        try:
            pieces = cut_documents(documents, split, holdout=holdout, validation=validation)
        except DataError:
            pieces = []
        parts.append("".join(pieces))
    assert "".join(parts) == whole
    assert len(parts[0] + parts[1]) == int(len(whole) * (1 - holdout))


# Packing.


def packed(documents: list[list[int]], **options: object) -> PackedRows:
    return PackedRows(
        documents, **({"length": 4, "shift": True, "unit": "char", "units": 1.0} | options)
    )


def test_rows_side_by_side_hold_every_token_once() -> None:
    rows = packed([list(range(10)), list(range(10, 23))], shift=False)
    batch = rows.batch(torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.int64))
    assert batch.valid is not None
    assert batch.tokens[batch.valid].tolist() == list(range(23))


def test_documents_are_kept_apart_and_one_text_is_one_document() -> None:
    rows = packed([[1, 2, 3], [4, 5], [6, 7, 8]], shift=False, length=8)
    batch = rows.batch(torch.tensor([0]), torch.tensor([0]))
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    alone = packed([list(range(64))])
    assert alone.batch(torch.tensor([0]), torch.tensor([0])).documents is None


def test_windows_differ_between_epochs_and_depend_on_row_and_epoch_alone() -> None:
    rows = packed([list(range(1000))], length=16)
    numbers = torch.arange(len(rows))
    epochs = [rows.batch(numbers, torch.full_like(numbers, epoch)).tokens for epoch in range(6)]
    starts = {int(tokens[0, 0]) for tokens in epochs}
    assert len(starts) > 3
    mixed = rows.batch(torch.tensor([5, 2]), torch.tensor([3, 1])).tokens
    assert torch.equal(mixed, torch.stack([epochs[3][5], epochs[1][2]]))
    for tokens in epochs:
        assert torch.equal(tokens.flatten(), torch.arange(tokens.numel()) + tokens[0, 0])


def test_a_text_shorter_than_a_row_is_padded() -> None:
    rows = packed([[7, 8]], length=4)
    batch = rows.batch(torch.tensor([0]), torch.tensor([9]))
    assert len(rows) == 1
    assert batch.valid is not None
    assert batch.valid.tolist() == [[True, True, False, False]]


def test_the_fingerprint_tells_tokens_cuts_and_lengths_apart() -> None:
    prints = [
        packed([[1, 2, 3, 4]]).fingerprint,
        packed([[1, 2, 3, 5]]).fingerprint,
        packed([[1, 2], [3, 4]]).fingerprint,
        packed([[1, 2, 3, 4]], length=2).fingerprint,
        packed([[1, 2, 3, 4]], shift=False).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert packed([[1, 2, 3, 4]]).fingerprint == prints[0]


def test_a_tokenizer_learns_from_the_training_split_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcd" * 90 + "qrst" * 10)
    made = text(tokenizer="char")
    rows = made.examples({"source": str(path), "holdout": 0.1}, length=8)
    assert made.config()["alphabet"] == "abcd"
    assert rows.units == 1.0
    assert rows.slice_sha256 == hashlib.sha256(b"abcd" * 90).hexdigest()
    with pytest.raises(DataError, match="'q'"):
        made.examples({"source": str(path)}, length=8, split="holdout")


def test_the_end_of_a_document_is_a_token_of_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab"}\n{"text": "c"}\n')
    rows = text(eos=True).examples({"source": str(path), "holdout": 0.0}, length=5)
    batch = rows.batch(torch.tensor([0]), torch.tensor([0]))
    assert batch.tokens.tolist() == [[97, 98, 256, 99, 256]]
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1]]


def test_a_row_of_text_needs_a_length() -> None:
    with pytest.raises(ConfigError, match=r"data\.length"):
        text().examples("pydoc_data.topics", length=None)
