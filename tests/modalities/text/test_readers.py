"""Data files as people have them: read as they are, or refused with file and line or row."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from mdiff.errors import DataError
from mdiff.modalities.ids import ids
from mdiff.modalities.text.documents import Source
from mdiff.modalities.text.modality import text

GENERATED = 2000


def written(path: Path, values: list[Any]) -> Path:
    """A .jsonl or .parquet file of {"text": value} rows."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.table({"text": values}), path, row_group_size=2)
    else:
        path.write_text("\n".join(json.dumps({"text": value}) for value in values) + "\n")
    return path


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("values", [["a", None], ["a", None, "c"], [1, 2], [["a", "b"]], [True],
                                    [1.5], [{"a": "b"}]])  # fmt: skip
def test_a_value_that_is_no_text_is_refused_with_its_row(
    tmp_path: Path, ending: str, values: list[Any]
) -> None:
    path = written(tmp_path / f"data.{ending}", values)
    row = next(i for i, value in enumerate(values, start=1) if not isinstance(value, str))
    with pytest.raises(DataError, match=rf"data\.{ending}, (line|row) {row}\b.*no string 'text'"):
        Source(str(path)).documents()


def test_values_of_the_hub_are_read_by_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    for values, documents in ((["a", "b"], ["a", "b"]), (["a", None], None), ([1], None)):
        rows = datasets.Dataset.from_dict({"text": values, "other": [0] * len(values)})
        monkeypatch.setattr(datasets, "load_dataset", lambda *given, rows=rows, **more: rows)
        if documents is not None:
            assert Source("hub:a/b").documents() == documents
            continue
        with pytest.raises(DataError, match=rf"hub:a/b, row {len(values)} has no string"):
            Source("hub:a/b").documents()


def test_parquet_of_several_row_groups_and_string_types_is_read(tmp_path: Path) -> None:
    values = [f"row {i} é" for i in range(5000)]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"other": range(5000), "text": pa.array(values, pa.string()).cast(kind)})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
        assert Source(str(tmp_path / "a.parquet")).documents() == values


def test_parquet_needs_no_cache_and_is_known_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def refused(*given: object, **more: object) -> None:
        raise OSError("no cache here")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    path = written(tmp_path / "a.parquet", ["one", "two"])
    for name in ("b.PARQUET", "c", "d.txt"):
        (tmp_path / name).write_bytes(path.read_bytes())
        assert Source(str(tmp_path / name)).documents() == ["one", "two"]


def test_endings_are_read_in_any_case_and_gzip_by_its_content(tmp_path: Path) -> None:
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    for name in ("a.JSONL", "a.Ndjson", "a.json"):
        (tmp_path / name).write_bytes(lines)
        (tmp_path / f"{name}.GZ").write_bytes(gzip.compress(lines))
        for each in (name, f"{name}.GZ"):
            assert Source(str(tmp_path / each)).documents() == ["one", "two"]
    (tmp_path / "a.TXT.gz").write_bytes(gzip.compress(b"plain"))
    (tmp_path / "b.txt").write_bytes(gzip.compress(b"plain"))
    for name in ("a.TXT.gz", "b.txt"):
        assert Source(str(tmp_path / name)).documents() == ["plain"]


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.csv.gz", "a.zip", "a.tar", "a.xlsx",
                                  "a.pdf", "a.npz", "a.arrow", "a.zst", "a.pkl"])  # fmt: skip
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"text,label\na,b\n")
    with pytest.raises(DataError, match=r"known: \.txt, \.jsonl, \.parquet"):
        Source(str(tmp_path / name)).documents()


@pytest.mark.parametrize("content", ['["a", "b"]', '\n [{"text": "a"}]', '{\n"text": "a"\n}'])
def test_json_that_is_no_lines_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(DataError, match=r"list\.json.* (JSON list|not JSON)"):
        Source(str(tmp_path / "list.json")).documents()


def test_the_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert Source("~/a.txt").documents() == ["at home"]
    assert text().examples({"source": ["~/a.txt"], "holdout": 0.0}, length=4).length == 4


def test_half_a_character_is_refused_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "a\\ud800b"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 .*character 1 is not valid Unicode"):
        Source(str(tmp_path / "a.jsonl")).documents()


@pytest.mark.parametrize("path", ["no\0name", "x" * 5000, "."])
def test_a_path_that_cannot_be_one_is_a_data_error(path: str) -> None:
    with pytest.raises(DataError):
        Source(path).documents()


# Ids, and what is outside the space.


def test_ids_are_read_from_every_format(tmp_path: Path) -> None:
    rows = [[3, 1], [2, 0, 4]]
    lines = "".join(json.dumps({"tokens": row}) + "\n" for row in rows)
    for name in ("a.jsonl", "a.txt", "plain", "a.JSON"):
        (tmp_path / name).write_text(lines)
    parquet.write_table(pa.table({"tokens": rows}), tmp_path / "a.parquet")
    (tmp_path / "other.jsonl").write_text(lines.replace("tokens", "codes"))
    made = ids(vocab_size=5)
    for path in sorted(tmp_path.iterdir()):
        source = {"source": str(path), "holdout": 0.0}
        if path.name == "other.jsonl":
            source["field"] = "codes"
        assert made.documents(source) == rows
        assert made.examples(source, length=2).tokens.tolist() == [3, 1, 2, 0, 4]


@pytest.mark.parametrize(("rows", "message"), [
    ([[1], [2, 5]], "train document 2, position 1: the data holds the mask id 5"),
    ([[1, 6]], "train document 1, position 1: the data holds id 6"),
    ([[1, 2**40]], "train document 1, position 1: the data holds id"),
])  # fmt: skip
def test_ids_outside_the_space_are_found_before_the_first_step(
    tmp_path: Path, rows: list[list[int]], message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))
    with pytest.raises(DataError, match=message):
        ids(vocab_size=5).examples({"source": str(path), "holdout": 0.0}, length=2)


def read(path: Path) -> list[str] | DataError:
    try:
        return Source(str(path)).documents()
    except DataError as error:
        return error


@pytest.mark.slow
def test_generated_files_are_read_as_they_are_or_refused(tmp_path: Path) -> None:
    random_ = random.Random(7)
    texts = ["a", "é漢😀", "line\nend", "\u2028", "x" * 300, " ", "\ufeff", "[1]", "null"]
    wrong = [None, 1, 1.5, True, ["a"], {"text": "a"}, float("nan")]
    endings = [".txt", ".jsonl", ".parquet", ".json", ".ndjson", "", ".TXT", ".csv", ".JSONL.gz"]
    refused = 0
    for number in range(GENERATED):
        count = random_.randrange(0, 5)
        chosen = texts if random_.random() < 0.7 else texts + wrong
        values = [random_.choice(chosen) for _ in range(count)]
        ending = random_.choice(endings)
        path = tmp_path / f"f{number}{ending}"
        lines = "\n".join(json.dumps({"text": value}) for value in values)
        if ending == ".parquet":
            try:
                parquet.write_table(pa.table({"text": values}), path)
            except pa.ArrowException:
                continue
        else:
            content = lines.encode()
            path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
        if random_.random() < 0.2:
            raw = bytearray(path.read_bytes())
            for _ in range(random_.randrange(1, 4)):
                if raw:
                    raw[random_.randrange(len(raw))] = random_.randrange(256)
            path.write_bytes(bytes(raw[: random_.randrange(len(raw) + 1)]))
            values = None
        found = read(path)
        if isinstance(found, DataError):
            refused += 1
            assert str(found).isprintable()
            assert path.name in str(found)
            continue
        assert all(isinstance(document, str) for document in found)
        if values is None:
            continue
        if ending.lower() in ("", ".txt"):
            assert found == [lines]
        else:
            assert found == [value for value in values if value]
    assert GENERATED / 10 < refused < GENERATED
