"""`mdiff tokenizer`: train, encode, decode and inspect tokenizers of text and of pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import mdiff.cli.options as ask
from mdiff.cli.rules import PICTURES, TEXT, refuse
from mdiff.cli.views.console import message, result, result_json, writable
from mdiff.errors import ConfigError, DataError, nearest
from mdiff.find import names

if TYPE_CHECKING:
    from mdiff.modalities.image import Codec
    from mdiff.modalities.image.data import PictureSource
    from mdiff.modalities.text import Text

KINDS = ("byte", "char", "bpe")
Name = Annotated[
    str, typer.Argument(help="byte, a folder, a model (builtin:NAME, a directory) or a Hub id.")
]
Written = Annotated[
    list[str] | None, typer.Argument(metavar="[TEXT | PICTURES...]", help="Default: stdin.")
]
Ids = Annotated[list[str] | None, typer.Argument(metavar="[IDS... | DIR]", help="Default: stdin.")]
Size = Annotated[str | None, "Pictures' HEIGHTxWIDTH; else the first one's."]
Resize = Annotated[bool, "Crop and scale pictures to the size."]
Captions = Annotated[str | None, "Pictures' captions: none, data or unicode."]
SHOWN = 12
TEXT_FILES = ("*token*", "*vocab*", "*.model", "*.tiktoken")  # any tokenizer of text has one
VOCAB_SIZE = 512


def train(
    context: typer.Context,
    data: Annotated[
        list[str], typer.Argument(help="Text files (.txt, .jsonl, .parquet; .gz), or pictures.")
    ],
    out: Annotated[Path, "A new folder for the tokenizer."],
    kind: Annotated[str, "bpe, char; kmeans, vq, bits, levels."] = "bpe",
    vocab_size: Annotated[int | None, "Ids of bpe (512)."] = None,
    eos: Annotated[bool, "An id that ends a document."] = False,
    holdout: Annotated[float, "Share at the end that is not read."] = 0.1,
    field: Annotated[str | None, "Column of JSONL or Parquet (text)."] = None,
    size: Size = None,
    resize: Resize = False,
    captions: Captions = None,
    channels: Annotated[int | None, "1 grey, 3 colour."] = None,
    codebook_size: Annotated[int | None, "Ids of kmeans and vq."] = None,
    stride: Annotated[int | None, "Pixels a token, each way."] = None,
    steps: Annotated[int | None, "Steps of training vq or bits."] = None,
    option: Annotated[list[str] | None, "Any option of the codec, k=v.", "-o"] = None,
    seed: Annotated[int | None, "Of a codec's fit (0)."] = None,
) -> None:
    """Train a tokenizer on the training split of the data; print the folder."""
    codecs = names("codecs")
    if kind not in (*KINDS, *codecs):
        raise ConfigError(f"--kind {kind!r}; {nearest(kind, (*KINDS, *codecs))}")
    refuse(context.obj, kind, PICTURES if kind in codecs else TEXT)
    if out.exists():
        raise ConfigError(f"{out} exists already: name a new folder")
    writable(out)
    if kind in codecs:
        from mdiff.cli.images.codec import parsed_size, train_codec

        sizes = {
            "channels": channels, "codebook_size": codebook_size, "stride": stride, "steps": steps,
        }  # fmt: skip
        given = {name: value for name, value in sizes.items() if value is not None}
        train_codec(
            _pictures(data, resize=resize, captions=captions, holdout=holdout), out,
            described={"name": kind, **given, **ask.parsed_options(option)},
            size=parsed_size(size), seed=seed or 0,
        )  # fmt: skip
        return
    from mdiff.modalities.text import Source, cut_documents, text

    ids = VOCAB_SIZE if vocab_size is None else vocab_size
    made = text(tokenizer=kind, eos=eos, vocab_size=ids if kind == "bpe" else None)
    options = {"source": list(data), "field": field or "text", "holdout": holdout}
    documents = Source.of(options).documents()
    made.fit(cut_documents(documents, "train", holdout=holdout, validation=0.0))
    out.mkdir()
    made.save(out)
    message(f"{made.space.vocab_size} ids, mask {made.mask_id}")
    result(str(out))


def encode(
    context: typer.Context,
    name: Name,
    written: Written = None,
    *,
    out: Annotated[Path | None, "A folder for pictures' tokens."] = None,
    size: Size = None,
    resize: Resize = False,
    captions: Captions = None,
    rows: Annotated[int | None, "Pictures a shard (4096)."] = None,
    workers: Annotated[int | None, "Processes; by default one a core."] = None,
    dividing: ask.Dividing,
    as_json: ask.OneObject = False,
) -> None:
    """Print the ids of a text, or write those of pictures; a rerun writes what is missing."""
    from mdiff.modalities.text import Text

    made = opened(name)
    if not isinstance(made, Text):
        from mdiff.cli.images.codec import encode_pictures, parsed_size

        if not written or out is None:
            raise ConfigError(f"{name} encodes pictures: expected their paths, and --out DIR")
        encode_pictures(
            made, _pictures(written, resize=resize, captions=captions), out,
            size=parsed_size(size), rows=rows, as_json=as_json,
            division=dividing.division(workers),
        )  # fmt: skip
        return
    refuse(context.obj, name, TEXT)
    if written and len(written) > 1:
        raise ConfigError(f"expected one text, got {len(written)} words: put it in quotes")
    ids = made.encode(_input(written[0] if written else None))
    found = {"tokens": ids, "pieces": made.pieces(ids)} if as_json else None
    result(" ".join(map(str, ids))) if found is None else result_json(found)


def decode(
    context: typer.Context,
    name: Name,
    ids: Ids = None,
    out: Annotated[Path | None, "Pictures: one grid.png, or a folder."] = None,
    n: Annotated[int | None, "The first n; a grid shows 64."] = None,
    as_json: ask.OneObject = False,
) -> None:
    """Print the text of ids, or write the pictures of a folder of tokens."""
    from mdiff.modalities.text import Text

    made = opened(name)
    if not isinstance(made, Text):
        from mdiff.cli.images.codec import decode_tokens

        if not ids or len(ids) > 1 or out is None:
            raise ConfigError(f"{name} decodes pictures: expected a folder of tokens, and --out")
        decode_tokens(made, Path(ids[0]), out, count=n)
        return
    refuse(context.obj, name, TEXT)
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


def inspect(
    context: typer.Context,
    name: Name,
    data: Annotated[
        list[str] | None, "Files, for characters a token or reconstruction metrics of pictures."
    ] = None,
    size: Size = None,
    resize: Resize = False,
    as_json: ask.OneObject = False,
) -> None:
    """Show the size and special ids of a tokenizer or codec; with data, metrics on it."""
    from mdiff.modalities.text import Text

    made = opened(name)
    if isinstance(made, Text):
        refuse(context.obj, name, TEXT)
        report = _text_report(made, data)
    else:
        from mdiff.cli.images.codec import codec_report, parsed_size

        source = _pictures(data, resize=resize, captions=None) if data else None
        report = codec_report(made, source, size=parsed_size(size))
    if as_json:
        result_json(report)
    else:
        for key, value in report.items():
            result(f"{key:<15} {value}")


def _text_report(made: Text, data: list[str] | None) -> dict[str, object]:
    """Size, special ids and longest pieces; with data, characters a token."""
    pieces = {made.decode([i]) for i in range(made.tokenizer.size)}
    report: dict[str, object] = {
        "tokenizer": made.kind,
        "ids": made.space.vocab_size,
        "mask_id": made.mask_id,
        "eos_id": made.eos_id,
        "pad_id": made.pad_id,
        "never": list(made.space.never),
        "lossless": made.tokenizer.lossless,
        "longest": sorted(pieces, key=lambda piece: (-len(piece), piece))[:SHOWN],
    }
    if data:
        from mdiff.modalities.text import Source

        documents = Source(source=data).documents()
        tokens = sum(len(made.encode(document)) for document in documents)
        report["chars_per_token"] = sum(map(len, documents)) / max(1, tokens)
    return report


def _pictures(
    paths: list[str], *, resize: bool, captions: str | None, holdout: float = 0.0
) -> PictureSource:
    from mdiff.modalities.image.data import PictureSource

    return PictureSource.of({
        "source": list(paths), "resize": resize, "captions": captions or "none",
        "holdout": holdout,
    })  # fmt: skip


def opened(name: str) -> Text | Codec:
    """The text modality or the codec of a model, of a folder or of a name; trained already."""
    from mdiff.files import BUILTIN, PIPELINE, locate

    path = Path(name)
    if name.startswith(BUILTIN) or (path.is_dir() and _holds_model(path, PIPELINE)):
        from mdiff.modalities import ShowsImages
        from mdiff.modalities.text import Text
        from mdiff.pipeline import load_modality

        found = load_modality(locate(name))
        if isinstance(found, Text):
            return found
        if isinstance(found, ShowsImages):
            return found.codec
        raise ConfigError(f"{name} is a model of {found.name}, which has no tokenizer")
    from mdiff.modalities.image import holds_codec, load_codec, unknown_codec

    if holds_codec(path):
        from mdiff.files import MANIFEST, verify

        if (path / MANIFEST).exists():
            verify(path)
        codec: Codec = load_codec(path)
        return codec
    from mdiff.modalities.text import text

    of_text = any(any(path.glob(each)) for each in TEXT_FILES)
    if path.is_dir() and (not of_text or unknown_codec(path)):
        # Refused in its own words, which name the codecs that are known.
        return load_codec(path)
    if name in ("char", "bpe", *names("codecs")):
        raise ConfigError(f"{name!r} is a kind, which is trained first: mdiff tokenizer train")
    return text(tokenizer=name)


def _holds_model(path: Path, name: str) -> bool:
    return (path / name).exists() or any(path.glob(f"step-*/{name}"))


def _input(written: str | None) -> str:
    """The text that was given, else that of standard input."""
    if written is not None:
        return written
    if sys.stdin is None:
        raise ConfigError("standard input is closed: give what is to be read as an argument")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: byte at offset {error.start} is not UTF-8") from None
    except OSError as error:
        raise DataError(f"standard input: {error.strerror}") from None
