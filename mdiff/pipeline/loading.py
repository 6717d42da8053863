"""From a name or a directory to a model ready for use; every file is checked before it is used."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mdiff.backbones.layers import Backbone, GridModel
from mdiff.backbones.masked_lm import MaskedLM, load_masked_lm
from mdiff.denoiser import BlockModel, HasDevice
from mdiff.errors import BackendError, CheckpointError, ConfigError, DataError, nearest
from mdiff.files import PIPELINE, DeviceMap, ModelFiles, at_home, locate, parse_settings
from mdiff.find import find
from mdiff.modalities import Modality
from mdiff.modalities.text import Pretrained, Text
from mdiff.pipeline.pipeline import Pipeline
from mdiff.pipeline.published import (
    AUTO,
    check_mask_id,
    codec_alone,
    load_backbone,
    never_generated,
    own_backbone,
    unsupported,
)
from mdiff.pipeline.saving import Card, fits
from mdiff.tokens import TokenSpace

# Of a published generator over a grid: the folder of its codec.
CODEC_FOLDER = "codec"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model",
    "spiece.model",
)  # fmt: skip
DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16,
    "bfloat16": torch.bfloat16, "fp64": torch.float64, "fp32": torch.float32,
    "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip


def load(
    name: str | Path | ModelFiles,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | DeviceMap | str | None = None,
    mask_id: int | None = None,
    block_length: int | None = None,
    tokenizer: str | Path | None = None,
    special_tokens: str | bool = "none",
) -> Pipeline:
    """The pipeline of "builtin:NAME", a directory, a Hub id, or of what `locate` found for one.

    A directory: what `Pipeline.save` or `mdiff train` wrote (a run's latest complete
    checkpoint, or one checkpoint), a model of another project (`docs/checkpoints.md`), or any
    Hugging Face masked language model. `dtype` is a torch.dtype or its name; None keeps what is
    stored. `device` is by default the first GPU, if there is one; "auto" spreads another
    project's model that is larger over all devices, and a mapping {part: device} as it says.
    `mask_id` is for published models of text that state none, `block_length` overrides the files.
    Without a tokenizer the modality is plain token ids; `tokenizer` is a directory, a file or a
    Hub id for a model of another project whose directory has none.

    A tokenizer's special tokens, but for those that end a text, are not generated, and are refused
    where they are typed in a prompt, unless `special_tokens` is "drawn", "typed" or "all" (both;
    or True). Ids that the tokenizer does not have are never generated. Scores are under the
    published law in any case.

    Raises CheckpointError for files that are missing, altered or unsafe (nothing is loaded
    then), BackendError where the Hub or the device cannot be reached.
    """
    kind, target = _dtype(dtype), _target(device)
    main = target if isinstance(target, torch.device) else _device(None)
    files = name if isinstance(name, ModelFiles) else _located(str(name))
    if tokenizer is not None and (files.pipeline is not None or files.classes):
        raise ConfigError(f"tokenizer={str(tokenizer)!r}: {files.folder} has its own modality")
    if files.pipeline is not None:
        pipeline = _own(files, kind, mask_id, target)
    elif files.classes:
        from mdiff.pipeline.amused import load_directory

        pipeline = load_directory(files, dtype=kind, device=main, mask_id=mask_id)
    else:
        pipeline = _foreign(files, kind, mask_id, target, tokenizer)
    never = never_generated(pipeline, special_tokens, published=files.pipeline is None)
    pipeline = replace(pipeline, never_generated=never, stated=files.generation)
    if isinstance(pipeline.modality, Text):
        ids = set(range(pipeline.space.vocab_size)) - {pipeline.space.mask_id}
        pipeline.modality.stated_ends = tuple(sorted(ids.intersection(files.generation.end_ids)))
    denoiser: Any = pipeline.denoiser
    if isinstance(denoiser, Backbone):  # Some attend by what is hidden.
        denoiser.mask_id = pipeline.space.mask_id
    if block_length is not None:
        if not isinstance(pipeline.denoiser, BlockModel):
            raise ConfigError(f"block_length={block_length}: {files.folder} is not a block model")
        if block_length < 1:
            raise ConfigError(f"block_length={block_length}: need at least 1")
        denoiser.block_length = block_length
    if not (isinstance(denoiser, HasDevice) and denoiser.main_device is not None):
        denoiser.to(main)
    denoiser.eval()
    return pipeline


def _located(name: str) -> ModelFiles:
    """The files of a model; CheckpointError, in words of its own, for the folder of a codec."""
    try:
        return locate(name)
    except CheckpointError as error:
        raise codec_alone(at_home(name)) or error from None


def _own(
    files: ModelFiles, dtype: torch.dtype | None, mask_id: int | None,
    device: torch.device | DeviceMap | str,
) -> Pipeline:  # fmt: skip
    """What `Pipeline.save` or training wrote."""
    folder, card = files.folder, card_of(files)
    with _valid(folder):
        space = TokenSpace(**card.space.model_dump())
        never = replace(space, never=tuple(card.never_generated)).never
        schedule, process = card.noise()
        _check_part(folder, card.backbone)
        modality = _modality(folder, card)
    check_mask_id(mask_id, space.mask_id)
    if not fits(modality, space, never):
        raise DataError(
            f"{folder}: the modality has {modality.space.vocab_size} ids, the model "
            f"{space.vocab_size}: they are not of the same training"
        )
    find("backbones", card.backbone)
    denoiser: Backbone | MaskedLM | None = load_backbone(files, dtype=dtype, device=device)
    denoiser = denoiser or load_masked_lm(files, dtype, mask_id=space.mask_id)
    if denoiser.vocab_size != space.vocab_size:
        raise DataError(
            f"{folder}: the model has {denoiser.vocab_size} ids, {PIPELINE} says {space.vocab_size}"
        )
    if card.process is not None:
        denoiser.predicts = card.process.predicts
    return Pipeline(
        denoiser, space, modality, schedule, card.length, never_generated=never, process=process
    )


@contextmanager
def _valid(folder: Path) -> Iterator[None]:
    """CheckpointError for whatever an entry of pipeline.json that is invalid makes of a call."""
    try:
        yield
    except (CheckpointError, DataError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / PIPELINE} is not valid: {error}") from error


def load_modality(files: ModelFiles) -> Modality:
    """The modality of a model that `Pipeline.save` or training wrote, without its weights."""
    with _valid(files.folder):
        return _modality(files.folder, card_of(files))


def card_of(files: ModelFiles) -> Card:
    """What pipeline.json holds; CheckpointError where it is missing or not valid."""
    origin = files.folder / PIPELINE
    if files.pipeline is None:
        raise CheckpointError(f"{origin} is missing")
    return parse_settings(Card, files.pipeline, origin=str(origin), error=CheckpointError)


def _modality(folder: Path, card: Card) -> Modality:
    _check_part(folder, card.modality.name)
    make = find("modalities", card.modality.name)
    made: Modality = make(**card.modality.options, folder=folder)
    return made


def _check_part(folder: Path, name: str) -> None:
    """A name from a file may choose among the parts here; it may not import anything."""
    if not name.replace("-", "_").isidentifier():
        raise CheckpointError(f"{folder / PIPELINE}: {name!r} is not a part of mdiff")


def _foreign(
    files: ModelFiles, dtype: torch.dtype | None, mask_id: int | None,
    device: torch.device | DeviceMap | str, tokenizer: str | Path | None,
) -> Pipeline:  # fmt: skip
    """A model of another project or a Hugging Face masked language model, with its tokenizer or
    without one.
    """
    folder, module = files.folder, load_backbone(files, dtype=dtype, device=device)
    if module is None and (fault := unsupported(files)) is not None:
        raise codec_alone(folder) or fault
    if module is not None and (isinstance(module, GridModel) or own_backbone(files)):
        check_mask_id(mask_id, module.mask_id)
    if module is not None and mask_id is None:
        mask_id = module.mask_id
    text = _text_of(folder, mask_id, tokenizer)
    if mask_id is None and text is None:
        mask_id = files.config.get("mask_id", files.config.get("mask_token_id"))
    elif mask_id is None and text is not None and isinstance(text.tokenizer, Pretrained):
        mask_id = text.tokenizer.mask_id
    if type(mask_id) is not int:
        raise ConfigError(f"{folder} does not say which id is the mask: give mask_id=")
    denoiser = module or load_masked_lm(files, dtype, mask_id=mask_id)
    space = TokenSpace(denoiser.vocab_size, mask_id=mask_id)
    if text is not None and text.tokenizer.size > max(space.vocab_size, mask_id + 1):
        raise DataError(
            f"{folder}: the tokenizer has {text.tokenizer.size} ids, the model {space.vocab_size}"
        )
    modality: Modality = (
        text
        or _image_of(folder, module)
        or find("modalities", "ids")(vocab_size=space.vocab_size, mask_id=mask_id)
    )
    longest = files.config.get("max_position_embeddings", files.config.get("max_length"))
    window = denoiser.window or longest
    return Pipeline(
        denoiser, space, modality, window=window if type(window) is int else None,
        process=None if module is None else module.process,
    )  # fmt: skip


def _text_of(folder: Path, mask_id: int | None, tokenizer: str | Path | None) -> Text | None:
    """The modality of a tokenizer, or else of the folder's; None without one."""
    found: Text | None = None
    if tokenizer is not None:
        found = find("modalities", "text")(tokenizer=str(tokenizer), mask_id=mask_id)
    elif any((folder / name).exists() for name in TOKENIZER_FILES):
        found = find("modalities", "text")(tokenizer=str(folder), mask_id=mask_id, folder=folder)
    return found


def _image_of(folder: Path, module: object) -> Modality | None:
    """The modality of a generator over a grid with the codec in codec/; None without the two.

    Labels are the numbers of the generator's classes. Raises CheckpointError where the codec
    and the generator do not fit.
    """
    beside = folder / CODEC_FOLDER
    if not beside.is_dir() or not isinstance(module, GridModel):
        return None
    from mdiff.modalities.image import Regroups, load_codec

    codec = load_codec(beside)
    codes = module.codes_per_position
    if codec.codes_per_position != codes and isinstance(codec, Regroups):
        codec = codec.in_groups(codes)
    if (codec.codes_per_position, codec.codebook_size) != (codes, module.mask_id):
        raise CheckpointError(
            f"{beside} has {codec.codes_per_position} x {codec.codebook_size} ids a position, the "
            f"model {codes} x {module.mask_id}: they are not of the same training"
        )
    made: Modality = find("modalities", "image")(
        codec=codec, size=[side * codec.stride for side in module.latent_grid], label="condition",
        labels=[str(number) for number in range(module.classes)],
    )  # fmt: skip
    return made


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype.removeprefix("torch.") not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; {nearest(dtype, DTYPES)}")
    return DTYPES[dtype.removeprefix("torch.")]


def _target(device: torch.device | DeviceMap | str | None) -> torch.device | DeviceMap | str:
    """The one device, the map of several, or AUTO."""
    if isinstance(device, Mapping):
        return {part: _device(own) for part, own in device.items()}
    return AUTO if device == AUTO else _device(device)


def _device(device: torch.device | str | int | None) -> torch.device:
    """The device; by default the first GPU if there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        known = "known: auto, cpu, cuda, cuda:0, mps"
        raise ConfigError(f"unknown device {str(device)!r}; {known}") from None
    if found.type == "meta":
        raise BackendError("device meta holds no numbers: nothing can be computed there; use cpu")
    try:
        # A number is read back: some devices take what they cannot hold.
        torch.zeros(1, device=found).item()
    except Exception as error:
        raise BackendError(
            f"device {device}: this torch has no {found.type.upper()} device there; use cpu"
        ) from error
    return found
