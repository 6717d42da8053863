"""`mdiff tokenizer`: train, encode, decode and inspect tokenizers of text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdiff.cli.console import message, result, result_json, writable
from mdiff.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from mdiff.modalities.text import Text

tokenizer = typer.Typer(
    help="Train, encode, decode and inspect tokenizers.", no_args_is_help=False,
    rich_markup_mode=None, add_completion=False,
)  # fmt: skip

KINDS = ("byte", "char", "bpe")
Written = Annotated[str | None, typer.Argument(metavar="TEXT", help="Standard input if not given.")]
Name = Annotated[
    str, typer.Argument(help="byte, a folder, a model (builtin:NAME, a directory) or a Hub id.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
SHOWN = 12


@tokenizer.command()
def train(
    data: Annotated[list[str], typer.Argument(help="Text files (.txt, .jsonl, .parquet; .gz).")],
    out: Annotated[Path, typer.Option(help="A new folder for the tokenizer.")],
    kind: Annotated[str, typer.Option(help="bpe or char.")] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="Ids of bpe.")] = 512,
    eos: Annotated[bool, typer.Option("--eos", help="An id that ends a document.")] = False,
    holdout: Annotated[float, typer.Option(help="Share at the end that is not read.")] = 0.1,
    field: Annotated[str, typer.Option(help="Column of JSONL or Parquet.")] = "text",
) -> None:
    """Train a tokenizer on the training split of the data; print the folder."""
    if kind not in KINDS:
        raise ConfigError(f"--kind {kind!r}; {nearest(kind, KINDS)}")
    if out.exists():
        raise ConfigError(f"{out} exists already: name a new folder")
    writable(out)
    from mdiff.modalities.text import text
    from mdiff.sources import Source, cut_documents

    made = text(tokenizer=kind, eos=eos, vocab_size=vocab_size if kind == "bpe" else None)
    documents = Source(source=list(data), field=field, holdout=holdout).documents()
    made.fit(cut_documents(documents, "train", holdout=holdout, validation=0.0))
    out.mkdir()
    made.save(out)
    message(f"{made.space.vocab_size} ids, mask {made.mask_id}")
    result(str(out))


@tokenizer.command()
def encode(
    name: Name,
    written: Written = None,
    as_json: AsJson = False,
) -> None:
    """Print the ids of a text."""
    made = named(name)
    ids = made.encode(_input(written))
    if as_json:
        result_json({"tokens": ids, "pieces": made.pieces(ids)})
    else:
        result(" ".join(map(str, ids)))


@tokenizer.command()
def decode(
    name: Name,
    ids: Annotated[list[str] | None, typer.Argument(help="Standard input if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the text of ids."""
    made = named(name)
    words = " ".join(ids) if ids else _input(None)
    try:
        tokens = [int(word) for word in words.replace(",", " ").split()]
    except ValueError:
        raise DataError(f"{words[:60]!r}: expected ids such as 72 105") from None
    space = made.space
    for token in tokens:
        if not 0 <= token <= max(space.vocab_size - 1, space.mask_id):
            raise DataError(f"id {token}: expected 0 to {space.vocab_size - 1}")
    text = made.decode(tokens)
    if as_json:
        result_json({"text": text, "tokens": tokens})
    else:
        result(text)


@tokenizer.command()
def inspect(
    name: Name,
    data: Annotated[Path | None, typer.Option(help="A file, for characters a token.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a tokenizer's size, special ids and longest pieces."""
    made = named(name)
    pieces = {made.decode([i]) for i in range(made.tokenizer.size)}
    report = {
        "tokenizer": made.kind,
        "ids": made.space.vocab_size,
        "mask_id": made.mask_id,
        "eos_id": made.eos_id,
        "pad_id": made.pad_id,
        "never": list(made.space.never),
        "lossless": made.tokenizer.lossless,
        "longest": sorted(pieces, key=lambda piece: (-len(piece), piece))[:SHOWN],
    }
    if data is not None:
        from mdiff.sources import Source

        documents = Source(source=str(data)).documents()
        tokens = sum(len(made.encode(document)) for document in documents)
        report["chars_per_token"] = sum(map(len, documents)) / max(1, tokens)
    if as_json:
        result_json(report)
    else:
        for key, value in report.items():
            result(f"{key:<15} {value}")


def named(name: str) -> Text:
    """The text modality of a model, or of a tokenizer's name or folder; trained already."""
    from mdiff.locate import BUILTIN, PIPELINE, locate
    from mdiff.modalities.text import text

    path = Path(name)
    if name.startswith(BUILTIN) or (path.is_dir() and _holds_model(path, PIPELINE)):
        from mdiff.loading import load_modality

        found = load_modality(locate(name))
        if found.name != "text":
            raise ConfigError(f"{name} is a model of {found.name}, not of text")
        return found  # type: ignore[no-any-return]
    made = text(tokenizer=name)
    if name in ("char", "bpe"):
        raise ConfigError(f"{name!r} is a kind, which is trained first: mdiff tokenizer train")
    return made


def _holds_model(path: Path, name: str) -> bool:
    return (path / name).exists() or any(path.glob(f"step-*/{name}"))


def _input(written: str | None) -> str:
    if written is not None:
        return written
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: byte at offset {error.start} is not UTF-8") from None
