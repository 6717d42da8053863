"""Options that would have no effect are refused and say what to do; and any list of arguments."""

from __future__ import annotations

import functools
import inspect
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from folders import GOLDEN, ROOT
from PIL import Image

from mdiff.cli import app, run
from mdiff.cli.rules import RULES, flag
from mdiff.pipeline.loading import load
from mdiff.pipeline.pipeline import Pipeline

AMUSED = str(GOLDEN / "amused")
EMOJI, FASHION, TEXT = "builtin:emoji", "builtin:fashion", "builtin:shakespeare"
QUICK = ["--sampler", "halton", "--steps", "1"]
# Options that have an effect whatever the others are, by command; a new one goes here or in a rule.
ALWAYS = {
    "demo": "model pictures seed", "inspect": "model fits as_json", "models": "as_json",
    "chat": "model system messages max_new_tokens drop_oldest sampler steps temperature threshold "
    "block_length grow option seed device dtype mask_id tokenizer special_tokens",
    "train": "recipe out overrides resume",
    "sweep": "recipe grid out overrides seeds fit workers timeout engine address shard as_json",
    "convert": "source out family config ema codec as_json",
    "generate": "model prompt input_file num_samples sampler steps temperature threshold "
    "edit_threshold eta nats drafts block_length order option guidance_scale end seed batch_size "
    "device dtype mask_id special_tokens as_json",
    "edit": "model pictures mask mask_file keep strength resize prompt label num_samples out "
    "sampler steps temperature threshold edit_threshold eta nats drafts option guidance_scale seed "
    "batch_size device dtype as_json",
    "revise": "model file keep strength steps rounds sampler temperature threshold edit_threshold "
    "eta nats drafts option guidance_scale seed batch_size num_samples device dtype mask_id "
    "tokenizer special_tokens as_json",
    "eval": "model data metrics split limit seed batch_size device dtype mask_id tokenizer "
    "special_tokens as_json",
}  # fmt: skip
by_name = functools.cache(load)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures of both models and requests; each model is loaded once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "mdiff.pipeline.load",
        lambda m, **k: by_name(m, **k) if isinstance(m, str) else load(m, **k),
    )
    random_pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(random_pixels).save("face.png")
    Image.new("L", (28, 28)).save("shirt.png")
    Path("in.jsonl").write_text('{"prompt": ""}\n')
    Path("doc.txt").write_text("hello world " * 9)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", EMOJI, *QUICK, "--guidance-scale", "3"], "without a condition"),
        (["edit", EMOJI, "face.png", *QUICK, "--mask", "0:32,0:32", "--guidance-scale", "3"],
         "without a condition"),
        (["generate", TEXT, "--length", "8", "--guidance-scale", "3"], "give a prompt"),
        (["generate", AMUSED, "--guidance-scale", "3"], "give --prompt"),
        (["generate", TEXT, "--prompt", "a", "--guidance-scale", "1", "--negative-prompt", "b"],
         "--negative-prompt has no effect at --guidance-scale 1"),
        (["generate", TEXT, "--prompt", "a", "--negative-prompt", "b"], "give --guidance-scale"),
        (["generate", FASHION, "--label", "bag", "--guidance-scale", "1", "--guidance-schedule",
          "linear"], "--guidance-schedule has no effect"),
        (["generate", TEXT, "--temperature", "0", "--top-k", "3"], "--top-k has no effect"),
        (["generate", TEXT, "--temperature", "0", "-o", "top_k=3"], "--top-k has no effect"),
        (["edit", EMOJI, "face.png", "--temperature", "0", "--min-p", "0.1"], "--min-p has no"),
        (["generate", FASHION, "--trace", "x.mp4"], "x.mp4: expected a name that ends in .html"),
        (["generate", TEXT, "--trace", "x.png"], "expected a name that ends in .html"),
        (["edit", EMOJI, "face.png", "--trace", "x"], "expected a name that ends in .html"),
        (["generate", FASHION, "--trace", "./x.gif", "--out", "x.gif"], "the same file"),
        (["generate", TEXT, "--trace", "x.gif"], "a GIF shows pictures"),
        (["generate", FASHION, "--resize"], "by --image or --input"),
        (["generate", FASHION, "--scale-up", "2", "--out", "new"], "name a .png"),
        (["edit", EMOJI, "face.png", "--scale-up", "2", "--out", "new"], "name a .png"),
        (["generate", EMOJI, "--image", "face.png", "--scale-up", "2"], "name a .png"),
        (["generate", FASHION, "--length", "8"], "--length is for models of text"),
        (["generate", FASHION, "--stream"], "--stream is for models of text"),
        (["generate", TEXT, "--label", "bag"], "--label is for models of pictures"),
        (["generate", TEXT, "--stream", "--json"], "--stream does not go with --json"),
        (["generate", TEXT, "--stream", "--input", "in.jsonl"], "--stream does not go with"),
        (["generate", TEXT, "--steps", "4"], "first_hitting does not take 'steps'; .*halton"),
        (["generate", TEXT, "-o", "seed=4"], "use --seed"),
        (["generate", TEXT, "-o", "sampler=halton"], "use --sampler"),
        (["edit", EMOJI, "face.png", "-o", "batch_size=4"], "use --batch-size"),
        (["generate", TEXT, *QUICK, "-o", "steps=2"], "steps: given by its flag too"),
        (["generate", TEXT, "--negative-prompt", "a", "-o", "negative_prompt=b", "-o",
          "guidance_scale=2"], "negative_prompt: given by its flag too"),
        (["generate", TEXT, "--guidance-scale", "2", "-o", "guidance_scale=3"],
         "guidance_scale: given by its flag too"),
        (["generate", TEXT, "-o", "per_call=2", "-o", "per_call=3"], "given twice"),
        (["generate", EMOJI, "--prompt", "caf\udce9"], "not valid Unicode"),
        (["generate", AMUSED, "--prompt", "a", "--prompt", "caf\udce9"], "not valid Unicode"),
        (["edit", EMOJI, "face.png", "--prompt", "\udce9"], "not valid Unicode"),
        (["generate", AMUSED, "--prompt", "a", "--guidance-scale", "2", "--negative-prompt",
          "\udce9"], "--negative-prompt: character 0"),
        (["generate", FASHION, "--label", "\udce9"], "--label: character 0"),
        (["generate", TEXT, "--num-samples", "1000000000"], "at most 1,000,000"),
        (["generate", TEXT, "--length", "1" + "0" * 30], "--length"),
        (["generate", TEXT, "--seed", "1" + "0" * 30], "64-bit"),
        (["generate", TEXT, "--top-p", "nan"], "top_p=nan"),
        (["generate", FASHION, "--label", "bag", "--guidance-scale", "nan"], "finite"),
        (["eval", TEXT, "--data", "doc.txt", "--classifier", "x"], "--classifier"),
        (["eval", TEXT, "--data", "doc.txt", "--hub-split", "test"], "data sets of the Hub"),
        (["generate", FASHION, "--special-tokens", "drawn"], "a model of image has none"),
        (["eval", TEXT, "--data", "doc.txt", "--captions", "data"], "--captions is for models of"),
        (["eval", TEXT, "--data", "doc.txt", "--samples", "0", "--steps", "3"], "--samples 0"),
        (["eval", TEXT, "--data", "doc.txt", "--guidance-scale", "3"], "without a prompt"),
        (["eval", TEXT, "--data", "doc.txt", "--holdout", "0.2"], "--split"),
        (["eval", FASHION, "--data", "shirt.png", "--field", "x"], "--field is for models of text"),
        (["eval", FASHION, "--data", "shirt.png", "--samples", "9"], "a metric of samples"),
        (["eval", FASHION, "--data", "shirt.png", "--layer", "2"], "--metrics probe"),
        (["eval", FASHION, "--data", "shirt.png", "--mask-ratio", "inf"], "mask_ratio=inf"),
        (["tokenizer", "train", "doc.txt", "--out", "t", "--kind", "char", "--vocab-size", "9"],
         "--vocab-size is for --kind bpe"),
        (["tokenizer", "train", "shirt.png", "--out", "t", "--kind", "kmeans", "--seed",
          str(2**70)], "64-bit"),
        (["tokenizer", "train", "shirt.png", "--out", "t", "--kind", "kmeans", "--steps", "5"],
         "'kmeans' does not take 'steps'"),
        (["tokenizer", "inspect", "byte", "--size", "8x8"], "--size"),
        (["convert", "x.safetensors", "out", "--from-pickle"], "--from-pickle is for pickles"),
        (["demo", "--out", "x.png"], "ends in .html"),
        (["generate", FASHION, "--grow", "daedal"], "--grow is for models of text"),
        (["generate", TEXT, "-o", "grow=daedal"], "use --grow"),
        (["generate", TEXT, "--grow", "daedal", "--input", "in.jsonl", "--out", "new"],
         "--grow does not go with"),
        (["sweep", "x.yaml", "--out", "x", "--grid", "optim.lr=1", "--samples", "3"],
         "--samples needs an option of sampling"),
    ],
)  # fmt: skip
def test_an_option_without_an_effect_is_refused_and_says_what_to_do(
    words: list[str], said: str, capsys: Any
) -> None:
    import re

    before = sorted(Path().iterdir())
    assert run(words) == 2
    caught = capsys.readouterr()
    assert re.search(said, caught.err), caught.err
    assert caught.err.startswith("error: ")
    assert caught.err.count("\n") == 1
    assert caught.out == ""
    assert sorted(Path().iterdir()) == before


def commands() -> dict[str, Any]:
    line: Any = typer.main.get_command(app())
    found = dict(line.commands)
    del found["tokenizer"]
    return found


def test_every_option_always_has_an_effect_or_has_a_rule() -> None:
    for name, always in ALWAYS.items():
        ruled = " ".join(rule.options for rule in RULES if name in rule.commands.split())
        options = {parameter.name for parameter in commands()[name].params} - {"help"}
        assert options == {*always.split(), *ruled.split()}, name


@pytest.mark.parametrize("method", ["runs", "revisions", "edit_runs"])
def test_what_a_method_of_a_pipeline_takes_is_no_option_of_a_sampler(
    method: str, capsys: Any
) -> None:
    words = {
        "runs": ["generate", TEXT, "--length", "8"], "revisions": ["revise", TEXT, "doc.txt"],
        "edit_runs": ["edit", EMOJI, "face.png"],
    }[method]  # fmt: skip
    names = inspect.signature(getattr(Pipeline, method)).parameters
    assert len(names) > 2
    for name in [*names, "given", "prompts", "return_dict", "__class__"]:
        assert run([*words, "-o", f"{name}=1"]) == 2, name
        caught = capsys.readouterr()
        assert caught.err.count("\n") == 1, caught.err
        assert caught.err.startswith("error: ")


def test_rules_name_flags_that_exist() -> None:
    for name, command in commands().items():
        flags = {opt for parameter in command.params for opt in parameter.opts}
        for rule in RULES:
            if name in rule.commands.split():
                wrong = [each for each in rule.options.split() if flag(each) not in flags]
                assert not wrong, (name, wrong)


def test_one_picture_is_written_at_its_size_and_may_be_edited() -> None:
    for model, side in ((FASHION, 28), (EMOJI, 32)):
        assert run(["generate", model, "--n", "1", "--out", "one.png", *QUICK]) == 0
        with Image.open("one.png") as opened:
            assert opened.size == (side, side)
        assert run(["edit", model, "one.png", "--mask", "0:8,0:8", "--out", "two.png", *QUICK]) == 0
        kept = [np.asarray(Image.open(each))[8:] for each in ("one.png", "two.png")]
        assert (kept[0] == kept[1]).all()


@pytest.mark.parametrize(("strength", "same"), [("0", True), ("0.001", True), ("0.2", False)])
def test_an_edit_says_what_its_strength_changes(strength: str, same: bool, capsys: Any) -> None:
    words = ["edit", EMOJI, "face.png", "--strength", strength, "--prompt", "a", *QUICK]
    assert run([*words, "--out", "made.png"]) == 0
    pair = [np.asarray(Image.open(each)) for each in ("face.png", "made.png")]
    assert bool((pair[0] == pair[1]).all()) is same
    said = capsys.readouterr().err
    assert ("stays as it was" in said) is same
    assert f"strength {float(strength)} regenerates" in said


def test_an_empty_prompt_of_a_file_is_none_as_by_its_flag(capsys: Any) -> None:
    outputs = []
    for words in (["--prompt", ""], ["--input", "in.jsonl"], []):
        assert run(["generate", EMOJI, *words, "--json", "--out", "x.png", *QUICK]) == 0
        outputs.append(capsys.readouterr().out.split('"seconds"')[0])
    assert len(set(outputs)) == 1


def test_a_request_that_is_half_a_character_is_an_error_of_data(capsys: Any) -> None:
    Path("half.jsonl").write_text('{"prompt": "a\\ud800"}\n')
    assert run(["generate", EMOJI, "--input", "half.jsonl", *QUICK]) == 3
    assert "not valid Unicode" in capsys.readouterr().err


def test_the_folder_of_a_codec_is_said_to_be_one(capsys: Any) -> None:
    assert run(["generate", str(GOLDEN / "vqgan_taming")]) == 4
    assert "is a codec, not a model: see mdiff tokenizer" in capsys.readouterr().err
    Path("own").mkdir()
    Path("own/codec.json").write_text('{"name": "levels", "channels": 1, "levels": 256}')
    assert run(["generate", "own"]) == 4
    assert "is a codec, not a model: see mdiff tokenizer" in capsys.readouterr().err
    Path("other").mkdir()
    Path("other/config.json").write_text('{"tokenizer_type": "vq"}')
    assert run(["tokenizer", "inspect", "other"]) == 4
    said = capsys.readouterr().err
    assert "no codec known here has the keys" in said
    assert "backend tokenizer" not in said
    Path("none").mkdir()
    assert run(["tokenizer", "inspect", "none"]) == 4
    assert "none/codec.json is missing" in capsys.readouterr().err


def test_what_is_missing_of_a_text_encoders_tokenizer_is_named(here: Path, capsys: Any) -> None:
    shutil.copytree(GOLDEN / "amused", here / "am")
    for name in ("tokenizer.json", "merges.txt"):
        (here / "am" / "tokenizer" / name).unlink()
    assert run(["generate", "am", "--prompt", "x"]) == 4
    assert "lacks tokenizer.json or vocab.json and merges.txt" in capsys.readouterr().err
    shutil.rmtree(here / "am" / "tokenizer")
    assert run(["generate", "am", "--prompt", "x"]) == 4
    assert "am/tokenizer/ is missing" in capsys.readouterr().err


def test_commands_of_the_documentation_are_not_refused() -> None:
    """Every line of generate and edit in the pages passes the rules that need no model."""
    import shlex

    from mdiff.errors import MdiffError

    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = [
        line.strip().split("  #")[0].removesuffix("\\")
        for page in pages
        for line in page.read_text().splitlines()
        if line.strip().startswith(("mdiff generate ", "mdiff edit "))
    ]
    assert len(lines) > 8
    for line in lines:
        words = shlex.split(line)[1:]
        found = commands()[words[0]]
        context = found.make_context(words[0], words[1:])
        found.callback = None
        try:
            found.invoke(context)
        except MdiffError as error:
            pytest.fail(f"{line}: {error}")


# Any list of arguments.

VALUES = ("0", "1", "-1", "2", "0.5", "nan", "inf", "-inf", "1e308", "1000000000", "a", "", "é",
          "caf\udce9", "x.gif", "x.html", "x.png", "new", "face.png", "shirt.png", "in.jsonl",
          "doc.txt", "0:4,0:4", "4:4,0:4", "0.2,0.8", "halton", "confidence", "blocks", "ancestral",
          "linear", "interval", "keep", "bag", "[MASK:2]", "steps=2", "seed=1", "noise=1",
          str(2**63), str(2**70), "1" + "0" * 400, "--", "-o")  # fmt: skip
TYPICAL = {
    "--steps": ("1", "2", "1000000000"), "--sampler": ("halton", "confidence"), "--n": ("1", "2"),
    "--out": ("a.png", "b", "x.gif"), "--trace": ("x.gif", "x.html", "x.mp4"), "--label": ("bag",),
    "--mask": ("0:4,0:4",), "--length": ("4", "8"), "--strength": ("0", "0.1", "1", "nan"),
    "--guidance-scale": ("2", "1", "0", "-1"), "--prompt": ("a", ""), "--scale-up": ("2", "0"),
    "--input": ("in.jsonl",), "--temperature": ("0", "1"), "-o": ("steps=1", "roll=true"),
}  # fmt: skip
FLAGS = ("--json", "--resize", "--stream")


def drawn(rng: random.Random) -> list[str]:
    """A list of arguments of generate or edit, quick where it is valid."""
    command = rng.choice(("generate", "generate", "edit"))
    model = rng.choice((EMOJI, FASHION, TEXT, AMUSED))
    words = [command, model]
    if command == "edit":
        words.append("shirt.png" if model == FASHION else "face.png")
    options = sorted(o for p in commands()[command].params for o in p.opts if o.startswith("-"))
    options = [o for o in options if o not in ("--device", "--workers", "--help", "--timeout")]
    if model != AMUSED:
        words += QUICK
    if model == TEXT:
        words += ["--length", "6"]
    for _ in range(rng.randint(1, 4)):
        option = rng.choice(options)
        words.append(option)
        if option not in FLAGS:
            typical = rng.random() < 0.6 and option in TYPICAL
            words.append(rng.choice(TYPICAL[option] if typical else VALUES))
    return words


def check_any(seed: int, capsys: Any) -> int:
    words = drawn(random.Random(seed))
    code = run(words)
    caught = capsys.readouterr()
    assert code in (0, 2, 3, 4, 5, 6), (words, code, caught.err)
    assert "Traceback" not in caught.err, words
    errors = [line for line in caught.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code != 0), (words, caught.err)
    return code


def test_a_few_lists_of_arguments_end_as_documented(capsys: Any) -> None:
    for seed in range(40):
        check_any(seed, capsys)


@pytest.mark.slow
def test_any_list_of_arguments_ends_as_documented(capsys: Any) -> None:
    codes = [check_any(seed, capsys) for seed in range(100, 2100)]
    assert 0.05 < codes.count(0) / len(codes) < 0.9
