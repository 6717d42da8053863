"""How often the config and the headers of a model's files are parsed while something runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock


def header(path: Path) -> bytes:
    """The header of a safetensors file as it stands there."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


@contextmanager
def counted_parses(folder: Path) -> Iterator[Counter[str]]:
    """Within it, the parses of each config.json and each header of a folder, by file name.

    A parse is a call of `json.loads` with their very text, whoever makes it. Where transformers
    reads a header by its own native code, that is not counted.
    """
    texts = {path.read_bytes(): path.name for path in folder.glob("config.json")}
    texts |= {header(path): path.name for path in folder.glob("*.safetensors")}
    counts: Counter[str] = Counter(dict.fromkeys(texts.values(), 0))
    loads = json.loads

    def counting(text: str | bytes, *rest: object, **options: object) -> object:
        name = texts.get(text.encode() if isinstance(text, str) else bytes(text))
        if name is not None:
            counts[name] += 1
        return loads(text, *rest, **options)

    with mock.patch.object(json, "loads", counting):
        yield counts
