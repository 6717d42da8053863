"""Checkpoints are written atomically and compared with their manifest; one process writes."""

from __future__ import annotations

import errno
import itertools
import os
import re
import sys

import processes
import pytest
import torch
from safetensors.torch import save_file

from mdiff.errors import CheckpointError
from mdiff.files.atomic import (
    complete,
    damage,
    latest,
    locked,
    replace_file,
    staged,
    step_path,
    sweep,
    verify,
)


@pytest.fixture
def checkpoint(tmp_path):
    path = step_path(tmp_path, 40)
    with staged(path) as folder:
        save_file({"w": torch.arange(6.0)}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"a": 1}')
        (folder / "inner").mkdir()
        (folder / "inner" / "notes.txt").write_text("x")
    return path


def test_a_finished_checkpoint_lists_every_file_with_size_and_digest(checkpoint):
    files = verify(checkpoint).files
    assert sorted(files) == ["config.json", "inner/notes.txt", "model.safetensors"]
    assert files["config.json"].size == 8
    assert latest(checkpoint.parent) == checkpoint
    assert [p.name for p in checkpoint.parent.iterdir()] == ["step-000040"]


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    def write():
        with staged(tmp_path / "step-000001") as folder:
            (folder / "half").write_text("x")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_never_overwritten(checkpoint):
    with pytest.raises(CheckpointError, match="exists already"), staged(checkpoint):
        pass
    verify(checkpoint)


def test_a_finished_checkpoint_has_the_usual_permissions(checkpoint):
    mask = os.umask(0)
    os.umask(mask)
    for path in (checkpoint, *checkpoint.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask


def test_what_a_killed_writer_left_is_not_a_checkpoint_and_is_swept(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from mdiff.files.atomic import staged\n"
        "with staged(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x'); os.kill(os.getpid(), 9)\n"
    )
    processes.python("-c", script, tmp_path / "step-000001")
    assert len(list(tmp_path.iterdir())) == 1
    assert latest(tmp_path) is None
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _append(path):
    path.write_bytes(path.read_bytes() + b" ")


def _link_inside(path):
    """A link to the same content under a name that no manifest lists."""
    path.symlink_to(path.rename(path.with_name(".hidden")))


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "config.json is missing"),
        (lambda p: (p / "extra.json").write_text("x"), "extra.json is not in the manifest"),
        (lambda p: _append(p / "config.json"), "has 9 bytes, the manifest says 8"),
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        (lambda p: (p / "link").symlink_to("/etc"), "link is not in the manifest"),
        (lambda p: _link_inside(p / "config.json"), "config.json is not a plain file"),
        (lambda p: (p / "manifest.json").write_text("{"), "not JSON"),
        (lambda p: (p / "manifest.json").write_text('{"format": 2, "files": {}}'), "format 1"),
        (lambda p: (p / "manifest.json").write_text('{"format": 1, "files": []}'), "a section"),
        (
            lambda p: (p / "manifest.json").write_text(
                '{"format": 1, "files": {"a": {"size": 1}}}'
            ),
            "files.a.sha256 is missing",
        ),
    ],
)
def test_an_incomplete_checkpoint_is_refused_and_is_not_the_latest(
    checkpoint, harm, message, caplog
):
    harm(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        verify(checkpoint)
    assert not complete(checkpoint)
    assert latest(checkpoint.parent) is None
    assert re.search(f"passed over.*{message}", caplog.text)


# What people, their tools and their systems leave beside a model.
STRAYS = (
    ".DS_Store", "._config.json", ".gitattributes", ".git/config", ".git/HEAD", ".cache/hf/a.json",
    ".cache/huggingface/download/model.safetensors.metadata", ".nfs000000000a1b2c", ".#README.md",
    ".ipynb_checkpoints/config-checkpoint.json", ".gitignore", ".huggingface/x.json", ".lock",
    "README.md", "README", "readme.txt", "README.rst", "LICENSE", "LICENCE.txt", "NOTICE",
    "Thumbs.db", "desktop.ini", "Icon\r", "notes.md", "notes.txt", "samples.txt", "sample.png",
    "loss.JPG", "images/grid.png", "log.jsonl", "events.out.tfevents.1.host", "results.csv",
    "config.json~", "config.json.bak", "config.json.orig", "model.safetensors.sha256", "x.tmp",
    "training_args.bin", "optimizer.pt", "modeling_x.py", "__pycache__/x.pyc", "CITATION.cff",
    "@eaDir/config.json@SynoEAStream", "wandb/run.log", "slurm-17.out", "notes.yaml", "eval.html",
    "a name with spaces", "ünïcode.md", "model.onnx", "inner/README.md", "deep/er/x.md",
)  # fmt: skip
# What a reader of models or tokenizers looks for.
READ = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model", "chat_template.jinja", "generation_config.json", "adapter_config.json",
    "adapter_model.safetensors", "model-00001-of-00002.safetensors", "dict.txt", "bpe.codes",
    "model.safetensors.index.json", "tokenizer/tokenizer.json", "inner/config.json", "VOCAB.TXT",
    "Tokenizer.JSON", "training.safetensors", "qwen.tiktoken", "vocab.bpe",
)  # fmt: skip


def left(folder, name):
    """A file of this name in the folder."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    return path


def test_what_nobody_reads_does_not_damage_a_checkpoint(checkpoint, caplog):
    before = verify(checkpoint)
    for name in STRAYS:
        left(checkpoint, name)
    (checkpoint / ".#config.json").symlink_to("user@host.4711:17")
    (checkpoint / "card.md").symlink_to("/etc/hostname")
    (checkpoint / ".hidden").symlink_to("/etc")
    assert verify(checkpoint) == before
    assert latest(checkpoint.parent) == checkpoint
    assert not caplog.records


@pytest.mark.parametrize("name", READ)
def test_what_could_be_read_is_refused_by_its_name(checkpoint, name):
    left(checkpoint, name)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} is not in the manifest"):
        verify(checkpoint)


def test_a_newer_step_that_is_passed_over_is_said_each_time(tmp_path, caplog):
    for step in (1, 2, 3):
        with staged(step_path(tmp_path, step)) as folder:
            (folder / "a").write_text("a")
    left(step_path(tmp_path, 3), "vocab.txt")
    (step_path(tmp_path, 2) / "a").unlink()
    for _ in range(2):
        caplog.clear()
        assert latest(tmp_path) == step_path(tmp_path, 1)
        lines = [record.getMessage() for record in caplog.records]
        assert all("is passed over" in line for line in lines)
        assert ["vocab.txt is not" in lines[0], "a is missing" in lines[1]] == [True, True]
    said = []
    latest(tmp_path, say=said.append)
    assert said == lines


def test_a_listed_file_behind_a_linked_folder_is_refused(checkpoint, tmp_path):
    (checkpoint / "inner").rename(tmp_path / "inner")
    (checkpoint / "inner").symlink_to(tmp_path / "inner")
    with pytest.raises(CheckpointError, match="inner"):
        verify(checkpoint)


PARTS = (
    "", ".", "._", "..", "a", "README", "config", "model", "vocab", "merges", "tokenizer", "é", " ",
    "dict", "x-00001-of-00002", "~", "#", "-",
)  # fmt: skip
ENDS = (
    "", ".json", ".JSON", ".safetensors", ".txt", ".md", ".model", ".jinja", ".png", ".bin", ".py",
    ".json~", ".tmp", ".jsonl", ".lock", ".Txt", ".tiktoken", ".yaml", " (1).json", ".gz",
)  # fmt: skip


@pytest.mark.slow
def test_any_name_is_ignored_or_refused_by_its_name(checkpoint):
    """2,000 names and more, in three folders: each is ignored or named."""
    tried = refused = 0
    for folder in ("", "inner", ".hidden", "made", "made/.git/deep", "two/levels"):
        for start, middle, end in itertools.product(PARTS, PARTS[4:], ENDS):
            name = f"{start}{middle}{end}"
            path = checkpoint / folder / name
            if name.strip(".") == "" or path.exists() or len(name) % 2 != len(folder) % 2:
                continue
            left(checkpoint, f"{folder}/{name}" if folder else name)
            tried += 1
            hidden = any(part.startswith(".") for part in path.relative_to(checkpoint).parts)
            problem = damage(checkpoint)
            path.unlink()
            if problem is None:
                assert hidden or not name.lower().endswith((".json", ".safetensors", ".model"))
                continue
            refused += 1
            assert name in problem
            assert not hidden
            assert not name.lower().endswith((".md", ".png", ".py", ".tmp", "~", ".jsonl"))
    assert tried >= 2000
    assert 100 < refused < tried


def test_an_altered_byte_is_found_though_the_size_is_right(checkpoint):
    _flip(checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="altered"):
        verify(checkpoint)


def test_a_file_replaced_by_a_link_to_itself_elsewhere_is_refused(checkpoint, tmp_path):
    elsewhere = tmp_path / "elsewhere.json"
    (checkpoint / "config.json").rename(elsewhere)
    (checkpoint / "config.json").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"leaves|not a plain file"):
        verify(checkpoint)


def test_the_latest_step_is_the_largest_number_with_all_its_files(tmp_path, caplog):
    for step in (999999, 1000000, 20):
        with staged(step_path(tmp_path, step)) as folder:
            (folder / "a").write_text("a")
    assert latest(tmp_path).name == "step-1000000"
    (tmp_path / "step-1000000" / "a").write_text("")
    assert latest(tmp_path).name == "step-999999"
    assert "a has 0 bytes" in caplog.text
    assert latest(tmp_path / "nowhere") is None


HOLD = (
    "import sys, time; from pathlib import Path; from mdiff.files.atomic import locked\n"
    "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)\n"
)


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    with processes.running([sys.executable, "-c", HOLD, tmp_path]) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"process {holder.pid}"), locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with locked(tmp_path):
            pass


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    ready, tell_ready = os.pipe()
    done, tell_done = os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            # Its read ends when the parent does.
            os.close(tell_done)
            os.write(tell_ready, b"x")
            os.read(done, 1)
            os._exit(0)
        os.read(ready, 1)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.write(tell_done, b"x")
        os.waitpid(child, 0)
        for handle in (ready, tell_ready, done, tell_done):
            os.close(handle)


def test_a_file_is_replaced_atomically(tmp_path):
    def pieces():
        yield b"half"
        raise OSError(errno.ENOSPC, "full")

    path = tmp_path / "file"
    replace_file(path, [b"be", b"fore"])
    with pytest.raises(OSError, match="full"):
        replace_file(path, pieces())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"before"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_named_pipe_is_written_to_and_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        replace_file(tmp_path / "pipe", [b"a", b"b"])
        assert os.read(reader, 9) == b"ab"
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
