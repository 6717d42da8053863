"""Running a published language model: chat, blocks over any sampler, ends of text, guidance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from decoder_checkpoints import GOLDEN, copied
from tokenizers import Tokenizer, models, pre_tokenizers

from mdiff.cli import run
from mdiff.errors import DataError
from mdiff.modalities.text import text
from mdiff.pipeline import Pipeline, load

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}"
    "{% endif %}<user> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)
WORDS = [f"w{i}" for i in range(120)]
SPECIAL = ["<pad>", "<user>", "<answer>", "<|eot_id|>", "<|endoftext|>", "<mask>"]


def worded(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """The golden model with a tokenizer of words and, by default, a chat template."""
    copied(GOLDEN / "llada", folder)
    names = [*WORDS, *SPECIAL[:5], "<unk>", "<mask>", "<extra>"]
    vocab = {name: i for i, name in enumerate(names)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(SPECIAL)
    inner.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>",
        "pad_token": "<pad>", "mask_token": "<mask>", "unk_token": "<unk>",
    }  # fmt: skip
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worded(tmp_path_factory.mktemp("models") / "worded")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return load(folder)


def test_a_chat_is_put_by_the_tokenizers_template(pipeline: Pipeline) -> None:
    user, answer, mask = 121, 122, 126
    assert pipeline.canvases({"chat": "w3 w4"}, length=7) == [[user, 3, 4, answer] + [mask] * 3]
    messages = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    (canvas,) = pipeline.canvases({"chat": messages}, length=6)
    assert canvas == [user, 3, user, 4, answer, mask]
    (sample,) = pipeline.generate({"chat": "w3 w4"}, length=7, sampler="confidence")
    assert sample.tokens[:4] == [user, 3, 4, answer]


@pytest.mark.parametrize(("said", "message"), [
    ({"chat": "w1", "length": 3}, "expected"),
    ({"chat": 3}, "expected"),
    ({"chat": [{"role": "tool", "content": "w1"}]}, "no tools"),
    ({"chat": "w1 <mask>"}, "mask"),
])  # fmt: skip
def test_a_chat_that_cannot_be_meant_is_refused(
    pipeline: Pipeline, said: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        pipeline.canvases(said, length=8)


def test_a_tokenizer_without_a_template_says_so(tmp_path: Path) -> None:
    plain = load(worded(tmp_path / "plain", template=None))
    with pytest.raises(DataError, match="no chat template") as caught:
        plain.canvases({"chat": "w1"}, length=8)
    assert caught.value.exit_code == 3
    with pytest.raises(DataError, match="no chat template"):
        text().canvas({"chat": "w1"}, 8)
    assert run(["generate", str(tmp_path / "plain"), "--chat", "w1"]) == 3


def test_a_block_length_runs_any_sampler_block_by_block(pipeline: Pipeline) -> None:
    options: dict[str, Any] = {"length": 12, "temperature": 0.0, "counts": "even", "steps": 2}
    (short,) = pipeline.generate("w1", sampler="confidence", block_length=4, **options)
    (named,) = pipeline.generate(
        "w1", sampler="blocks", inner="confidence", block_length=4, **options
    )
    (whole,) = pipeline.generate("w1", sampler="confidence", **options)
    assert short.tokens == named.tokens
    assert (short.calls, whole.calls) == (6, 2)


def test_the_command_line_takes_a_chat(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(folder), "--chat", "w3 w4", "--length", "10", "--json"]
    words += ["--sampler", "confidence", "--block-length", "3", "--temperature", "0"]
    assert run(words) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert tokens[:4] == [121, 3, 4, 122]
    assert len(tokens) == 10
