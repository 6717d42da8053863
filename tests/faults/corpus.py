"""Small valid files of every kind that mdiff reads, and how each kind is loaded.

A kind is a function that writes its files into a new folder and one that loads them. `CASES`
names them with their share of the trials.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hashed import GOLDEN, golden_weights
from mutations import mutate
from PIL import Image
from safetensors.torch import save_file
from toy_training import recipe

import mdiff
from mdiff.backbones.transformer import transformer
from mdiff.cli.images.requests import requests_of
from mdiff.files.atomic import MANIFEST, verify, write_json
from mdiff.files.untrusted import read_tensors
from mdiff.modalities.image.codec import load_codec, save_codec
from mdiff.modalities.image.codecs.bits import bits
from mdiff.modalities.image.codecs.kmeans import kmeans
from mdiff.modalities.image.codecs.vq import vq
from mdiff.modalities.image.data.images import Pictures, read_pictures
from mdiff.modalities.image.data.token_shards import file_digest, open_shards
from mdiff.modalities.image.modality import image
from mdiff.modalities.text.documents import Source, read_bytes
from mdiff.modalities.text.modality import text
from mdiff.modalities.text.pretrained import Pretrained
from mdiff.modalities.text.tokenizers import BytePairs
from mdiff.pipeline.batch.division import Division
from mdiff.pipeline.batch.encoding import write_shards
from mdiff.pipeline.batch.requests import read_requests
from mdiff.pipeline.pipeline import Pipeline
from mdiff.training.loop import train
from mdiff.training.recipe import load_recipe

ROOT = GOLDEN.parent.parent
PUBLISHED = (
    "bd3lm", "dream", "gidd", "halton_transformer", "llada", "llada2_moe", "llada_moe",
    "maskbit_lfqbert", "mdlm", "smdm", "amused",
)  # fmt: skip
PUBLISHED_CODECS = ("maskbit_tokenizer", "vq_llamagen", "vqgan_taming")
# What these need to be loaded without an option.
COMPLETED = {"gidd": {"p_uniform": 0.0}, "llada_moe": {"mask_id": 3}, "llada2_moe": {"mask_id": 3}}
# Files that a person names: a pipe or a device there (`<(...)`, /dev/stdin) is what was asked for.
NAMED_FILES = ("recipe", "requests", "request lines", "documents", "pictures")
WORDS = "to be or not to be that is the question "
Load = Callable[[Path], Any]
RUN = recipe(steps=1, save_every=1, ema=None, optim__name="adamw")


def pixels(count: int = 12) -> torch.Tensor:
    """Pictures (N, 3, 8, 8) uint8 of fixed noise."""
    random_ = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 8, 8), generator=random_, dtype=torch.uint8)


def make_tensors(folder: Path) -> None:
    tensors = {"w": torch.arange(5.0), "v": torch.zeros(2, 2).long(), "s": torch.zeros(())}
    save_file(tensors, folder / "x.safetensors", metadata={"format": "pt"})


def make_text_model(folder: Path, tokenizer: str) -> None:
    torch.manual_seed(0)
    modality = text(tokenizer=tokenizer, vocab_size=260 if tokenizer == "bpe" else None)
    modality = modality.fit([WORDS * 3])
    space = modality.space
    _save_model(folder, modality, space, length=16)


def make_picture_model(folder: Path) -> None:
    torch.manual_seed(0)
    codec = kmeans(codebook_size=8).fit(pixels())
    modality = image(codec=codec, size=[8, 8], label="condition", labels=["a", "b"])
    _save_model(folder, modality, modality.space, length=4, layout=modality.layout, classes=2)


def _save_model(folder: Path, modality: Any, space: Any, *, length: int, **more: Any) -> None:
    backbone = transformer(
        vocab_size=space.vocab_size, mask_id=space.mask_id, max_length=length, width=8, depth=1,
        heads=2, **more,
    )  # fmt: skip
    folder.rmdir()
    Pipeline(backbone.eval(), space, modality, window=length).save(folder)


def make_published(folder: Path, name: str) -> None:
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("golden*", "tokens_per_step.json"))  # fmt: skip
    if name in COMPLETED:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | COMPLETED[name]))


def make_published_codec(folder: Path, name: str) -> None:
    shutil.copy(GOLDEN / name / "config.json", folder)
    save_file(golden_weights(name), folder / "model.safetensors")


def make_sharded(folder: Path) -> None:
    """A published model whose weights are in two files with an index."""
    make_published(folder, "mdlm")
    tensors = read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for part in (0, 1):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[part::2]}, folder / file)
        index |= dict.fromkeys(names[part::2], file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def make_recipes(folder: Path) -> None:
    for path in sorted((ROOT / "configs").glob("[ti]*/*.yaml")):
        shutil.copy(path, folder)


def make_run(folder: Path) -> None:
    """The directory of a training run after one of two steps."""
    train(RUN, folder, report=print_nothing)


def make_bpe(folder: Path) -> None:
    text(tokenizer="bpe", vocab_size=260).fit([WORDS * 3]).save(folder)


def make_pretrained(folder: Path) -> None:
    shutil.copytree(GOLDEN / "amused" / "tokenizer", folder, dirs_exist_ok=True)


def make_requests(folder: Path) -> None:
    rows = [{"prompt": "a face", "label": "7"}, {"image": "x.png"}, {"label": "sneaker"}]
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_request_lines(folder: Path) -> None:
    rows = [{"id": "a", "prompt": "to be", "length": 9}, {"infill": "a[MASK:2]b", "seed": 1},
            {"id": 7, "chat": "what?"}]  # fmt: skip
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_documents(folder: Path) -> None:
    rows = "".join(json.dumps({"text": word, "n": 1}) + "\n" for word in WORDS.split())
    (folder / "rows.jsonl").write_text(rows)
    (folder / "plain.txt").write_text(WORDS * 20)
    (folder / "packed.txt.gz").write_bytes(gzip.compress(WORDS.encode() * 20))


def make_pictures(folder: Path) -> None:
    array = pixels(1)[0].permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    for ending in ("png", "jpg", "gif", "bmp", "webp"):
        picture.save(folder / f"picture.{ending}")
    picture.convert("P").save(folder / "palette.png", transparency=0)
    stack = pixels().permute(0, 2, 3, 1).numpy()
    np.savez(folder / "arrays.npz", x=stack, y=np.arange(12))
    np.savez_compressed(folder / "packed.npz", x=stack, name=np.array(["a"] * 12))
    head = bytes([0, 0, 8, 3]) + struct.pack(">3I", 12, 8, 8)
    (folder / "t-images-idx3-ubyte").write_bytes(head + stack[..., 0].tobytes())


def make_picture_folder(folder: Path) -> None:
    rows = []
    for name in ("a", "b"):
        Image.fromarray(pixels(1)[0].permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
        rows.append({"file_name": f"{name}.png", "label": name, "caption": f"a {name}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_codec_folder(folder: Path, build: Callable[..., Any], **options: Any) -> None:
    torch.manual_seed(0)
    codec = build(**options)
    save_codec(codec.fit(pixels()) if build is kmeans else codec, folder)


def make_shards(folder: Path) -> None:
    codec = kmeans(codebook_size=8).fit(pixels())
    given = Pictures(pixels=pixels(), names=[str(i) for i in range(12)],
                     labels=torch.arange(12) % 2, label_names=["a", "b"])  # fmt: skip
    folder.rmdir()
    write_shards(given, folder, codec=codec, rows=6, division=Division(workers=1))
    (folder / ".lock").unlink()


def load_each_picture(folder: Path) -> None:
    """Every file is a source of its own, the folder is left out."""
    for path in sorted(folder.iterdir()):
        read_pictures(str(path), channels=3)


def load_documents(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        Source.of(str(path)).documents()


def load_recipes(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        load_recipe(path)


def load_model(folder: Path) -> None:
    mdiff.load(str(folder), device="cpu")


def load_run(folder: Path) -> None:
    """Go on from what is there, by one step; nothing of it is kept."""
    train(RUN.model_copy(update={"train": RUN.train.model_copy(update={"steps": 2})}), folder,
          report=print_nothing)  # fmt: skip
    # What a valid run has become would be loaded without a step the next time.
    shutil.rmtree(folder / "step-000002", ignore_errors=True)


def print_nothing(line: str) -> None:
    """No progress."""


def load_tensors(folder: Path) -> None:
    read_tensors(folder / "x.safetensors")


def load_picture_folder(folder: Path) -> None:
    read_pictures({"source": str(folder), "captions": "data"}, channels=3)


def seal(folder: Path) -> None:
    """Write the manifest of a model again, as a hostile author would have."""
    if (folder / MANIFEST).is_file() and b"shards" not in (folder / MANIFEST).read_bytes():
        files = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
        digests = {p.relative_to(folder).as_posix(): file_digest(p) for p in files}
        write_json(folder / MANIFEST, {"format": 1, "files": digests})


def sealed(load: Load) -> Load:
    """Loading after the manifest was written again."""

    def seal_and_load(folder: Path) -> None:
        seal(folder)
        load(folder)

    return seal_and_load


def sealed_runs(load: Load) -> Load:
    """Loading after the manifests of checkpoints were written again, in half of the trials."""

    def seal_and_load(folder: Path) -> None:
        if sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) % 2:
            for checkpoint in folder.glob("step-*"):
                if checkpoint.is_dir() and not checkpoint.is_symlink():
                    seal(checkpoint)
        load(folder)

    return seal_and_load


def with_part(make: Callable[..., None], *given: Any, **options: Any) -> Callable[[Path], None]:
    return lambda folder: make(folder, *given, **options)


# Kind: what makes it, what loads it, how many shares of the trials it gets.
CASES: dict[str, tuple[Callable[[Path], None], Load, int]] = {
    "tensors": (make_tensors, load_tensors, 12),
    "manifest": (with_part(make_text_model, "char"), verify, 8),
    "text model": (with_part(make_text_model, "char"), sealed(load_model), 8),
    "bpe model": (with_part(make_text_model, "bpe"), sealed(load_model), 4),
    "picture model": (make_picture_model, sealed(load_model), 8),
    "sharded model": (make_sharded, load_model, 3),
    "recipe": (make_recipes, load_recipes, 8),
    "bpe tokenizer": (make_bpe, BytePairs.read, 5),
    "pretrained tokenizer": (make_pretrained, lambda folder: Pretrained(str(folder)), 5),
    "requests": (make_requests, lambda folder: requests_of(folder / "requests.jsonl"), 6),
    "request lines": (make_request_lines,
                      lambda folder: read_requests(read_bytes(folder / "lines.jsonl")), 4),
    "run": (make_run, sealed_runs(load_run), 6),
    "documents": (make_documents, load_documents, 5),
    "pictures": (make_pictures, load_each_picture, 12),
    "picture folder": (make_picture_folder, load_picture_folder, 5),
    "kmeans codec": (with_part(make_codec_folder, kmeans, codebook_size=8), load_codec, 4),
    "vq codec": (with_part(make_codec_folder, vq, width=8, blocks=1, codebook_size=8),
                 load_codec, 4),
    "bits codec": (with_part(make_codec_folder, bits, bits=4, width=4, blocks=1), load_codec, 4),
    "shards": (make_shards, open_shards, 6),
} | {
    f"published {name}": (with_part(make_published, name), load_model, 2) for name in PUBLISHED
} | {
    f"published codec {name}": (with_part(make_published_codec, name), load_codec, 2)
    for name in PUBLISHED_CODECS
}  # fmt: skip


def kind_of(number: int) -> str:
    """The kind of trial `number`: kinds take turns by their shares."""
    table = [kind for kind, (_, _, share) in CASES.items() for _ in range(share)]
    return table[random.Random(number).randrange(len(table))]


def harm(folder: Path, number: int) -> None:
    """Mutate one or a few of the files in `folder`, as `number` says."""
    chance = random.Random(f"harm {number}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    small = [path for path in files if path.suffix != ".safetensors"] or files
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        path = chance.choice(chance.choice((files, small)))
        if path.is_file() and not path.is_symlink():
            mutate(path, chance, replaced=folder.name not in NAMED_FILES)
