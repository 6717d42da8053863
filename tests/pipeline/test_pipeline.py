"""sample, load and the pipeline, on toys and on tiny models made here."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import ROOT
from toys import make_toy
from transformers import BertConfig, BertForMaskedLM

import mdiff
from mdiff.backbones.transformer import transformer
from mdiff.errors import BackendError, CheckpointError, ConfigError, DataError, MdiffError
from mdiff.evaluation.evaluate import evaluate, sample_figures
from mdiff.files.locate import snapshot
from mdiff.modalities.text.modality import text
from mdiff.pipeline.loading import load
from mdiff.pipeline.pipeline import Pipeline
from mdiff.pipeline.scoring import bound_of_rows
from mdiff.sampling import plain_seed, row_seeds
from mdiff.schedule import Cosine, Polynomial
from mdiff.tokens import TokenSpace, Windows, hidden_canvas

TOY = make_toy()
WINDOW = 32


def toy_canvas(rows: int) -> torch.Tensor:
    return hidden_canvas(rows, TOY.length, space=TOY.space)


def tiny(*, eos: bool = False, **options: Any) -> Pipeline:
    torch.manual_seed(0)
    modality = text(eos=eos)
    size = modality.space.vocab_size
    model = transformer(vocab_size=size, width=16, depth=1, heads=2, max_length=WINDOW, **options)
    return Pipeline(model.eval(), modality.space, modality, Polynomial(3.0), WINDOW)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny().save(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# sample


def test_the_figures_of_a_sample_are_those_of_its_draws() -> None:
    drawn = mdiff.sample(TOY.denoiser(), toy_canvas(50), space=TOY.space, seed=3)
    assert drawn.calls.tolist() == [TOY.length] * 50
    # One reveal a call from the ideal denoiser: the chain rule gives the joint itself.
    joint = TOY.joint[tuple(drawn.tokens.T)]
    assert torch.allclose(drawn.log_prob, joint.log())
    assert bool((drawn.entropy > 0).all())
    assert bool((drawn.entropy < math.log(TOY.vocab)).all())


def test_a_canvas_without_masks_comes_back_unchanged() -> None:
    canvas = torch.tensor([[0, 1, 2, 3]])
    drawn = mdiff.sample(TOY.denoiser(), canvas, space=TOY.space)
    assert torch.equal(drawn.tokens, canvas)
    assert drawn.calls.tolist() == [0]
    assert drawn.log_prob.tolist() == drawn.entropy.tolist() == [0.0]


def test_row_seeds_make_each_row_the_same_alone() -> None:
    seeds = torch.tensor([5, 9, 5])
    together = mdiff.sample(TOY.denoiser(), toy_canvas(3), space=TOY.space, seed=seeds)
    for row in range(3):
        alone = mdiff.sample(
            TOY.denoiser(), toy_canvas(1), space=TOY.space, seed=seeds[row : row + 1]
        )
        assert torch.equal(alone.tokens[0], together.tokens[row])
    assert torch.equal(together.tokens[0], together.tokens[2])


def test_generators_only_yield_seeds() -> None:
    def once(seed: Any) -> torch.Tensor:
        return mdiff.sample(TOY.denoiser(), toy_canvas(2), space=TOY.space, seed=seed).tokens

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    assert torch.equal(once(generator(4)), once(generator(4)))
    pair = [generator(4), generator(8)]
    first = once(pair)
    assert torch.equal(first[0], once([generator(4), generator(1)])[0])
    assert plain_seed(pair, 2).tolist() != plain_seed(pair, 2).tolist()
    with pytest.raises(ConfigError, match="one a row"):
        once([generator(4)])
    with pytest.raises(ConfigError, match="expected an int"):
        once("7")


def test_a_denoiser_that_gives_nan_is_named() -> None:
    broken = mdiff.from_logits(lambda tokens: torch.full((*tokens.shape, 4), torch.nan))
    with pytest.raises(MdiffError, match=r"NaN or infinite logits for samples \[0, 1\]"):
        mdiff.sample(broken, toy_canvas(2), space=TOY.space)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "frist_hitting"}, "did you mean 'first_hitting'"),
        ({"per_cal": 2}, "did you mean 'per_call'"),
        ({"per_call": "2"}, "per_call='2': expected int"),
        ({"per_call": True}, "per_call=True: expected int"),
        ({"temperature": None}, "temperature=None: expected float"),
        ({"schedule": "cosinus"}, "did you mean 'cosine'"),
        ({"sampler": "blocks", "inner": "ancestrl"}, "did you mean 'ancestral'"),
        ({"sampler": "blocks", "stepz": 3}, "did you mean 'steps'"),
        ({"sampler": "any_order", "order": [0, "x"]}, "expected whole numbers"),
    ],
)
def test_options_that_a_sampler_does_not_take_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mdiff.sample(TOY.denoiser(), toy_canvas(1), space=TOY.space, **options)


def test_names_and_lists_become_objects_at_the_surface() -> None:
    def tokens(**options: Any) -> torch.Tensor:
        return mdiff.sample(TOY.denoiser(), toy_canvas(8), space=TOY.space, **options).tokens

    assert torch.equal(
        tokens(sampler="ancestral", schedule="cosine", steps=2),
        tokens(sampler="ancestral", schedule=Cosine(), steps=2),
    )
    assert torch.equal(
        tokens(sampler="any-order", order=[3, 2, 1, 0]),
        tokens(sampler="any_order", order="right_to_left"),
    )
    tokens(sampler="blocks", inner="any_order", order="right_to_left", block_length=2)


# Pipeline


def test_a_sample_can_be_had_again_alone_from_its_seed() -> None:
    pipeline = tiny()
    many = pipeline.generate(["a", "bcd"], n=3, seed=11, length=12, batch_size=4)
    assert [len(sample.tokens) for sample in many] == [12] * 6
    assert many[0].seed == 11
    for number, prompt in ((0, "a"), (2, "a"), (5, "bcd")):
        (alone,) = pipeline.generate(prompt, seed=many[number].seed, length=12)
        assert alone.tokens == many[number].tokens
        assert alone.log_prob == pytest.approx(many[number].log_prob, rel=1e-5)


def test_ragged_templates_are_filled_as_if_alone() -> None:
    pipeline = tiny()
    templates = ["a[MASK:3]b", "The [MASK:8] of [MASK:3] night"]
    together = pipeline.infill(templates, seed=2)
    assert [sample.calls for sample in together] == [3, 11]
    for template, sample in zip(templates, together, strict=True):
        (alone,) = pipeline.infill(template, seed=sample.seed)
        assert alone.tokens == sample.tokens
        canvas = pipeline.modality.template(template)
        given = [(a, b) for a, b in zip(canvas, sample.tokens, strict=True) if a != 256]
        assert all(a == b for a, b in given)


def test_a_stream_ends_where_generate_does() -> None:
    pipeline = tiny()
    states = list(pipeline.stream("ab", length=8, n=2, seed=4))
    assert len(states) == 6
    final = [sample.tokens for sample in pipeline.generate("ab", length=8, n=2, seed=4)]
    assert states[-1].tokens.tolist() == final


def test_a_text_longer_than_the_window_needs_blocks() -> None:
    pipeline = tiny()
    with pytest.raises(ConfigError, match="sampler 'blocks'"):
        pipeline.generate(length=3 * WINDOW)
    (sample,) = pipeline.generate(length=3 * WINDOW, sampler="blocks", block_length=8)
    assert len(sample.tokens) == sample.calls == 3 * WINDOW


def test_blocks_stop_at_the_end_of_text() -> None:
    pipeline = tiny(eos=True)
    bias = torch.zeros(257)
    bias[256] = 50.0
    certain = mdiff.from_logits(lambda tokens: bias.expand(*tokens.shape, 257))
    sure = Pipeline(certain, pipeline.space, pipeline.modality, window=WINDOW)
    (sample,) = sure.generate("ab", length=20, sampler="blocks", block_length=4)
    assert sample.calls == 4
    assert sample.output == "ab"


def test_guidance_masks_the_prompt_and_doubles_the_calls() -> None:
    pipeline = tiny()
    plain = pipeline.generate("abcdef", length=10, seed=1)[0]
    same = pipeline.generate("abcdef", length=10, seed=1, guidance_scale=1.0)[0]
    guided = pipeline.generate("abcdef", length=10, seed=1, guidance_scale=4.0)[0]
    assert same.tokens == plain.tokens
    assert (plain.calls, guided.calls) == (4, 8)


@pytest.mark.parametrize("options", [{"n": 0}, {"length": 0}, {"batch_size": 0}, {"length": -3}])
def test_numbers_below_one_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match="need at least 1"):
        tiny().generate("", **options)


def test_generating_text_imports_nothing_of_images_training_or_transformers() -> None:
    script = (
        "import sys, mdiff; mdiff.load('builtin:shakespeare', device='cpu').generate(length=2);"
        "print(*{'PIL', 'transformers', 'datasets', 'sklearn', 'pyarrow', 'accelerate',"
        " 'torch._dynamo', 'rich', 'typer'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == []


def test_an_empty_list_of_prompts_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to generate"):
        tiny().generate([])


def test_the_score_of_a_uniform_model_is_the_log_of_its_ids() -> None:
    uniform = mdiff.from_logits(lambda tokens: torch.zeros(*tokens.shape, 256))
    pipeline = Pipeline(uniform, text().space, text(), window=8)
    texts = ["hello", "x" * 30, ""]
    bound = pipeline.score(texts, draws=4)
    expected = [len(written) * math.log(256) for written in texts]
    assert bound.nats.tolist() == pytest.approx(expected)
    found = evaluate(pipeline, ["héllo", "x" * 30], draws=2)
    assert found.windows == 1 + 4
    assert found.bits_per("byte")[0] == pytest.approx(8)
    assert found.bits_per("char")[0] == pytest.approx(8 * 36 / 35)
    keys = {"bits_per_token", "bits_per_char_stderr", "estimator", "draws", "windows", "bytes"}
    assert keys <= set(found.as_dict())


def test_the_score_is_the_exact_bound_on_a_toy() -> None:
    pipeline = Pipeline(TOY.denoiser(), TOY.space, None)
    tokens = [[0, 1, 2, 3], [3, 3, 0, 1]]
    rows = Windows(tokens, [0, 1], TOY.space)
    exact = bound_of_rows(pipeline, rows, estimator="exact")
    rough = bound_of_rows(pipeline, rows, draws=300)
    assert torch.allclose(exact.nats, -TOY.joint[tuple(torch.tensor(tokens).T)].log())
    # Six standard errors: one false alarm in 5e8.
    assert bool(((rough.nats - exact.nats).abs() < 6 * rough.stderr).all())


@pytest.mark.parametrize("estimator", ["any_order", "time"])
def test_neither_the_batch_nor_the_rows_beside_it_changes_a_bound(estimator: str) -> None:
    pipeline = tiny()
    texts = ["abcdefgh" * 5, "hello", "the quick brown fox"]
    options = {"estimator": estimator, "draws": 3, "seed": 5}
    whole, one = (pipeline.score(texts, batch_size=size, **options) for size in (32, 1))
    assert torch.allclose(whole.nats, one.nats, rtol=1e-5)
    assert torch.allclose(whole.stderr, one.stderr, rtol=1e-4)
    first = pipeline.score(texts[:1], **options)
    assert torch.allclose(first.nats, whole.nats[:1], rtol=1e-5)
    assert not torch.allclose(pipeline.score(texts, **options | {"seed": 6}).nats, whole.nats)
    evaluations = [evaluate(pipeline, texts, batch_size=size, **options) for size in (2, 5)]
    assert evaluations[0].nats == pytest.approx(evaluations[1].nats, rel=1e-5)
    # A byte tokenizer ends no document: evaluation and scores are of the same windows.
    assert evaluations[0].nats == pytest.approx(float(whole.nats.sum()), rel=1e-5)


def test_the_figures_of_samples_count_what_differs() -> None:
    pipeline = tiny()
    samples = pipeline.generate("", n=2, length=4, seed=0)
    figures = sample_figures(samples)
    tokens = [sample.tokens for sample in samples]
    assert figures["calls"] == 4
    assert figures["distinct_1"] == len({*tokens[0], *tokens[1]}) / 8
    assert figures["distinct_3"] == 1.0


# load


def test_a_saved_pipeline_comes_back(saved: Path) -> None:
    first, again = tiny(), load(saved)
    assert (again.space, again.schedule, again.window) == (first.space, Polynomial(3.0), WINDOW)
    assert again.generate("x", seed=3)[0].tokens == first.generate("x", seed=3)[0].tokens
    assert load(saved, dtype="bfloat16").denoiser.dtype == torch.bfloat16  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="exists already"):
        first.save(saved)


def test_a_run_directory_gives_its_latest_complete_step(saved: Path, tmp_path: Path) -> None:
    for step in ("step-000002", "step-000010", "step-000030"):
        shutil.copytree(saved, tmp_path / step)
    (tmp_path / "step-000030" / "config.json").unlink()
    from mdiff.files.locate import locate

    assert locate(str(tmp_path)).folder.name == "step-000010"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", lambda raw: raw[:-40], "model.safetensors has"),
        ("model.safetensors", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "was altered"),
        ("config.json", lambda raw: raw.replace(b"16", b"17"), "config.json"),
        ("pipeline.json", lambda raw: raw + b" ", "pipeline.json"),
        ("manifest.json", lambda raw: b"{}", "manifest.json"),
        ("manifest.json", lambda raw: raw.replace(b"config.json", b"../onfig.json"), "onfig"),
        ("extra.bin", lambda raw: b"\x80\x02", "not in the manifest"),
    ],
)
def test_an_altered_checkpoint_is_refused(
    copied: Path, file: str, change: Any, message: str
) -> None:
    path = copied / file
    path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    with pytest.raises(CheckpointError, match=message):
        load(copied)


def remade(folder: Path, change: Any) -> None:
    """Change pipeline.json and make the manifest agree, as one who forges would."""
    from mdiff.files.atomic import staged

    described = json.loads((folder / "pipeline.json").read_text())
    change(described)
    (folder / "pipeline.json").write_text(json.dumps(described))
    (folder / "manifest.json").unlink()
    aside = folder.rename(folder.with_name("aside"))
    with staged(folder) as inner:
        shutil.copytree(aside, inner, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda d: d.update(backbone="os:system"), CheckpointError, "not a part of mdiff"),
        (lambda d: d["modality"].update(name="os:getcwd"), CheckpointError, "not a part"),
        (lambda d: d["modality"].update(eos=True), DataError, "257 ids, the model 256"),
        (lambda d: d["modality"].update(color=1), CheckpointError, "color"),
        (lambda d: d["space"].update(vocab_size=0), CheckpointError, "vocab_size=0"),
        (lambda d: d["schedule"].update(name="linea"), CheckpointError, "did you mean 'linear'"),
        (lambda d: d.update(format=9), CheckpointError, "expected format 1"),
        (lambda d: d.update(length="long"), CheckpointError, "length='long'"),
        (lambda d: d.pop("space"), CheckpointError, "space"),
    ],
)
def test_an_invalid_description_is_refused(
    copied: Path, change: Any, kind: type[Exception], message: str
) -> None:
    remade(copied, change)
    with pytest.raises(kind, match=message):
        load(copied)


def test_an_index_that_leaves_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"outside\.safetensors"):
        load(tmp_path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        load(tmp_path)


def bert(folder: Path, *, tokenizer: bool) -> Path:
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "moon", "##s"]
    config = BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    if tokenizer:
        (folder / "vocab.txt").write_text("\n".join(words))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


def test_any_hugging_face_masked_language_model_loads(tmp_path: Path) -> None:
    pipeline = load(bert(tmp_path, tokenizer=True))
    assert pipeline.space == TokenSpace(8, mask_id=4)
    assert pipeline.window == 32
    (sample,) = pipeline.generate("the moons", length=6)
    assert sample.tokens[:3] == [5, 6, 7]
    assert 4 not in sample.tokens
    assert str(sample).startswith("the moons")


def test_without_a_tokenizer_the_modality_is_plain_ids(tmp_path: Path) -> None:
    bert(tmp_path, tokenizer=False)
    with pytest.raises(ConfigError, match="give mask_id="):
        load(tmp_path)
    pipeline = load(tmp_path, mask_id=4)
    (sample,) = pipeline.generate([[5, 6]], length=4)
    assert sample.tokens[:2] == [5, 6]
    assert pipeline.infill("7 _ _ 5")[0].output.startswith("7 ")
    with pytest.raises(DataError, match="token ids"):
        pipeline.generate("moon", length=3)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    bert(tmp_path, tokenizer=True)
    with (tmp_path / "vocab.txt").open("a") as file:
        file.write("\nsun\nstar")
    with pytest.raises(DataError, match="the tokenizer has 10 ids, the model 8"):
        load(tmp_path)


def test_a_model_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(bert(tmp_path, tokenizer=True) / "model.safetensors")
    weights.pop("bert.embeddings.word_embeddings.weight")
    weights.pop("cls.predictions.decoder.weight", None)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing keys"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("builtin:nothing", ConfigError, "no builtin model"),
        ("./nowhere", CheckpointError, "no such directory"),
        ("/no/where", CheckpointError, "no such directory"),
        ("a b", CheckpointError, "no such directory"),
    ],
)
def test_a_name_that_is_no_model_says_what_was_expected(
    name: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        load(name)


def test_options_of_load_are_checked(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'float32'"):
        load(saved, dtype="flaot32")
    with pytest.raises(ConfigError, match="unknown device"):
        load(saved, device="gpuu")
    with pytest.raises(ConfigError, match="not a block model"):
        load(saved, block_length=4)
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no CUDA device"):
            load(saved, device="cuda")
    with pytest.raises(CheckpointError, match="is a file"):
        load(saved / "config.json")
    with pytest.raises(CheckpointError, match="holds no model"):
        load(tmp_path)


def test_the_hub_out_of_reach_is_a_backend_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(BackendError, match="cannot be reached: no route"):
        load("someone/something")


def test_a_snapshot_of_the_hub_is_checked_through_its_links(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    folder.mkdir(parents=True)
    shutil.copytree(saved, blobs)
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    assert load("someone/something").window == WINDOW
    weights = blobs / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="not the file that the manifest lists"):
        snapshot(folder)
    weights.rename(tmp_path.parent / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path.parent / "outside.safetensors")
    with pytest.raises(CheckpointError, match="link that leaves"):
        snapshot(folder)


def test_seeds_of_rows_are_the_seed_then_others() -> None:
    seeds = row_seeds(7, 100).tolist()
    assert seeds[0] == 7
    assert len(set(seeds)) == 100
    assert row_seeds(7, 3).tolist() == seeds[:3]


def test_a_hub_id_may_name_a_revision(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_of(name: str, *, revision: str | None, **_: Any) -> str:
        asked.append((name, revision))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_of)
    load("someone/something@v1.0")
    load("someone/something")
    assert asked == [("someone/something", "v1.0"), ("someone/something", None)]
