"""What the tests of published language models share: goldens, saving, damaged copies."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from folders import GOLDEN as GOLDEN
from safetensors.torch import load_file, save_file

from mdiff.errors import CheckpointError
from mdiff.files import read_model_files
from mdiff.pipeline.published import load_published, recognised


def loaded(folder):
    """The model in a folder, by what its config.json says."""
    files = read_model_files(folder)
    return load_published(files, recognised(files)).eval()


def copied(folder, into, *, described=None, tensors=None):
    """A copy of a checkpoint with other entries of its config, or other tensors."""
    into.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (into / "config.json").write_text(json.dumps(config | (described or {})))
    if tensors is None:
        shutil.copy(folder / "model.safetensors", into)
    else:
        save_file(tensors, into / "model.safetensors")
    return into


def assert_saving_gives_the_files_back(folder, into):
    """Bit-equal tensors of the same names and types, and the same config."""
    loaded(folder).save_pretrained(into)
    ours, theirs = (load_file(where / "model.safetensors") for where in (into, folder))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    ours, theirs = (json.loads((where / "config.json").read_text()) for where in (into, folder))
    assert ours == theirs


def assert_damage_is_refused(folder, tmp_path, *, name):
    """A missing, an unexpected and a misshapen tensor are each named; `name` is one of them."""
    tensors = load_file(folder / "model.safetensors")
    missing = {key: value for key, value in tensors.items() if key != name}
    cases = {
        f"missing: {name}": missing,
        "unexpected: extra.weight": tensors | {"extra.weight": torch.zeros(2)},
        f"of another shape: {name}": missing | {name: tensors[name][:-1].contiguous()},
    }
    for number, (said, changed) in enumerate(cases.items()):
        damaged = copied(folder, tmp_path / f"damaged{number}", tensors=changed)
        with pytest.raises(CheckpointError, match=said) as caught:
            loaded(damaged)
        assert caught.value.exit_code == 4


def assert_rows_do_not_depend_on_padding(model, *, length, ids, side, atol=1e-5):
    """Ragged rows padded on a side, and packed into one, give the logits of each row alone."""
    torch.manual_seed(5)
    rows = [torch.randint(ids, (size,)) for size in (length, 3, 1, length - 4)]
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    valid = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        part = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        tokens[number, part], valid[number, part] = row, True
    with torch.no_grad():
        alone = [model(row[None])[0] for row in rows]
        together = model(tokens, valid=valid)
        packed = model(
            torch.cat(rows)[None],
            documents=torch.arange(len(rows)).repeat_interleave(
                torch.tensor([len(row) for row in rows])
            )[None],
        )
    for number, logits in enumerate(alone):
        assert torch.allclose(together[number][valid[number]], logits, atol=atol)
    assert torch.allclose(packed[0], torch.cat(alone), atol=atol)
