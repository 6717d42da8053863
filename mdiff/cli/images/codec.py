"""Pictures for `mdiff tokenizer`: codecs trained, used and measured."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mdiff.cli.images.requests import refuse_problems
from mdiff.cli.views.console import message, result, result_json
from mdiff.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from mdiff.modalities.image import Codec
    from mdiff.modalities.image.data import Pictures, PictureSource
    from mdiff.pipeline.batch import Division

# A grid shows so many pictures by default.
SHOWN = 64


def parsed_size(size: str | None) -> tuple[int, int] | None:
    """(H, W) of "32x48", or of "32" for a square; ConfigError for anything else."""
    if size is None:
        return None
    try:
        sides = [int(side) for side in size.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ConfigError(f"--size {size!r}: expected HEIGHTxWIDTH such as 32x32")
    return sides[0], sides[-1]


def train_codec(
    source: PictureSource, out: Path, *, described: dict[str, object], size: tuple[int, int] | None,
    seed: int,
) -> None:  # fmt: skip
    """Fit a codec on the training split, save it, and measure it on the held-out part."""
    from mdiff.files import staged
    from mdiff.modalities.image import make_codec, save_codec

    codec = make_codec(described)
    pictures = _read(source, codec, size)
    train = pictures.split("train", holdout=source.holdout, validation=source.validation)
    codec.fit(train.pixels, seed=seed, report=message)
    with staged(out) as folder:
        save_codec(codec, folder)
    if source.holdout > 0:
        held_out = pictures.split("holdout", holdout=source.holdout, validation=0.0)
        try:
            figures = _figures(codec, held_out)
            message(f"held out: {', '.join(f'{k} {v:.4g}' for k, v in figures.items())}")
        except BackendError as missing:
            message(f"not measured: {missing}")
    result(str(out))
    refuse_problems(pictures.problems, len(pictures))


def encode_pictures(
    codec: Codec, source: PictureSource, out: Path, *, size: tuple[int, int] | None,
    rows: int | None, division: Division, as_json: bool,
) -> None:  # fmt: skip
    """Write shards of the pictures; files that cannot be read are a DataError at the end.

    Of several processes with a share each, those alone report that find all shards complete.
    """
    from mdiff.pipeline.batch import ROWS, write_shards

    pictures = _read(source, codec, size)
    done = write_shards(
        pictures, out, codec=codec, rows=ROWS if rows is None else rows, division=division,
        report=message,
    )  # fmt: skip
    if done is None:
        return
    message(f"{done.count} pictures: {done.made} shards made, {done.kept} kept")
    if as_json:
        result_json({"out": str(out), **asdict(done), "problems": pictures.problems})
    else:
        result(str(out))
    refuse_problems(pictures.problems, len(pictures))


def decode_tokens(codec: Codec, tokens: Path, out: Path, *, count: int | None) -> None:
    """Write the pictures of a folder of tokens, the first `count`, to a .png or a folder."""
    from mdiff.cli.views.grid import picture_target, write_pictures
    from mdiff.modalities.image import as_picture
    from mdiff.modalities.image.data import open_shards

    picture_target(out)
    if count is not None and count < 1:
        raise ConfigError(f"--n {count}: need at least 1")
    found = open_shards(tokens, codec=codec)
    shown = SHOWN if count is None and out.suffix else count
    chosen = found.ids[:shown].long()
    write_pictures([as_picture(picture) for picture in codec.decode(chosen)], out)
    message(f"{len(chosen)} of {len(found)} pictures")
    result(str(out))


def codec_report(
    codec: Codec, source: PictureSource | None, *, size: tuple[int, int] | None
) -> dict[str, object]:
    """The properties of a codec and, with pictures, its reconstruction metrics."""
    from mdiff.modalities.image.data import fingerprint

    report: dict[str, object] = {
        "tokenizer": codec.name,
        "ids": codec.codebook_size,
        "channels": codec.channels,
        "stride": codec.stride,
        "codes_a_place": codec.codes_per_position,  # alias: the key of --json
        "reach": codec.receptive_field_margin,  # alias: the key of --json
        "lossless": codec.lossless,
        "parameters": sum(tensor.numel() for tensor in codec.state().values()),
        "fingerprint": fingerprint(codec),
    }
    if source is not None:
        pictures = _read(source, codec, size)
        report |= {"pictures": len(pictures), **_figures(codec, pictures)}
        refuse_problems(pictures.problems, len(pictures))
    return report


def _read(source: PictureSource, codec: Codec, size: tuple[int, int] | None) -> Pictures:
    from mdiff.modalities.image.data import read_pictures

    return read_pictures(source, channels=codec.channels, size=size, strict=False)


def _figures(codec: Codec, pictures: Pictures) -> dict[str, float]:
    from mdiff.modalities.image import fidelity

    return asdict(fidelity(codec, pictures.pixels))
