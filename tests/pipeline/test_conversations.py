"""Conversations: who says what, what a template uses, what fits, and where an answer ends."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import COLUMNS, END, MASK, PAD, START, TEMPLATE, chat_model

from mdiff.denoiser import from_logits
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.pipeline.loading import load
from mdiff.pipeline.pipeline import Pipeline
from mdiff.sampling.ending import ADDED, FIRST, LOOKED_AT, daedal

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
    "{% endif %}<|im_start|>{{ m.content }}{% endfor %}"
)
SILENT = TEMPLATE.replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
)
TOOLS = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    "{% for d in documents or [] %}{{ d.text }}{% endfor %}"
) + TEMPLATE
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def says(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return load(folder)


def other(folder: Path, into: Path, *, template: str = TEMPLATE, **generation: Any) -> Pipeline:
    """The model with another template and generation_config.json."""
    shutil.copytree(folder, into)
    (into / "chat_template.jinja").write_text(template)
    (into / "generation_config.json").write_text(json.dumps(generation))
    return load(into)


@pytest.mark.parametrize(("chat", "message"), [
    ([], "the chat is empty"),
    ([says("sytem", "a")], "message 1 of the chat: role='sytem'; did you mean 'system'"),
    ([says("user", "a"), says("human", "b")], "message 2 .*known: assistant"),
    ([{"content": "a"}], "role=None"),
    ([{"role": "user"}], "content=None: expected a text"),
    ([says("user", 3)], "content=3"),
    ([says("user", None)], "content=None"),
    (["hello"], "message 1 of the chat is 'hello'"),
    ([[]], "message 1 of the chat is"),
    ([says(["user"], "a")], "role="),
    (None, "expected"),
    ({"role": "user"}, "expected"),
])  # fmt: skip
def test_what_is_no_conversation_is_refused_by_its_message(
    pipeline: Pipeline, chat: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        pipeline.generate({"chat": chat}, max_new_tokens=4)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("beside", "message"), [
    ({"tools": "weather"}, "tools='weather': expected a list"),
    ({"tools": [3]}, "tools="),
    ({"documents": {"text": "a"}}, "documents="),
    ({"tool": [TOOL]}, "if wanted tools and documents"),
    ({"tools": [TOOL]}, "leaves out tools"),
    ({"documents": [{"text": "a"}]}, "leaves out documents"),
])  # fmt: skip
def test_what_a_template_has_no_use_for_is_refused(
    pipeline: Pipeline, beside: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        pipeline.canvases({"chat": "hello", **beside}, max_new_tokens=4)


def test_a_special_token_in_a_tool_is_refused(folder: Path, tmp_path: Path) -> None:
    model = other(folder, tmp_path / "tools", template=TOOLS)
    tool = {"function": {"name": "<|im_end|>"}}
    with pytest.raises(ConfigError, match="tools of the chat holds the special token"):
        model.canvases({"chat": "hello", "tools": [tool]}, max_new_tokens=4)


def test_tools_and_documents_are_the_templates(folder: Path, tmp_path: Path) -> None:
    model = other(folder, tmp_path / "tools", template=TOOLS)
    beside = {"tools": [TOOL], "documents": [{"title": "b", "text": "sunny"}]}
    (canvas,) = model.canvases({"chat": "hi", **beside}, max_new_tokens=1)
    (plain,) = model.canvases({"chat": "hi"}, max_new_tokens=1)
    assert canvas == [*model.modality.encode("weathersunny"), *plain]


@pytest.mark.parametrize(("template", "message"), [
    (NO_SYSTEM, "refuses these messages: no system here"),
    (SILENT, "leaves out message 1, of role system"),
])  # fmt: skip
def test_a_template_without_a_system_prompt_is_said_to_be_one(
    folder: Path, tmp_path: Path, template: str, message: str
) -> None:
    model = other(folder, tmp_path / "model", template=template)
    with pytest.raises(DataError, match=message):
        model.generate({"chat": [says("system", "be brief"), says("user", "hi")]})
    assert model.canvases({"chat": [says("user", "hi")]}, max_new_tokens=1)


# The window

LONG = [
    says("system", "s" * 10), says("user", "a" * 60), says("assistant", "b" * 60),
    says("user", "c" * 60), says("assistant", "d" * 20), says("user", "e" * 20),
]  # fmt: skip


def test_a_conversation_longer_than_the_window_is_said_to_be(pipeline: Pipeline) -> None:
    assert pipeline.window == 256
    with pytest.raises(DataError, match=r"has 3.. tokens, and 240 of .*--drop-oldest"):
        pipeline.generate({"chat": LONG})
    with pytest.raises(DataError, match=r"shorten it$"):
        pipeline.generate({"chat": [says("user", "a" * 300)], "drop_oldest": True})
    with pytest.raises(DataError, match=r"shorten it$"):
        pipeline.generate({"chat": "a" * 300, "drop_oldest": True})


@pytest.mark.parametrize(("asked", "left"), [
    ({}, LONG[:1] + LONG[3:]),
    ({"max_new_tokens": 120}, LONG[:1] + LONG[5:]),
    ({"length": 120}, LONG[:1] + LONG[5:]),
])  # fmt: skip
def test_its_oldest_turns_are_left_out_only_when_asked(
    pipeline: Pipeline, asked: dict[str, int], left: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="mdiff"):
        (canvas,) = pipeline.canvases({"chat": LONG, "drop_oldest": True}, **asked)
    (kept,) = pipeline.canvases({"chat": left}, **asked)
    assert canvas == kept
    assert [f"{len(LONG) - len(left)} messages" in caplog.text] == [True]
    caplog.clear()
    short = {"chat": "hi", "drop_oldest": True}
    assert pipeline.canvases(short) == pipeline.canvases({"chat": "hi"})
    assert caplog.text == ""


# What the model's files state


@pytest.mark.parametrize(("stated", "same"), [
    ({"temperature": 0.0}, {"temperature": 0.0}),
    ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
    ({"temperature": 0.6, "top_k": 5}, {"temperature": 0.6, "top_k": 5}),
    ({"temperature": 0.9, "top_p": 0.7}, {"temperature": 0.9, "top_p": 0.7}),
    ({"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.1}, {}),
    ({"block_length": 4}, {"block_length": 4}),
    ({"block_size": 4, "steps": 2}, {"block_length": 4, "steps": 2}),
    ({"steps": 3}, {"steps": 3}),
])  # fmt: skip
def test_options_that_the_files_state_are_those_of_a_call(
    folder: Path, pipeline: Pipeline, tmp_path: Path, stated: Any, same: Any
) -> None:
    model = other(folder, tmp_path / "model", **stated)
    asked: Any = {"max_new_tokens": 12, "sampler": "confidence", "seed": 3}
    (found,) = model.generate({"chat": "hi"}, **asked)
    (wanted,) = pipeline.generate({"chat": "hi"}, **asked, **same)
    assert (found.tokens, found.calls) == (wanted.tokens, wanted.calls)
    own: Any = {"temperature": 1.5, "block_length": 3, "per_call": 1}
    own = asked | own | {"sampler": "first_hitting"}
    (found,) = model.generate("hi", **own)
    (wanted,) = pipeline.generate("hi", **own)
    assert (found.tokens, found.calls) == (wanted.tokens, wanted.calls)
    # A sampler that takes no steps is not given any, and a text that stands is not regenerated.
    model.generate("hi", max_new_tokens=5, sampler="first_hitting")
    model.revise("hello there", rounds=2)


def test_the_lengths_that_the_files_state_are_those_of_a_canvas(
    folder: Path, tmp_path: Path
) -> None:
    model = other(folder, tmp_path / "a", max_new_tokens=7)
    given = len(model.modality.canvas({"chat": "hi"}))
    assert len(model.canvases({"chat": "hi"})[0]) == given + 7
    assert len(model.canvases({"chat": "hi"}, max_new_tokens=9)[0]) == given + 9
    assert len(model.canvases("hi", length=20)[0]) == 20
    model = other(folder, tmp_path / "b", max_new_tokens=90, max_length=50)
    assert len(model.canvases({"chat": "hi"})[0]) == 50


@pytest.mark.parametrize(("stated", "ends"), [
    (65, {65}), ([65], {65}), ([65, 66, START], {65, 66, START}), (None, set()), ([], set()),
    ([10**6, 65], {65}), (MASK, set()),
])  # fmt: skip
def test_the_ends_that_the_files_state_end_an_answer(
    folder: Path, tmp_path: Path, stated: Any, ends: set[int]
) -> None:
    model = other(folder, tmp_path / "model", eos_token_id=stated)
    assert set(model.modality.end_ids) == {END, PAD} | ends  # type: ignore[attr-defined]
    # Also special ones are drawn: a model draws one to end.
    never = set(model.generated_space.never)
    assert not never & ends
    assert (START in never) is (START not in ends)
    for prefer in ends | {END}:
        answer = sure_of(model, prefer, first=3)
        (sample,) = answer.generate({"chat": "hi"}, max_new_tokens=9, temperature=0.0)
        assert sample.text == "zzz"
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.stated == model.stated
    assert again.modality.end_ids == model.modality.end_ids  # type: ignore[attr-defined]


def sure_of(model: Pipeline, token: int, *, first: int) -> Pipeline:
    """The model with logits that prefer `token` at each position `first` and on of the answer."""
    begin = len(model.modality.canvas({"chat": "hi"})) + first
    z = model.modality.encode("z")[0]

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        wanted = torch.full_like(tokens, z)
        wanted[:, begin:] = token
        return 20.0 * torch.nn.functional.one_hot(wanted, COLUMNS)

    return replace(model, denoiser=from_logits(logits))


def test_the_token_that_a_template_puts_behind_an_answer_ends_one(
    folder: Path, tmp_path: Path
) -> None:
    model = other(
        folder, tmp_path / "m", template=TEMPLATE.replace("}}<|im_end|>", "}}<|im_start|>")
    )
    assert START in model.modality.end_ids  # type: ignore[attr-defined]
    (sample,) = sure_of(model, START, first=2).generate(
        {"chat": "hi"}, max_new_tokens=9, temperature=0.0
    )
    assert sample.text == "zz"
    # A template that refuses any answer, and one that never ends one, name no other end.
    for number, template in enumerate(("{{ raise_exception('no') }}", "{{ messages[0].content }}")):
        model = other(folder, tmp_path / str(number), template=template)
        assert set(model.modality.end_ids) == {END, PAD}  # type: ignore[attr-defined]
        model.generate("hi", max_new_tokens=2)


@pytest.mark.parametrize("stated", [
    {"eos_token_id": "a"}, {"eos_token_id": [True]}, {"eos_token_id": -1}, {"temperature": -1},
    {"temperature": "hot"}, {"max_new_tokens": 0}, {"max_length": 1.5}, {"block_length": 0},
    {"block_size": "4"}, {"steps": []}, {"top_k": -1}, {"top_p": 2}, {"do_sample": "no"},
    {"block_length": 10**20}, {"max_new_tokens": 10**12}, {"max_length": 10**30},
    {"steps": 2**31}, {"top_k": 2**63},
])  # fmt: skip
def test_a_damaged_generation_config_is_refused_by_its_key(
    folder: Path, tmp_path: Path, stated: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=next(iter(stated))) as caught:
        other(folder, tmp_path / "model", **stated)
    assert "generation_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


# Answers as long as they take


@pytest.fixture(scope="module")
def of_blocks(folder: Path) -> Pipeline:
    return load(folder, block_length=4)


def ended_by(pipeline: Pipeline, token: int | None) -> Pipeline:
    """The model with another id that ends a text."""
    medium = copy.copy(pipeline.modality)
    medium.stated_ends = () if token is None else (token,)  # type: ignore[attr-defined]
    return replace(pipeline, modality=medium)


@pytest.mark.parametrize(
    ("index", "sampler"),
    [(0, "confidence"), (9, "confidence"), (6, "first_hitting")],
)
def test_a_chat_of_a_block_model_grows_until_any_end_is_drawn(
    of_blocks: Pipeline, index: int, sampler: str
) -> None:
    asked: Any = {"sampler": sampler, "seed": 5}
    (whole,) = of_blocks.generate({"chat": "hi"}, max_new_tokens=16, end="keep", **asked)
    given = len(of_blocks.modality.canvas({"chat": "hi"}))
    token = whole.tokens[given + index]
    first = whole.tokens.index(token, given)
    model = ended_by(of_blocks, token)
    model = replace(model, window=given + 40)
    pair = model.generate({"chat": "hi"}, num_samples=2, **asked)
    assert pair[0].grow == "blocks"
    # The block in which it is drawn is the last.
    assert pair[0].tokens == whole.tokens[: first // 4 * 4 + 4]
    assert pair[0].calls == len(pair[0].tokens) - given
    assert pair[0].text == model.modality.decode(whole.tokens[given:first])
    (alone,) = model.generate({"chat": "hi"}, sampler=sampler, seed=pair[1].seed)
    assert (alone.tokens, alone.log_prob) == (pair[1].tokens, pair[1].log_prob)


def test_an_answer_that_never_ends_is_as_long_as_it_may_be(of_blocks: Pipeline) -> None:
    asked: Any = {"temperature": 0.0, "sampler": "confidence"}
    model = replace(of_blocks, window=45)
    (sample,) = model.generate({"chat": "hi"}, **asked)
    assert (len(sample.tokens), MASK in sample.tokens) == (45, False)
    given = len(of_blocks.modality.canvas({"chat": "hi"}))
    (sample,) = of_blocks.generate({"chat": "hi"}, max_new_tokens=10, grow="blocks", **asked)
    assert len(sample.tokens) == given + 10
    # A length that is given stays that of the canvas.
    (sample,) = of_blocks.generate({"chat": "hi"}, max_new_tokens=10, **asked)
    assert (len(sample.tokens), sample.grow) == (given + 10, "")


def test_a_canvas_that_grows_is_shown_as_far_as_it_is_written(of_blocks: Pipeline) -> None:
    model = replace(of_blocks, window=2000)
    (run,) = model.runs(model.canvases({"chat": "hi"}, grow=True), echo=False, grow="blocks")
    given = len(model.modality.canvas({"chat": "hi"}))
    assert len(run.canvas[0]) == 2000
    sizes = [len(run.pieces(0)) for _, _ in zip(range(12), run)]
    assert sizes[0] <= given + 4
    assert sizes == sorted(sizes)
    assert sizes[-1] <= given + 16


def by_length(sure: dict[int, float]) -> Any:
    """A denoiser whose probability of END at the last LOOKED_AT positions is that of its length."""

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        p = next(p for length, p in sorted(sure.items(), reverse=True) if tokens.shape[1] >= length)
        found = torch.full((*tokens.shape, COLUMNS), -1e9)
        found[..., 7], found[..., END] = 0.0, -1e9
        found[:, -LOOKED_AT:, END] = torch.tensor(p / (1 - p)).log()
        # What is never drawn has no part in it.
        found[..., MASK] = 99.0
        return found

    return from_logits(logits)


@pytest.mark.parametrize(("sure", "most", "masks", "calls"), [
    ({0: 0.9}, 500, FIRST, 1),
    ({0: 0.1, FIRST + 2 + 3 * ADDED: 0.51}, 500, FIRST + 3 * ADDED, 4),
    ({0: 0.1, FIRST + 2 + 3 * ADDED: 0.49, 200: 0.9}, 500, 200, 18),
    ({0: 0.1}, FIRST + 2 * ADDED + 3, FIRST + 2 * ADDED + 3, 4),
    ({0: 0.1}, 20, 20, 1),
    ({0: 0.1}, 0, 0, 0),
])  # fmt: skip
def test_daedal_adds_masks_until_the_last_ones_are_sure_of_an_end(
    pipeline: Pipeline, sure: dict[int, float], most: int, masks: int, calls: int
) -> None:
    found = daedal(
        by_length(sure), [1, 2], most, space=pipeline.space, ends=(END, PAD),
        device=torch.device("cpu"),
    )  # fmt: skip
    assert found == ([1, 2] + [MASK] * masks, calls)


def test_daedal_is_named_in_the_result_and_its_calls_are_counted(pipeline: Pipeline) -> None:
    given = len(pipeline.modality.canvas({"chat": "hi"}))
    model = replace(pipeline, denoiser=by_length({0: 0.1, given + 80: 0.8}), window=2000)
    asked: Any = {"sampler": "confidence", "steps": 4}
    (sample,) = model.generate({"chat": "hi"}, grow="daedal", **asked)
    assert (sample.grow, len(sample.tokens) - given, sample.calls) == ("daedal", 80, 3 + 4)
    (plain,) = model.generate({"chat": "hi"}, max_new_tokens=80, **asked)
    assert (plain.grow, plain.tokens) == ("", sample.tokens)


@pytest.mark.parametrize(("options", "message"), [
    ({"grow": "bloks"}, "did you mean 'blocks'"),
    ({"grow": "blocks"}, "use grow='daedal'"),
    ({"grow": "daedal", "end": "keep"}, "end='cut'"),
])  # fmt: skip
def test_a_growth_that_cannot_be_is_refused(
    pipeline: Pipeline, of_blocks: Pipeline, options: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline.generate("hi", max_new_tokens=4, **options)
    with pytest.raises(ConfigError, match="use grow='blocks'"):
        of_blocks.generate("hi", max_new_tokens=4, grow="daedal")
    with pytest.raises(ConfigError, match="an id that ends"):
        load("builtin:shakespeare").generate("hi", length=9, grow="daedal")
