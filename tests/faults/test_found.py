"""What people who tried to break things found: each stays mended."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import processes
import psutil
import pytest
import torch
from folders import ACCELERATE
from PIL import Image
from safetensors.torch import save_file
from toy_training import QUIET, launched, recipe, same, tensors, wait_for_line
from transformers import BertConfig, BertForMaskedLM

import mdiff.files.atomic as checkpoint
import mdiff.modalities.text.documents as sources
import mdiff.pipeline.batch.offline as offline
import mdiff.training.loop as training
from mdiff.backbones.transformer import transformer
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.files.atomic import latest, locked, step_path, steps, verify
from mdiff.modalities.image.codecs.kmeans import kmeans
from mdiff.modalities.image.data.images import Pictures, read_pictures
from mdiff.modalities.image.data.token_shards import open_shards
from mdiff.modalities.text.documents import read_bytes
from mdiff.modalities.text.modality import text
from mdiff.pipeline.batch.division import Division
from mdiff.pipeline.batch.encoding import write_shards
from mdiff.pipeline.batch.offline import RequestShard
from mdiff.pipeline.batch.plan import Setting
from mdiff.pipeline.batch.requests import read_requests
from mdiff.pipeline.loading import load
from mdiff.pipeline.pipeline import Pipeline
from mdiff.training.loop import train

ALONE = Division(workers=1)


def pictures(count=12, seed=1):
    random_ = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=random_, dtype=torch.uint8)
    return Pictures(pixels=pixels, names=[str(number) for number in range(count)])


def bert(folder, **changed):
    """A small model of two layers, whose settings then say something else."""
    torch.manual_seed(0)
    settings = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                          intermediate_size=16, max_position_embeddings=16)  # fmt: skip
    BertForMaskedLM(settings).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    return str(folder)


def test_workers_load_the_step_that_was_planned(tmp_path, monkeypatch):
    modality = text()
    denoiser = transformer(vocab_size=256, width=8, depth=1, heads=2, max_length=16).eval()
    pipeline = Pipeline(denoiser, modality.space, modality, window=16)
    pipeline.save(step_path(tmp_path / "run", 5))
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "length": 4}\n')
    makers = []

    def later_step(shards, make, maker, division, **options):
        pipeline.save(step_path(tmp_path / "run", 9))
        makers.append(maker)
        return 0

    monkeypatch.setattr(offline, "make_all", later_step)
    offline.generate_offline(
        pipeline, tmp_path / "in.jsonl", tmp_path / "out", model=str(tmp_path / "run"),
        setting=Setting(), division=Division(workers=2),
    )  # fmt: skip
    assert Path(makers[0].model) == step_path(tmp_path / "run", 5)


def test_an_altered_shard_is_made_again_not_made_official(tmp_path):
    codec = kmeans(codebook_size=8).fit(pictures().pixels)
    write_shards(pictures(), tmp_path / "out", codec=codec, rows=4, division=ALONE)
    path = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match="altered"):
        open_shards(tmp_path / "out")
    done = write_shards(pictures(), tmp_path / "out", codec=codec, rows=4, division=ALONE)
    assert (done.made, done.kept) == (1, 2)
    assert path.read_bytes() == whole
    open_shards(tmp_path / "out")


def test_somebody_elses_tensors_are_not_written_over_and_other_pictures_are_reported(tmp_path):
    codec = kmeans(codebook_size=8).fit(pictures().pixels)
    for name in ("shard-000000.safetensors", "shard-model.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        save_file({"w": torch.zeros(2)}, folder / name)
        with pytest.raises(ConfigError, match="name a new folder"):
            write_shards(pictures(), folder, codec=codec, rows=4, division=ALONE)
        assert (folder / name).exists()
    write_shards(pictures(), tmp_path / "out", codec=codec, rows=4, division=ALONE)
    lines = []
    other = pictures(4, seed=2)
    write_shards(
        other,
        tmp_path / "out",
        codec=codec,
        rows=4,
        division=ALONE,
        report=lines.append,
    )
    assert lines[0].startswith("3 shards of other pictures")
    assert len(open_shards(tmp_path / "out")) == 4


@pytest.mark.parametrize("layers", [0, 1, -1])
def test_layers_that_the_settings_leave_out_are_not_ignored(tmp_path, layers):
    with pytest.raises(CheckpointError, match=r"leaves out layers|num_hidden_layers=-1"):
        load(bert(tmp_path, num_hidden_layers=layers), mask_id=3)


def test_absurd_layers_are_refused_before_they_are_built(tmp_path):
    began = time.process_time()
    with pytest.raises(CheckpointError, match="num_hidden_layers=3000000: the files hold"):
        load(bert(tmp_path / "bert", num_hidden_layers=3_000_000), mask_id=3)
    ours = transformer(vocab_size=8, width=8, depth=1, heads=2)
    ours.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {"depth": 100_000}))
    with pytest.raises(CheckpointError, match="depth=100000"):
        load(str(tmp_path / "ours"), mask_id=8)
    assert time.process_time() - began < 10


def test_settings_do_not_fetch_code(tmp_path):
    with pytest.raises(CheckpointError, match="attn_implementation"):
        load(bert(tmp_path, attn_implementation="kernels-community/flash-attn"), mask_id=3)


def test_a_failed_save_is_reported_whatever_ends_the_steps(tmp_path, monkeypatch):
    def refuse(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "write_checkpoint", refuse)
    settings = {"data__poison": 13, "save_every": 1, "data__ragged": False, "steps": 40}
    with pytest.raises(OSError, match="No space"):
        train(recipe(**settings), tmp_path, **QUIET)


def test_a_request_with_half_a_character_for_an_id_fails_alone():
    lines = b'{"id": "\\ud800", "prompt": "a"}\n{"id": "b", "prompt": "c"}\n'
    requests, failures = read_requests(lines)
    assert [request.id for request in requests] == ["b"]
    assert [failure.line for failure in failures] == [1]


@pytest.mark.parametrize("row", [{"caption": "\ud800"}, {"label": "\ud800"}])
def test_a_picture_with_half_a_character_in_its_words_is_a_problem_of_its_own(tmp_path, row):
    words = {"caption": "fine", "label": "a"}
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    rows = [{"file_name": "a.png", **words, **row}, {"file_name": "b.png", **words}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"source": str(tmp_path), "captions": "data"}
    found = read_pictures(source, channels=3, strict=False)
    assert found.names == ["b.png"]
    assert len(found.problems) == 1
    (tmp_path / "metadata.jsonl").unlink()
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    assert len(read_pictures(str(tmp_path), channels=3, strict=False).problems) == 1


LAUNCHER = "import subprocess, sys; subprocess.run(sys.argv[1:], start_new_session=True)"


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([], marks=pytest.mark.slow),
        # What torch's launcher does for each of its processes.
        [sys.executable, "-c", LAUNCHER, sys.executable],
        pytest.param(processes.launcher(ACCELERATE / "cpu.yaml"), marks=pytest.mark.slow),
    ],
    ids=["trainer", "launcher", "accelerate"],
)
def test_all_processes_end_with_a_trainer_or_launcher_that_is_killed(tmp_path, launcher):
    settings = {"steps": 10**6, "save_every": 10**6, "workers": 2, "log__every": 1}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if launcher:
        environment["TORCHELASTIC_RUN_ID"] = "none"
    with launched(tmp_path / "run", settings, *launcher, env=environment) as process:
        wait_for_line(process, "step 2/")
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3
        process.kill()
        assert psutil.wait_procs(family, timeout=20)[1] == []


def test_a_step_that_is_a_link_or_a_file_ends_no_run(tmp_path):
    out = tmp_path / "run"
    train(recipe(steps=2, save_every=1, keep=None), out, **QUIET)
    elsewhere = step_path(out, 1).rename(tmp_path / "elsewhere")
    step_path(out, 1).symlink_to(elsewhere)
    (out / "step-000000").write_text("a note")
    train(recipe(steps=4, save_every=1, keep=1), out, **QUIET)
    assert steps(out) == [4]
    verify(elsewhere)
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "log.jsonl", "step-000000", "step-000004",
    ]  # fmt: skip


def test_an_altered_checkpoint_says_how_to_go_on(tmp_path):
    whole = train(recipe(), tmp_path / "whole", **QUIET)
    train(recipe(), tmp_path / "run", **QUIET)
    weights = latest(tmp_path / "run") / "training.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"move .* out of its run, and --resume auto"):
        train(recipe(), tmp_path / "run", **QUIET)
    latest(tmp_path / "run").rename(tmp_path / "aside")
    assert same(tensors(whole), tensors(train(recipe(), tmp_path / "run", **QUIET)))


def test_a_save_leaves_the_mask_of_new_files_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("another thread makes files now"))
    with checkpoint.staged(tmp_path / "x") as folder:
        (folder / "a").write_text("a")
    checkpoint.replace_file(tmp_path / "y", [b"b"])


def test_a_device_without_an_end_is_not_read_to_it(monkeypatch):
    monkeypatch.setattr(sources, "MOST_OF_A_PIPE", 2**20)
    with pytest.raises(DataError, match="/dev/zero is no file, and gives more than"):
        read_bytes(Path("/dev/zero"))


def test_a_lock_that_is_a_directory_is_an_obstacle_that_is_named(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ConfigError, match=r"\.lock is not a plain file"), locked(tmp_path):
        pass


def test_a_link_or_a_file_where_a_shard_belongs_is_replaced_by_it(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").write_text("kept")
    for put in (Path.touch, lambda path: path.symlink_to(tmp_path / "target")):
        put(tmp_path / "shard")
        RequestShard(0, (), tmp_path / "shard").clear()
        assert not os.path.lexists(tmp_path / "shard")
    assert (tmp_path / "target" / "kept").exists()


def test_a_rate_beyond_float32_is_refused():
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        recipe(optim__lr=1e38)
