"""The contract of a codec, pictures to grids of ids and back, and the files of one."""

import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import Tensor

from mdiff.errors import CheckpointError, ConfigError, DataError, nearest
from mdiff.files import Header, check_tensors, read_json, read_tensors, without_memory
from mdiff.find import find
from mdiff.modalities.image.codec_files import (
    PUBLISHED_CONFIG,
    PUBLISHED_TENSORS,
    SETTINGS,
    no_codec,
    published_codec_of,
    published_codecs,
)

# What files and recipes call codes_per_position. It is still written: fingerprints of token
# folders hash the settings, and older readers know no other name.
CODES_KEY = "splits"
TENSORS = "codec.safetensors"
Report = Callable[[str], None]


class Codec(Protocol):
    """Pictures (B, C, H, W) uint8, 0 to 255, to ids and back.

    `encode` gives ids (B, h, w) int64, or (B, h, w, n) where `codes_per_position` n is over 1,
    each in [0, codebook_size); h = H / stride and w = W / stride. `decode` takes them back to
    uint8. A picture's ids do not depend on the others of its batch. The tensors stay float32
    whatever the generator's type.

    `receptive_field_margin` is how many pixels beyond its own stride x stride patch the encoder
    reads for a token, on each side; None where it reads the whole picture. `lossless`:
    decode(encode(x)) is x to the last bit.
    """

    name: str
    channels: int
    stride: int
    codes_per_position: int
    codebook_size: int
    receptive_field_margin: int | None
    lossless: bool

    def encode(self, images: Tensor) -> Tensor:
        """The ids of pictures; DataError for a wrong shape, type or size."""

    def decode(self, ids: Tensor) -> Tensor:
        """The pictures of ids; DataError for ids outside the codebook."""

    def fit(self, images: Tensor, *, seed: int = 0, report: Report | None = None) -> Self:
        """Learn from pictures (N, C, H, W) uint8; the same seed gives the same codec."""

    def config(self) -> dict[str, object]:
        """The options that the part's function takes back, with the name."""

    def state(self) -> dict[str, Tensor]:
        """What has been learnt, for a safetensors file."""

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave; CheckpointError where it does not fit."""


class _Published(Codec, Protocol):
    """A codec of another project, which is read from its files."""

    def read(self, headers: Mapping[Path, Header]) -> Self:
        """Read the weights; every tensor is accounted for."""


def check_pictures(images: Tensor, *, channels: int, stride: int) -> None:
    """Raise DataError where `images` is not (B, channels, H, W) uint8 with sides of the stride."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.dim() != 4:
        is_tensor = isinstance(images, Tensor)
        got = f"{tuple(images.shape)} {images.dtype}" if is_tensor else type(images).__name__
        raise DataError(f"pictures {got}: expected (B, {channels}, H, W) uint8")
    height, width = images.shape[2:]
    if images.shape[1] != channels:
        raise DataError(f"pictures of {images.shape[1]} channels: this codec takes {channels}")
    if not height or not width or height % stride or width % stride:
        raise DataError(f"pictures of {height} x {width}: expected multiples of {stride} pixels")


def check_ids(ids: Tensor, *, codebook_size: int, codes_per_position: int) -> None:
    """Raise DataError where `ids` is not (B, h, w[, n]) int64 in [0, codebook_size)."""
    last = () if codes_per_position == 1 else (codes_per_position,)
    if ids.dtype != torch.int64 or ids.dim() < 3 or ids.shape[3:] != last:
        expected = "(B, h, w)" if not last else f"(B, h, w, {codes_per_position})"
        raise DataError(f"ids {tuple(ids.shape)} {ids.dtype}: expected {expected} int64")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < codebook_size:
        wrong = int(ids.max() if int(ids.min()) >= 0 else ids.min())
        raise DataError(f"id {wrong}: this codec has ids 0 to {codebook_size - 1}")


def learnt_bytes(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor `name` of a codec's file; CheckpointError where it is not `shape` uint8."""
    found = tensors.get(name)
    if found is None:
        raise CheckpointError(f"the codec's file lacks {name}")
    if found.dtype != torch.uint8 or tuple(found.shape) != shape:
        raise CheckpointError(
            f"the codec's {name} {tuple(found.shape)} {found.dtype}: expected {shape} uint8"
        )
    return found


def finite(values: Tensor) -> Tensor:
    """The values that a codec's networks gave; CheckpointError where one is NaN or infinite.

    Rounded to pixels, or compared with codes, they would look like any other.
    """
    if not bool(values.isfinite().all()):
        raise CheckpointError("the codec gave values that are not finite: its weights are damaged")
    return values


def make_codec(
    described: Mapping[str, object] | str | Path, *, folder: Path | str | None = None
) -> Codec:
    """The codec of a description {"name": ..., options}, or of the folder that holds one.

    With `folder` what was learnt is read from there. Raises ConfigError for an unknown name or
    option, CheckpointError for files that do not fit.
    """
    if isinstance(described, str | Path):
        if len(Path(described).parts) != 1 or Path(described).exists():
            return load_codec(described)
        described = {"name": str(described)}
    options = dict(described)
    if CODES_KEY in options and "codes_per_position" not in options:
        options["codes_per_position"] = options.pop(CODES_KEY)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError("codec.name is missing: expected levels, kmeans, vq, bits or a folder")
    build = find("codecs", name)
    # A codec of another project's sizes takes no memory before its files are checked.
    shell = folder is not None and name.replace("-", "_") in published_codecs()
    path = None if folder is None else Path(folder) / TENSORS
    header = check_tensors(path) if path is not None and path.exists() else None
    try:
        if header is not None:
            _check_sizes(build, options, header, origin=str(path))
        with without_memory() if shell else nullcontext():
            codec: Codec = build(**options)
    except TypeError as error:
        known = inspect.signature(build).parameters
        wrong = next((key for key in options if key not in known), None)
        if wrong is None:
            raise ConfigError(f"codec {name!r}: {error}") from None
        raise ConfigError(
            f"codec {name!r} does not take {wrong!r}; {nearest(wrong, known)}"
        ) from None
    if path is not None:
        # A codec that has learnt something refuses a folder without it.
        codec.load_state({} if header is None else read_tensors(path, header=header))
    return codec


def _check_sizes(
    build: Callable[..., Codec], options: Mapping[str, object], header: Header, *, origin: str
) -> None:
    """Raise CheckpointError, before memory is taken, where the options are not of these files."""
    try:
        with without_memory():
            shell = build(**options)
    except RuntimeError:
        # A codec that needs values when it is made, which a meta device lacks, checks its sizes.
        return
    for name, tensor in shell.state().items():
        if name in header and header[name]["shape"] != list(tensor.shape):
            raise CheckpointError(
                f"{origin}: {name} has shape {header[name]['shape']}, the settings need "
                f"{list(tensor.shape)}"
            )


def save_codec(codec: Codec, folder: Path | str) -> None:
    """Write the codec's settings and tensors into a folder, made where it is not there."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    settings = json.dumps(codec.config(), indent=1)
    (Path(folder) / SETTINGS).write_text(settings + "\n", encoding="utf-8")
    state = {name: tensor.contiguous() for name, tensor in codec.state().items()}
    if state:
        save_file(state, Path(folder) / TENSORS)


def load_codec(folder: Path | str) -> Codec:
    """The codec that `save_codec` wrote, or one of another project by its config.json.

    Raises CheckpointError where its files are not valid.
    """
    if not (Path(folder) / SETTINGS).exists():
        return _published(Path(folder))
    settings = read_json(Path(folder) / SETTINGS)
    name = settings.get("name")
    # A name from a file may choose among the parts here; it may not import anything.
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise CheckpointError(f"{Path(folder) / SETTINGS}: {name!r} is not a codec of mdiff")
    try:
        return make_codec(settings, folder=folder)
    except (ConfigError, TypeError, KeyError) as error:
        raise CheckpointError(f"{Path(folder) / SETTINGS} is not valid: {error}") from error


def _published(folder: Path) -> Codec:
    """A codec of another project: every tensor is accounted for, then read as float32."""
    config = folder / PUBLISHED_CONFIG
    described = read_json(config) if config.exists() else {}
    name = published_codec_of(described)
    if name is None:
        raise no_codec(folder)
    headers = {folder / PUBLISHED_TENSORS: check_tensors(folder / PUBLISHED_TENSORS)}
    with without_memory():
        codec: _Published = find("codecs", name)(config=described)
    return codec.read(headers)


@runtime_checkable
class Regroups(Protocol):
    """A codec whose bits can be read in groups, each a token."""

    def in_groups(self, codes_per_position: int) -> Self:
        """The same codec with as many codes a position."""
