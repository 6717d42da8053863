"""Tokenised pictures on disk: shards of ids with labels and captions, and one manifest.

`manifest.json` names the codec by its fingerprint and every shard with its SHA-256; it is
written last (`shard_writing`).
"""

import hashlib
import json
import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdiff.errors import CheckpointError, DataError
from mdiff.files import inside, read_json, read_tensors
from mdiff.modalities.image.codec import CODES_KEY, Codec, check_ids

MANIFEST = "manifest.json"
FORMAT = 1
# Columns of strings, named as in `Pictures`.
TEXTS = ("names", "captions", "groups")
COLUMNS = ("ids", "labels", *TEXTS)
CHECKED_AT_ONCE = 4096


@dataclass(frozen=True)
class Shards:
    """A folder of tokens, read.

    `ids` (N, h, w[, n]) int16 or int32; the rest as in `Pictures`, `size` its (H, W).
    `digest` is the SHA-256 of all shards' digests.
    """

    ids: Tensor
    names: list[str]
    labels: Tensor | None
    label_names: list[str]
    captions: list[str] | None
    groups: list[str] | None
    size: tuple[int, int]
    manifest: dict[str, Any]
    digest: str

    def __len__(self) -> int:
        return len(self.ids)


def fingerprint(codec: Codec) -> str:
    """SHA-256 of the codec's options and tensors: which ids mean what."""
    total = hashlib.sha256(json.dumps(codec.config(), sort_keys=True).encode())
    for name, tensor in sorted(codec.state().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        total.update(flat.numpy().tobytes())
    return total.hexdigest()


def holds_shards(folder: Path | str) -> bool:
    """Whether the folder has a manifest of tokens."""
    path = Path(folder) / MANIFEST
    try:
        return path.is_file() and "shards" in read_json(path)
    except CheckpointError:
        return False


def open_shards(folder: Path | str, *, codec: Codec | None = None) -> Shards:
    """The tokens in a folder, every shard checked against the manifest.

    Raises DataError where the folder is not whole or was altered, and where `codec` is not
    the one that made it.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        raise DataError(f"{folder} has no {MANIFEST}: encode again, which makes what is missing")
    try:
        manifest = read_json(folder / MANIFEST)
        _check_manifest(manifest, folder)
        if codec is not None:
            _check_codec(manifest, fingerprint(codec), folder)
        found = [_read_shard(folder, entry) for entry in manifest["shards"]]
    except CheckpointError as error:
        raise DataError(str(error)) from None
    columns = {name: [shard.get(name) for shard in found] for name in COLUMNS}
    for name, column in columns.items():
        if len({part is None for part in column}) > 1:
            raise DataError(f"{folder}: some shards have {name} and some have none")
    there: dict[str, list[Any]] = {
        name: column for name, column in columns.items() if column[0] is not None
    }
    texts = {name: list(chain.from_iterable(there[name])) for name in TEXTS if name in there}
    ids, labels = (torch.cat(there[name]) if name in there else None for name in COLUMNS[:2])
    if ids is None or len(ids) != manifest["count"]:
        raise DataError(f"{folder}: the shards do not hold the {manifest['count']} pictures named")
    _check_range(ids, manifest, folder)
    known = len(manifest["label_names"])
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < known:
        raise DataError(f"{folder}: label {int(labels.max())}: the manifest names {known}")
    digests = "".join(entry["sha256"] for entry in manifest["shards"])
    return Shards(
        ids=ids, labels=labels, label_names=manifest["label_names"],
        names=texts.get("names", []), captions=texts.get("captions"), groups=texts.get("groups"),
        size=(manifest["size"][0], manifest["size"][1]),
        manifest=manifest, digest=hashlib.sha256(digests.encode()).hexdigest(),
    )  # fmt: skip


def packed(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Strings as their UTF-8 bytes (uint8) and where each ends (int64).

    >>> packed(["a", "bc"])[1].tolist()
    [1, 3]
    """
    written = [text.encode() for text in texts]
    joined = torch.tensor(list(b"".join(written)), dtype=torch.uint8)
    return joined, torch.tensor([len(each) for each in written], dtype=torch.int64).cumsum(0)


def unpacked(joined: Tensor, ends: Tensor) -> list[str]:
    """The strings of `packed`; ValueError where they are not UTF-8 or the ends are wrong."""
    stops = ends.tolist()
    starts = [0, *stops[:-1]]
    if any(stop < start for start, stop in zip(starts, stops)) or stops[-1:] != [len(joined)]:
        raise ValueError("the ends of strings do not ascend to the last byte")
    whole = bytes(joined.numpy())
    return [whole[start:stop].decode() for start, stop in zip(starts, stops)]


def file_digest(path: Path) -> dict[str, Any]:
    """The size and SHA-256 of a file, as a manifest lists them."""
    with path.open("rb") as file:
        return {
            "size": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _check_manifest(manifest: dict[str, Any], folder: Path) -> None:
    """Raise DataError where a key is missing or of another kind."""
    kinds = {
        "codec": dict, "codebook_size": int, CODES_KEY: int, "size": list, "count": int,
        "label_names": list, "shards": list,
    }  # fmt: skip
    wrong = [name for name, kind in kinds.items() if type(manifest.get(name)) is not kind]
    entry = {"name", "rows", "size", "sha256"}
    shards = manifest.get("shards")
    sound = isinstance(shards, list) and all(
        isinstance(shard, dict) and set(shard) == entry for shard in shards
    )
    if manifest.get("format") != FORMAT or wrong or not shards or not sound:
        named = ", ".join(wrong) or "shards"
        raise DataError(f"{folder / MANIFEST} is not a manifest of tokens: {named}")
    if len(manifest["size"]) != 2 or "fingerprint" not in manifest["codec"]:
        raise DataError(f"{folder / MANIFEST} is not a manifest of tokens: size, codec")


def _check_codec(manifest: dict[str, Any], ours: str, folder: Path) -> None:
    theirs = str(manifest["codec"]["fingerprint"])
    if theirs != ours:
        raise DataError(
            f"{folder} holds tokens of another codec ({theirs[:12]}, this one is {ours[:12]}): "
            "encode the pictures with this one"
        )


def _read_shard(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """A shard's columns, after its bytes were found to be those of the manifest."""
    path = inside(folder, str(entry["name"]))
    if not path.is_file():
        raise DataError(f"{path} is missing: encode again, which makes what is missing")
    if file_digest(path) != {"size": entry["size"], "sha256": entry["sha256"]}:
        raise DataError(f"{path} is truncated or altered: its SHA-256 is not the manifest's")
    tensors = read_tensors(path)
    shard: dict[str, Any] = {name: tensors[name] for name in ("ids", "labels") if name in tensors}
    try:
        for name in TEXTS:
            if name in tensors:
                shard[name] = unpacked(tensors[name], tensors[f"{name}.ends"])
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} is not a shard of tokens: {error}") from None
    kinds = {name: shard[name].dtype for name in ("ids", "labels") if name in shard}
    known = kinds.get("ids") in (torch.int16, torch.int32)
    if not known or kinds.get("labels", torch.int64) != torch.int64:
        raise DataError(f"{path} is not a shard of tokens: expected ids int16 or int32")
    if any(len(column) != entry["rows"] for column in shard.values()):
        raise DataError(f"{path} is not a shard of {str(entry['rows'])[:40]} pictures")
    return shard


def _check_range(ids: Tensor, manifest: dict[str, Any], folder: Path) -> None:
    """Raise DataError for ids outside the codebook, without a copy of them all."""
    for some in torch.split(ids, CHECKED_AT_ONCE):
        try:
            check_ids(
                some.long(),
                codebook_size=manifest["codebook_size"],
                codes_per_position=manifest[CODES_KEY],
            )
        except DataError as error:
            raise DataError(f"{folder}: {error}") from None
