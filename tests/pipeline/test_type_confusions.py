"""Entries of files and requests that are of another type, or gone: one line and its exit code."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hashed import GOLDEN
from masked_lms import tiny as masked_lm
from tiny_text import tiny
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import mdiff
from mdiff.cli import run
from mdiff.errors import DataError, MdiffError
from mdiff.files.atomic import digest
from mdiff.pipeline.batch.requests import read_requests

VALUES = [None, True, -1, 0, 1.5, 10**30, float("inf"), float("nan"), "", "x", "a\nb\x1b", [], [[]],
          [None], [3], {}, {"a": 1}, {"name": "x"}]  # fmt: skip
# The documented codes of a file that is not valid: an option, data, a checkpoint.
CODES = {2, 3, 4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny().save(folder)
    return folder


def paths(value: Any, *before: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every entry of a JSON value."""
    inner = value.items() if isinstance(value, dict) else ()
    for key, one in inner:
        yield (*before, key)
        yield from paths(one, *before, key)


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with the entry at `path` replaced by `new`, or left out where that is ...."""
    copy = json.loads(json.dumps(value))
    inside = copy
    for part in path[:-1]:
        inside = inside[part]
    if new is ...:
        del inside[path[-1]]
    else:
        inside[path[-1]] = new
    return copy


def write(folder: Path, name: str, content: Any) -> None:
    """Write a JSON file, and its size and digest into the manifest."""
    (folder / name).write_text(json.dumps(content))
    if name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = digest(folder / name).model_dump()
        (folder / "manifest.json").write_text(json.dumps(manifest))


def outcomes(folder: Path, name: str, every: int) -> Counter[int]:
    """How many loads of changed files ended with each exit code; 0 for those that loaded."""
    original, found = json.loads((folder / name).read_text()), Counter[int]()
    cases = [(path, new) for path in paths(original) for new in (*VALUES, ...)]
    for path, new in cases[::every]:
        write(folder, name, changed(original, path, new))
        fault = fault_of(folder)
        assert fault is None or (str(fault) and str(fault).isprintable()), (path, new)
        found[0 if fault is None else fault.exit_code] += 1
    return found


def fault_of(folder: Path) -> MdiffError | None:
    try:
        mdiff.load(folder, device="cpu")
    except MdiffError as error:
        return error
    return None


FILES = ["pipeline.json", "config.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_entry_of_a_file_is_one_line(saved: Path, tmp_path: Path, name: str) -> None:
    found = outcomes(Path(shutil.copytree(saved, tmp_path / "model")), name, every=5)
    assert found.keys() <= {0, *CODES}
    assert found[0] < found.total() / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_changed_entry_of_a_file_is_one_line(saved: Path, tmp_path: Path, name: str) -> None:
    found = outcomes(Path(shutil.copytree(saved, tmp_path / "model")), name, every=1)
    assert found.keys() <= {0, *CODES}


@pytest.mark.parametrize(("name", "path"), [
    ("config.json", ("width",)), ("config.json", ("classes",)), ("config.json", ("vocab_size",)),
    ("pipeline.json", ("space", "vocab_size")),
])  # fmt: skip
def test_absurd_sizes_of_a_saved_model_are_refused(
    saved: Path, tmp_path: Path, name: str, path: tuple[str, ...], capsys: Any
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    content = json.loads((folder / name).read_text())
    write(folder, name, changed(content, path, 10**30) | {"never_generated": [3]})
    assert run(["generate", str(folder)]) in CODES
    (line,) = capsys.readouterr().err.splitlines()
    assert path[-1] in line


def test_a_changed_entry_of_a_request_is_one_failure_with_one_line() -> None:
    lines = [json.dumps(value) for value in VALUES]
    for base in ({"prompt": "a"}, {"infill": "a[MASK]"}, {"chat": "x"}):
        for key in ("prompt", "infill", "chat", "length", "id", "seed", "other"):
            lines += [json.dumps({**base, key: value}) for value in VALUES]
    requests, failures = read_requests("\n".join(lines).encode())
    assert len(requests) + len(failures) == len(lines)
    assert 0 < len(requests) < 30
    assert all(failure.error and failure.error.isprintable() for failure in failures)


def test_requests_of_other_types_end_with_the_code_of_data(
    saved: Path, tmp_path: Path, capsys: Any
) -> None:
    lines = [json.dumps({"prompt": "a", "length": value}) for value in VALUES if value is not None]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    asked = ["--input", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out")]
    assert run(["generate", str(saved), *asked]) == DataError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: none of {len(lines)} requests can be met; line 1: length=True")


def test_a_model_with_other_ids_than_its_files_say_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    card = json.loads((folder / "pipeline.json").read_text())
    more = card["space"]["vocab_size"] + 1
    card["modality"]["eos"], card["space"] = True, {"vocab_size": more, "mask_id": more}
    write(folder, "pipeline.json", card)
    with pytest.raises(DataError, match=f"model has {more - 1} ids, pipeline.json says {more}"):
        mdiff.load(folder, device="cpu")


@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_tokenizer_may_have_the_mask_beside_the_ids_of_a_model(tmp_path: Path, more: int) -> None:
    folder = Path(shutil.copytree(GOLDEN / "smdm", tmp_path / "model"))
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64 + more)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    if more < 2:
        assert mdiff.load(folder, device="cpu").space.mask_id == 64
    else:
        with pytest.raises(DataError, match="the tokenizer has 66 ids, the model 64"):
            mdiff.load(folder, device="cpu")


@pytest.mark.parametrize(("stated", "window"), [("x", None), (True, None), ([3], None), (40, 40)])
def test_the_window_of_a_rotary_masked_model_is_a_number_or_not_known(
    tmp_path: Path, stated: object, window: int | None
) -> None:
    masked_lm("modernbert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_length": stated}))
    assert mdiff.load(tmp_path, mask_id=3, device="cpu").window == window
