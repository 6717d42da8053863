"""Running a published language model: chat, blocks over any sampler, ends of text, guidance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_checkpoints import GOLDEN, copied
from tokenizers import Tokenizer, models, pre_tokenizers

from mdiff.cli import run
from mdiff.denoiser import from_logits, negative_prompt
from mdiff.errors import ConfigError, DataError
from mdiff.modalities.text.modality import text
from mdiff.objective.bound import nll_bound
from mdiff.pipeline.loading import load
from mdiff.pipeline.pipeline import Pipeline
from mdiff.schedule import Linear

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
    # A last message of the assistant is the beginning of the answer.
    assert canvas == [user, 3, user, 4, mask, mask]
    messages.append({"role": "user", "content": "w5"})
    (canvas,) = pipeline.canvases({"chat": messages}, length=8)
    assert canvas == [user, 3, user, 4, user, 5, answer, mask]
    (sample,) = pipeline.generate({"chat": "w3 w4"}, length=7, sampler="confidence")
    assert sample.tokens[:4] == [user, 3, 4, answer]


@pytest.mark.parametrize(("said", "message"), [
    ({"chat": "w1", "length": 3}, "expected"),
    ({"chat": 3}, "expected"),
    ({"chat": [{"role": "tool", "content": "w1"}]}, "no tools"),
    ({"chat": "w1 <mask>"}, "mask"),
])  # fmt: skip
def test_an_invalid_chat_is_refused(pipeline: Pipeline, said: dict[str, Any], message: str) -> None:
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


# Ends of text

EOT, END = 123, 124


def ending(folder: Path, *, end: str, prefer: int = END, **options: Any) -> Any:
    """A sample of a model that is surest of `prefer` at every third position."""
    pipeline = load(folder, special_tokens="typed")

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        """Each position prefers its own word; every third one, the end."""
        position = torch.arange(tokens.shape[1]) % 100
        wanted = torch.where(position % 3 == 2, prefer, position)
        peaks = 20.0 * torch.nn.functional.one_hot(wanted, 128)
        return peaks.expand(len(tokens), -1, -1)

    sure = replace(pipeline, denoiser=from_logits(logits))
    (sample,) = sure.generate(end=end, temperature=0.0, **options)
    return sample


@pytest.mark.parametrize("prefer", [EOT, END])
def test_each_policy_for_the_end_of_a_text_has_its_effect(folder: Path, prefer: int) -> None:
    asked = {"prompts": "w9", "length": 6, "prefer": prefer}
    cut, keep, suppress = (
        ending(folder, end=end, **asked) for end in ("cut", "keep", "suppress")
    )  # fmt: skip
    assert cut.tokens == keep.tokens == [9, 1, prefer, 3, 4, prefer]
    assert str(cut) == "w9 w1"
    assert str(keep) == "w9 w1 w3 w4"
    assert not {EOT, END} & set(suppress.tokens)
    assert suppress.tokens[3:5] == [3, 4]


def test_blocks_stop_at_the_end_only_where_the_text_is_cut_there(folder: Path) -> None:
    asked = {"prompts": "w9", "length": 7, "sampler": "confidence", "block_length": 2}
    cut, keep = (ending(folder, end=end, **asked) for end in ("cut", "keep"))
    assert cut.tokens == [9, 1, END, END, END, END, END]
    assert keep.tokens == [9, 1, END, 3, 4, END, 6]
    assert (cut.calls, keep.calls) == (2, 6)


def test_of_a_chat_the_answer_is_shown_and_ends_of_turns_before_it_end_nothing(
    folder: Path,
) -> None:
    turns = [{"role": "user", "content": "w7 <|eot_id|> w8"}]
    sample = ending(folder, end="cut", prompts={"chat": turns}, length=9)
    assert sample.tokens == [121, 7, EOT, 8, 122, END, 6, 7, END]
    assert str(sample) == ""
    kept = ending(folder, end="keep", prompts={"chat": turns}, length=9)
    assert str(kept) == "w6 w7"
    echoed = ending(folder, end="keep", prompts={"chat": turns}, length=9, echo=True)
    assert str(echoed) == "w7 w8 w6 w7"


def test_an_invalid_end_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'keep'"):
        load(folder).generate("w1", length=4, end="keeps")
    with pytest.raises(ConfigError, match="no id that ends"):
        load(GOLDEN / "llada").generate(length=4, end="suppress")
    assert run(["generate", str(folder), "--prompt", "w1", "--length", "4", "--end", "no"]) == 2


# Guidance


def mixed_by_hand(model: Any, canvas: list[int], negative: list[int], scale: float) -> torch.Tensor:
    """U + s (c - u) from the first hidden position on, of two calls on rows without padding."""
    first = canvas.index(126)
    other = [*negative, *canvas[first:]]
    with torch.no_grad():
        given = model(torch.tensor([canvas]))[0, first:]
        alone = model(torch.tensor([other]))[0, len(negative) :]
    return alone + scale * (given - alone)


@pytest.mark.parametrize("negative", [[5], [5, 6, 7, 8, 9]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_negative_start_is_the_other_branch_at_any_length_and_padding(
    pipeline: Pipeline, negative: list[int], side: str
) -> None:
    rows = [[1, 2, 3, 126, 126, 4, 126], [126, 10, 126], [20, 126, 126, 126]]
    canvas, valid = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.bool)
    for number, row in enumerate(rows):
        part = slice(0, len(row)) if side == "right" else slice(7 - len(row), 7)
        canvas[number, part], valid[number, part] = torch.tensor(row), True
    denoiser = negative_prompt(
        pipeline.denoiser, torch.tensor(negative), space=pipeline.space, guidance_scale=2.5
    )(canvas, valid)
    hidden = valid & (canvas == 126)
    with torch.no_grad():
        found = denoiser(canvas, at=hidden, valid=valid)
        whole = denoiser(canvas, valid=valid)
        last = denoiser.for_rows(torch.tensor([2]))(canvas[2:], at=hidden[2:], valid=valid[2:])
    mixed = [mixed_by_hand(pipeline.denoiser, row, negative, 2.5) for row in rows]
    is_hidden = [torch.tensor(row[row.index(126) :]) == 126 for row in rows]
    by_hand = torch.cat([logits[chosen] for logits, chosen in zip(mixed, is_hidden)])
    assert torch.allclose(found, by_hand, atol=1e-4)
    assert torch.allclose(whole[hidden], by_hand, atol=1e-4)
    assert torch.allclose(last, by_hand[-3:], atol=1e-4)
    with pytest.raises(ConfigError, match="2 rows: this denoiser is bound to 3"):
        denoiser(canvas[:2], at=hidden[:2], valid=valid[:2])


@pytest.mark.parametrize("sampler", ["confidence", "blocks"])
def test_a_negative_prompt_has_its_effect_and_costs_two_calls(
    pipeline: Pipeline, sampler: str
) -> None:
    options: dict[str, Any] = {"length": 14, "sampler": sampler, "temperature": 0.0, "n": 2}
    if sampler == "blocks":
        options |= {"inner": "confidence", "block_length": 4, "context": 8}
    plain = pipeline.generate("w1 w2", **options)
    same = pipeline.generate("w1 w2", guidance_scale=1.0, negative="w30", **options)
    away = pipeline.generate("w1 w2", guidance_scale=4.0, negative="w30 w31 w32", **options)
    hiding = pipeline.generate("w1 w2", guidance_scale=4.0, **options)
    assert [each.tokens for each in same] == [each.tokens for each in plain]
    assert away[0].tokens[:2] == [1, 2]
    assert away[0].tokens not in (plain[0].tokens, hiding[0].tokens)
    assert (plain[0].calls, same[0].calls, away[0].calls) == (12, 12, 24)


def test_an_invalid_negative_prompt_is_refused(pipeline: Pipeline, folder: Path) -> None:
    with pytest.raises(ConfigError, match="need a guidance_scale"):
        pipeline.generate("w1", length=4, negative="w2")
    with pytest.raises(ConfigError, match="expected the beginning of a text"):
        pipeline.generate("w1", length=4, negative="", guidance_scale=2.0)
    words = ["generate", str(folder), "--chat", "w1", "--length", "8", "--negative-prompt", "w2"]
    assert run([*words, "--guidance-scale", "2"]) == 0
    assert run(words) == 2


def test_a_text_is_scored_by_the_bound_of_its_tokens(pipeline: Pipeline) -> None:
    bound = pipeline.score(["w1 w2 w3", "w4"], estimator="exact")
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        exact = nll_bound(
            pipeline.denoiser, tokens, space=pipeline.space, schedule=Linear(), draws=1, seed=0,
            estimator="exact",
        )  # fmt: skip
        alone = pipeline.denoiser(torch.tensor([[126]]))[0, 0]
    alone[126] = -torch.inf
    assert torch.allclose(bound.nats[0], exact.nats[0].double(), atol=1e-5)
    assert torch.allclose(bound.nats[1], -alone.double().log_softmax(0)[4], atol=1e-5)


def test_half_precision_stays_near(folder: Path, pipeline: Pipeline) -> None:
    half = load(folder, dtype="bfloat16")
    assert next(half.denoiser.parameters()).dtype == torch.bfloat16
    tokens = torch.tensor([[1, 126, 2, 126]])
    with torch.no_grad():
        near, exact = half.denoiser(tokens), pipeline.denoiser(tokens)
    assert near.dtype == torch.bfloat16
    assert (near.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_ragged_prompts_together_give_the_greedy_tokens_of_each_alone(name: str) -> None:
    model = load(GOLDEN / name)
    canvases = [
        model.canvases(" ".join(str(7 * i + j) for j in range(1 + i)), length=6 + 2 * i)[0]
        for i in range(8)
    ]
    options: dict[str, Any] = {
        "sampler": "confidence", "block_length": 4, "steps": 2, "counts": "even",
        "temperature": 0.0, "guidance_scale": 1.5,
    }  # fmt: skip
    together, alone = (
        [s.tokens for one in model.runs(canvases, batch_size=size, **options)
         for s in one.finished()]
        for size in (8, 1)
    )  # fmt: skip
    assert together == alone
    assert [len(tokens) for tokens in alone] == [len(canvas) for canvas in canvases]
