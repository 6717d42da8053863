"""The catalogue: what it states is what opens here and what docs/checkpoints.md compares."""

from __future__ import annotations

from typing import Any

import pytest
from folders import GOLDEN, ROOT
from text_commands import lines, refused

from mdiff.cli import run
from mdiff.files import catalogue
from mdiff.files.model_files import DIRECTORIES
from mdiff.pipeline.published import supported

PAGE = (ROOT / "docs" / "checkpoints.md").read_text()


@pytest.mark.parametrize("entry", catalogue(), ids=lambda entry: entry.family)
def test_a_family_is_one_that_opens_here_and_has_a_row_of_what_was_compared(entry: Any) -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {entry.family} |"))
    if entry.architecture:
        assert entry.architecture in [*supported(), *DIRECTORIES]
    for name, size in entry.models.items():
        # The number is that of the name.
        assert size is None or f"{size / 1e9:g}B" in name
    assert row.count("|") == 6


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
        _product(tensor["shape"]) for tensor in whole["tensors"]
        if not tensor["name"].startswith("codec.")
    )  # fmt: skip
    assert found["parameters"] == total
    assert found["source"] == "its files"


def _product(shape: list[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def test_an_unknown_model_is_asked_of_the_hub_and_no_more(capsys: Any, monkeypatch: Any) -> None:
    class Found:
        parameter_count = {"F32": 5, "BF16": 2 * 10**9}  # noqa: RUF012

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda _: Found)
    assert run(["inspect", "some/thing", "--fits", "--json"]) == 0
    (found,) = lines(capsys)
    assert (found["parameters"], found["source"]) == (2 * 10**9 + 5, "the Hub")

    def unreachable(_: str) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", unreachable)
    refused(["inspect", "some/thing", "--fits"], 5, "the Hub cannot be asked.*no network$", capsys)
    refused(["inspect", "./nothing", "--fits"], 4, "no such directory", capsys)
