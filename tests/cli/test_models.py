"""The catalogue: what it states is what opens here and what docs/checkpoints.md compares."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from folders import GOLDEN, ROOT
from text_commands import lines, refused

from mdiff.cli import run
from mdiff.files import catalogue
from mdiff.files.model_files import DIRECTORIES
from mdiff.pipeline.published import supported

PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
TABLE = PAGE.partition("| family | layout |")[2].partition("\n\n")[0].splitlines()[2:]
FAMILIES = {row.split("|")[1].strip(): row for row in TABLE}
# Rows of the table that are no models to generate with, or all of transformers'.
NOT_LISTED = {
    "any masked language model", "taming VQGAN", "LlamaGen VQ-16, VQ-8", "MaskBit tokenizer",
}  # fmt: skip


@pytest.mark.parametrize("entry", catalogue(), ids=lambda entry: entry.family)
def test_a_family_is_one_that_opens_here_and_has_a_row_of_what_was_compared(entry: Any) -> None:
    row = FAMILIES[entry.family]
    if entry.architecture:
        assert entry.architecture in [*supported(), *DIRECTORIES]
    for name, size in entry.models.items():
        # The number is that of the name.
        assert size is None or f"{size / 1e9:g}B" in name
    assert row.count("|") == 6


def test_every_family_of_the_table_is_in_the_catalogue() -> None:
    assert FAMILIES.keys() - NOT_LISTED == {entry.family for entry in catalogue()}
    assert FAMILIES.keys() > NOT_LISTED


def test_the_readme_lists_the_families_of_the_table_and_those_without_official_outputs() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())

    def listed(before: str, after: str) -> list[str]:
        return readme.partition(before)[2].partition(after)[0].split("; ")

    plain = {re.sub(r" \(.*\)", "", name): row for name, row in FAMILIES.items()}
    assert listed("no pickle is opened: ", ". Each was") == list(plain)
    without = [name for name, row in plain.items() if "no official outputs" in row]
    assert listed("or with MDLM's: ", " ([docs/checkpoints.md]") == without


def test_the_catalogue_is_printed_and_is_one_object(capsys: Any) -> None:
    assert run(["models"]) == 0
    page = capsys.readouterr().out
    assert "GSAI-ML/LLaDA-8B-Instruct                8.0 billion: float32 32.0 GB" in page
    assert run(["models", "--json"]) == 0
    (found,) = lines(capsys)
    assert [one["family"] for one in found["families"]] == [one.family for one in catalogue()]
    assert found["families"][0]["models"][0]["bytes"]["bfloat16"] == 16 * 10**9


def test_whether_a_model_fits_is_said_without_a_download(capsys: Any, monkeypatch: Any) -> None:
    free = {0: 24 * 10**9, "cpu": 10 * 10**9}
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: free)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("load"))
    assert run(["inspect", "GSAI-ML/LLaDA-8B-Instruct", "--fits", "--json"]) == 0
    (found,) = lines(capsys)
    assert found["fits"] == {
        "float32": {"0": False, "cpu": False}, "bfloat16": {"0": True, "cpu": False},
        "float16": {"0": True, "cpu": False},
    }  # fmt: skip
    assert found["parameters"] == 8 * 10**9
    assert run(["inspect", "GSAI-ML/LLaDA-8B-Instruct", "--fits"]) == 0
    page = capsys.readouterr().out
    assert "float32      32.00 GB  does not fit GPU 0, of which 24.0 GB are free" in page
    assert "bfloat16     16.00 GB  fits GPU 0" in page


@pytest.mark.parametrize("name", [str(GOLDEN / "llada"), "builtin:fashion"])
def test_of_a_local_model_the_headers_are_counted(name: str, capsys: Any) -> None:
    assert run(["inspect", name, "--fits", "--json"]) == 0
    (found,) = lines(capsys)
    assert run(["inspect", name, "--json"]) == 0
    (whole,) = lines(capsys)
    total = sum(
        math.prod(tensor["shape"]) for tensor in whole["tensors"]
        if not tensor["name"].startswith("codec.")
    )  # fmt: skip
    assert found["parameters"] == total
    assert found["source"] == "its files"


def test_an_unknown_model_is_asked_of_the_hub_and_no_more(capsys: Any, monkeypatch: Any) -> None:
    class Found:
        parameter_count = {"F32": 5, "BF16": 2 * 10**9}  # noqa: RUF012

    asked: list[tuple[str, str | None]] = []

    def headers(name: str, *, revision: str | None) -> type[Found]:
        asked.append((name, revision))
        return Found

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", headers)
    for name in ("some/thing", "some/thing@main"):
        assert run(["inspect", name, "--fits", "--json"]) == 0
        (found,) = lines(capsys)
        assert (found["parameters"], found["source"]) == (2 * 10**9 + 5, "the Hub")
    assert asked == [("some/thing", None), ("some/thing", "main")]
    assert run(["inspect", "GSAI-ML/LLaDA-8B-Instruct@main", "--fits", "--json"]) == 0
    assert lines(capsys)[0]["parameters"] == 8 * 10**9

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", unreachable)
    refused(["inspect", "some/thing", "--fits"], 5, "the Hub cannot be asked.*no network$", capsys)
    near = "GSAI-ML/LLaDA-8B-Instrukt"
    refused(["inspect", near, "--fits"], 5, r"has GSAI-ML/LLaDA-8B-Instruct\)", capsys)
    refused(["inspect", "x" * 300, "--fits"], 4, "too long", capsys)
    for words in (["inspect", "x" * 300], ["generate", "x" * 300, "--prompt", "a"]):
        refused(words, 4, "too long", capsys)
    refused(["inspect", "./nothing", "--fits"], 4, "no such directory", capsys)
